"""Where numbers that are not finite first show: in a state, or in a step, which is run again looking at every layer."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.models import params as params_lib
from glmjax.parallel import partitioning
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import state as state_lib
from glmjax.train.pipeline import stage_layout

LARGEST = 1.8e19  # of a parameter: the squares of larger ones are beyond float32
_UNSQUARED = 1e-20  # times a float32, has a square that is finite if the number is


@dataclasses.dataclass(frozen=True)
class Finding:
  """What first is not finite."""

  kind: str  # state, data, forward, backward, norm, rounding or machine
  part: str  # in words
  rows: tuple[int, ...] | None = None  # numbers, in the step's batch, of those that show it; None: cannot be told


def bad_frozen(frozen: Any, dtype: str) -> str | None:
  """Names the first frozen parameters that no model can compute with in `dtype`, in words; None: all are good."""
  limit = float(jnp.finfo(dtype).max)
  for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
    if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.all(jnp.abs(leaf) <= limit)):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      return f"parameters of {name} are not finite, or larger than {limit:g}"
  return None


def bad_part(stages: stage_layout.StageLayout, state: state_lib.TrainState, dtype: str) -> str | None:
  """Names the first part of a state, in the stages' order, that no model can compute with, in words; None: all of it is
  good.

  Everything must be finite, and parameters so in the compute dtype, and their squares. One pass over the state where
  it lies, and a few bytes to the host; more where something is found.
  """
  limit = min(LARGEST, float(jnp.finfo(dtype).max))
  if _is_good(state, limit):
    return None
  state = stages.put_back(state)
  for name, bad in _in_order(_bad_leaves(state.params)):
    if bad:
      return f"parameters of {name}"
  beyond = jax.tree.map(lambda x: jnp.where(jnp.abs(x) <= limit, x, jnp.inf), state.params)
  for name, bad in _in_order(_bad_leaves(beyond)):
    if bad:
      return f"parameters of {name}, some of them larger than {limit:g}"
  for path, bad in jax.tree_util.tree_leaves_with_path(jax.device_get(_bad_leaves(state.opt_state))):
    if np.any(bad):
      moment = next((key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)), "state")
      return f"the optimizer's {moment} of {'/'.join(optimizer_lib.path_names(path))}"
  return "the loss scale"


@functools.cache
def _zero(sharding: Any) -> Callable[[jax.Array, float], jax.Array]:
  """Returns a function of an array and a factor: 0 where all of it times the factor is finite, and its square; else no
  number.

  Sums are what XLA does fastest on a CPU: five times as fast as comparing, seven times as fast as all arrays at once.
  """
  return jax.jit(lambda x, factor: (jnp.square(x.astype(jnp.float32) * factor) * 0).sum(), out_shardings=sharding)


def _is_good(state: state_lib.TrainState, limit: float) -> bool:
  """Tells whether a state is finite, its parameters within the limit; every process comes to the same."""
  zero = _zero(partitioning.replicated())
  arrays = [(x, LARGEST / limit) for x in jax.tree.leaves(state.params)]
  arrays += [
    (x, _UNSQUARED)
    for x in jax.tree.leaves((state.opt_state, state.loss_scale))
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  # One at a time: sums that wait for other devices can take all threads of XLA's CPU, and then wait for ever.
  found = [jax.block_until_ready(zero(x, factor)) for x, factor in arrays]
  return not any(jax.device_get(found))


def first_not_finite(
  objective: objective_lib.Objective,
  state: state_lib.TrainState,
  batch: objective_lib.Batch,
  num_micro: int,
  alpha: jax.Array,
  scale: jax.Array | float = 1.0,
) -> Finding | None:
  """Finds the first part of a step that is not finite: parameters, data, activations forward, then gradients backward.

  None where its parts, run one by one, are finite: they round otherwise than the step as a whole.

  Args:
    state: before the step, in the model's order, whatever stages held it.
    batch, num_micro, alpha, scale: as `step.train_step` takes and makes them, so that the same numbers come out.
  """
  for name, bad in _in_order(_bad_leaves(state.model_params)):
    if bad:
      return Finding("state", f"parameters of {name}")
  if rows := _numbers(_bad_rows(batch["loss_weights"]), batch["rows"]):
    return Finding("data", "the loss (the data's loss weights)", rows)
  config = dataclasses.replace(objective.config, scan_layers=False, remat="none")
  objective = dataclasses.replace(objective, config=config, pipeline=None)
  batch = objective.weigh(batch)
  factor = scale / jnp.maximum(objective.weight(batch), 1.0)
  rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

  def look(params: Any, frozen: Any, micro: objective_lib.Batch) -> tuple[Any, jax.Array, Any]:
    whole = params_lib.merge(params, frozen)
    _, captured = objective.hidden(whole, micro, alpha, rng, capture_intermediates=True, mutable=["intermediates"])

    def loss_of(params: Any) -> jax.Array:
      return objective.loss(params_lib.merge(params, frozen), micro, alpha, rng).total * factor

    loss, grads = jax.value_and_grad(loss_of)(params)
    size = micro["tokens"].shape[0]
    activations = jax.tree.map(lambda x: _bad(x, (0,) if x.shape[:1] == (size,) else ()), captured["intermediates"])
    return activations, _bad(loss), _flags(grads)

  look = jax.jit(look, out_shardings=partitioning.replicated())
  for m in range(num_micro):
    micro = jax.tree.map(operator.itemgetter(m), batch)
    activations, loss, grads = jax.device_get(look(state.params, state.frozen, micro))
    of_micro = _numbers(np.ones(micro["rows"].shape, bool), micro["rows"])
    for name, bad in _modules(activations):
      if bad.any():
        return Finding("forward", f"activations of {name}", _numbers(bad, micro["rows"]) if bad.ndim else of_micro)
    if loss:
      return Finding("forward", "the loss", of_micro)
    for name, bad in reversed(list(_in_order(grads))):
      if bad:
        return Finding("backward", f"gradients of {name}", of_micro)
  return None


def _numbers(flags: Any, rows: jax.Array) -> tuple[int, ...]:
  """Returns the numbers of the rows that are flagged; arrays of one shape."""
  everywhere = jax.jit(lambda x: x, out_shardings=partitioning.replicated())
  return tuple(sorted(np.asarray(everywhere(rows))[np.asarray(flags)].tolist()))


def _bad_rows(weights_MBL: jax.Array) -> jax.Array:
  return jax.jit(lambda x: _bad(x, (0, 1)), out_shardings=partitioning.replicated())(weights_MBL)


def _bad(x: jax.Array, kept: tuple[int, ...] = ()) -> jax.Array:
  """Tells whether something is not finite, for each index of the axes that are kept."""
  return ~jnp.isfinite(x.astype(jnp.float32)).all(tuple(i for i in range(x.ndim) if i not in kept))


def _flags(tree: Any) -> Any:
  """Tells per leaf, or per layer [N] of a stacked leaf, whether something is not finite."""

  def look(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    return _bad(x, (0,) if params_lib.LAYERS in optimizer_lib.path_names(path) and x.ndim else ())

  return jax.tree_util.tree_map_with_path(look, tree)


def _bad_leaves(tree: Any) -> Any:
  return jax.jit(_flags, out_shardings=partitioning.replicated())(tree)


def _in_order(flags: Any) -> Iterator[tuple[str, bool]]:
  """Yields (parameter in words, flag) of a params-like tree, in the order of the forward computation."""
  leaves = [
    (optimizer_lib.path_names(path), np.asarray(jax.device_get(leaf)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(flags)
  ]
  for names, flag in leaves:
    if names[0].startswith("embedding"):
      yield f"the {'/'.join(names)}", bool(flag)
  layers = [(names, flag) for names, flag in leaves if names[0] == params_lib.LAYERS]
  layers.sort(key=lambda entry: params_lib.sublayers().index(entry[0][1]))
  for i in range(max((len(flags) for _, flags in layers), default=0)):
    for names, flag in layers:
      yield f"layer {i} ({'/'.join(names[1:])})", bool(flag[i])
  for names, flag in leaves:
    if names[0] != params_lib.LAYERS and not names[0].startswith("embedding"):
      yield f"the {'/'.join(names)}", bool(flag)


def _modules(flags: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (module in words, flags [B] or []) of captured outputs, in the order of the computation."""
  layers = sorted((name for name in flags if name.startswith("layers_")), key=lambda name: int(name.split("_")[1]))
  for name in ("embedding", "embedding_norm"):
    if name in flags:
      yield f"the {name}", _any(flags[name])
  for i, name in enumerate(layers):
    for sublayer in params_lib.sublayers():
      if sublayer in flags[name]:
        yield f"layer {i} ({sublayer})", _any(flags[name][sublayer])
    yield f"layer {i}", _any(flags[name])
  yield "the final_norm", _any(flags["final_norm"])


def _any(flags: Any) -> np.ndarray:
  """Joins the flags of all outputs of a module: per row where they tell it."""
  found = [np.asarray(flag) for flag in jax.tree.leaves(flags)]
  by_row = [flag for flag in found if flag.ndim]
  whole = np.any([flag for flag in found if not flag.ndim] or [False])
  return np.any(by_row, axis=0) | (whole and not np.any(by_row)) if by_row else np.asarray(whole)
