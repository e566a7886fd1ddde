"""Where a step that went wrong first shows it: the failing batch is run again, looking at every layer."""

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from glmjax.train import optimizer as optimizer_lib
from glmjax.train import step as step_lib

# Within a layer, in the order of the computation.
_SUBLAYERS = ("attention_norm", "attention", "attention_output_norm", "mlp_norm", "mlp", "mlp_output_norm")


def first_not_finite(objective: step_lib.Objective, params: Any, batch: step_lib.Batch, num_micro: int,
                     alpha: jax.Array, rng: jax.Array, scale: jax.Array | float = 1.0) -> str:
  """The first part that is not finite, in words: parameters, then activations forward, then gradients backward.

  Args:
    params: in the model's order, whatever stages held them.
    batch, num_micro, alpha, rng, scale: as `step.train_step` takes and makes them, so that the same numbers come out.
  """
  config = dataclasses.replace(objective.config, scan_layers=False, remat="none")
  objective = dataclasses.replace(objective, config=config, pipeline=None)
  batch = objective.weigh(batch)
  for name, bad in _in_order(jax.jit(_bad_leaves)(params)):
    if bad:
      return f"parameters of {name}"

  factor = scale / jnp.maximum(batch["loss_weights"].sum(), 1.0)

  @jax.jit
  def look(params: Any, micro: step_lib.Batch, rng: jax.Array) -> tuple[Any, jax.Array, Any]:
    _, captured = objective.hidden(params, micro, alpha, rng, capture_intermediates=True, mutable=["intermediates"])
    loss, grads = jax.value_and_grad(lambda p: objective.sums(p, micro, alpha, rng).loss.sum() * factor)(params)
    return jax.tree.map(_bad, captured["intermediates"]), _bad(loss), _bad_leaves(grads)

  for m in range(num_micro):
    activations, loss, grads = jax.device_get(
        look(params, jax.tree.map(operator.itemgetter(m), batch), jax.random.fold_in(rng, m)))
    for name, bad in _modules(activations):
      if bad:
        return f"activations of {name}"
    if loss:
      return "the loss (logits or loss weights)"
    for name, bad in reversed(list(_in_order(grads))):
      if bad:
        return f"gradients of {name}"
  return "nowhere when run again: a fault of the hardware, perhaps"


def _bad(x: jax.Array) -> jax.Array:
  return ~jnp.isfinite(x.astype(jnp.float32)).all()


def _bad_leaves(tree: Any) -> Any:
  """Per leaf, or per layer [N] of a stacked leaf, whether something is not finite."""

  def look(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    stacked = optimizer_lib.path_names(path)[0] == "layers"
    return ~jnp.isfinite(x).all(tuple(range(1, x.ndim)) if stacked else None)

  return jax.tree_util.tree_map_with_path(look, tree)


def _in_order(flags: Any) -> Iterator[tuple[str, bool]]:
  """(parameter in words, flag) of a params-like tree, in the order of the forward computation."""
  leaves = [(optimizer_lib.path_names(path), jax.device_get(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(flags)]
  for names, flag in leaves:
    if names[0].startswith("embedding"):
      yield f"the {'/'.join(names)}", bool(flag)
  layers = [(names, flag) for names, flag in leaves if names[0] == "layers"]
  layers.sort(key=lambda entry: _SUBLAYERS.index(entry[0][1]))
  for i in range(len(layers[0][1])):
    for names, flag in layers:
      yield f"layer {i} ({'/'.join(names[1:])})", bool(flag[i])
  for names, flag in leaves:
    if names[0] in ("final_norm", "head"):
      yield f"the {'/'.join(names)}", bool(flag)


def _modules(flags: dict[str, Any]) -> Iterator[tuple[str, bool]]:
  """(module in words, flag) of captured outputs, in the order of the computation."""
  layers = sorted((name for name in flags if name.startswith("layers_")), key=lambda name: int(name.split("_")[1]))
  for name in ("embedding", "embedding_norm"):
    if name in flags:
      yield f"the {name}", _any(flags[name])
  for i, name in enumerate(layers):
    for sublayer in _SUBLAYERS:
      if sublayer in flags[name]:
        yield f"layer {i} ({sublayer})", _any(flags[name][sublayer])
    yield f"layer {i}", _any(flags[name])
  yield "the final_norm", _any(flags["final_norm"])


def _any(flags: Any) -> bool:
  return any(bool(flag) for flag in jax.tree.leaves(flags))
