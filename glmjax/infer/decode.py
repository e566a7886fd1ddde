"""Decoding: prefill the cache with a batch of prompts, then a loop on the device that adds tokens.

Each prompt's last token is left to the loop, whose body is then the only place that samples: read the last token,
write its key and value, sample the next. Every row has its own length, step and limit: it is the same alone or among
others. `decode` adds as many tokens as an argument says, so that streaming calls the same compiled program as decoding
to the end.

B batch, P prompt slots, T new tokens, M slots, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from glmjax import errors
from glmjax.infer import constraints as constraints_lib
from glmjax.infer import offload
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import rows as rows_lib
from glmjax.infer import sampling
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import kv_cache
from glmjax.models import lowrank
from glmjax.models import output_rows
from glmjax.models import params as params_lib
from glmjax.parallel import partitioning

UNUSED = -1  # in generated tokens: behind a row's end


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What stays the same while a row decodes; int32 [B, ...]."""

  length_B: jax.Array  # tokens of the prompt but its last
  last_B: jax.Array  # the prompt's last token
  position_B2: jax.Array  # its position and block position
  stride_B2: jax.Array  # what each step adds to them
  limit_B: jax.Array  # most tokens to generate; 0 in rows that only fill the batch
  adapter_B: jax.Array  # the number of its adapter; 0: none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """All that changes from token to token."""

  cache: glm.Cache
  length_B: jax.Array  # int32: tokens of each row in the cache
  step_B: jax.Array  # int32: tokens generated so far
  last_B: jax.Array  # int32: the token to read next
  generated_BT: jax.Array  # int32; UNUSED behind a row's end
  done_B: jax.Array  # bool
  finite_B: jax.Array  # bool: all logits that the row's tokens were taken from
  logits_BV: jax.Array  # float32: those that the last token was taken from, before constraints and temperature

  @property
  def slots(self) -> int:
    """Places of the cache, for tokens of each row."""
    return jax.tree.leaves(self.cache)[0].shape[-2]


def make_rows(
  prompts: Sequence[prompt_lib.Prompt],
  limits: Sequence[int],
  pad_id: int,
  batch: int | None = None,
  slots: int | None = None,
) -> tuple[rows_lib.Batch, Rows]:
  """Makes rows of prompts without their last tokens, `batch` rows of `slots` places (both bucketed if not given),
  and the rest.
  """
  batch = batch or rows_lib.bucket(len(prompts), 1)
  slots = slots or rows_lib.bucket(max(len(p.tokens) for p in prompts) - 1)
  heads = [dataclasses.replace(p, tokens=p.tokens[:-1], positions=p.positions[:, :-1]) for p in prompts]
  return rows_lib.pad(heads, pad_id, batch, slots), known_rows(prompts, limits, pad_id, batch)


def known_rows(prompts: Sequence[prompt_lib.Prompt], limits: Sequence[int], pad_id: int, batch: int) -> Rows:
  """Makes what is known of `batch` rows that continue these prompts."""
  column = functools.partial(rows_lib.column, filling=batch - len(prompts))
  return Rows(
    length_B=column([len(p.tokens) - 1 for p in prompts], fill=0),
    last_B=column([p.tokens[-1] for p in prompts], fill=pad_id),
    position_B2=column([p.positions[:, -1] for p in prompts], fill=(0, 0)),
    stride_B2=column([p.stride for p in prompts], fill=(0, 0)),
    limit_B=column(limits, fill=0),
    adapter_B=column([p.adapter for p in prompts], fill=0),
  )


@functools.partial(jax.jit, static_argnames=("config", "new_tokens", "all_slots"))
def prefill(
  config: config_lib.GLMConfig,
  params: Any,
  prompts: rows_lib.Batch,
  rows: Rows,
  new_tokens: int,
  all_slots: int | None = None,
) -> State:
  """Returns the state after reading all but the last token of each prompt, with room for `new_tokens`.

  `all_slots` sets the size of the cache (P + T without it), which may be extended later.
  """
  batch, slots = prompts.tokens.shape
  check_rows(prompts, rows)
  _, cache = glm.GLM(config).apply(
    {"params": lowrank.for_rows(offload.fetch(params), prompts.adapter)},
    prompts.tokens,
    config.position_kind.of_model(prompts.positions),
    prompts.start,
    prompts.end,
    cache=kv_cache.empty(partitioning.target(), config, batch, 0),
    method="hidden",
  )
  room = new_tokens if all_slots is None else all_slots - slots
  return _begin(config, extend(cache, room), rows, new_tokens)


def _begin(config: config_lib.GLMConfig, cache: glm.Cache, rows: Rows, new_tokens: int) -> State:
  return constrain(
    State(
      cache=cache,
      length_B=rows.length_B,
      step_B=jnp.zeros_like(rows.length_B),
      last_B=rows.last_B,
      generated_BT=jnp.full((len(rows.last_B), new_tokens), UNUSED, jnp.int32),
      done_B=rows.limit_B <= 0,
      finite_B=jnp.ones(len(rows.last_B), bool),
      logits_BV=jnp.zeros((len(rows.last_B), config.vocab_size), jnp.float32),
    )
  )


@functools.partial(jax.jit, static_argnames=("config", "new_tokens"), donate_argnames=("cache",))
def begin(config: config_lib.GLMConfig, params: Any, cache: glm.Cache, rows: Rows, new_tokens: int) -> State:
  """Returns the state of rows whose prompts, all but their last tokens, are in a cache."""
  del params
  return _begin(config, cache, rows, new_tokens)


def check_rows(prompts: rows_lib.Batch, rows: Rows | None = None) -> None:
  """Asserts shapes and dtypes, where a program is traced."""
  batch, slots = prompts.tokens.shape
  chex.assert_shape([prompts.tokens, prompts.start, prompts.end], (batch, slots))
  chex.assert_shape(prompts.positions, (batch, 2, slots))
  chex.assert_shape(prompts.adapter, (batch,))
  chex.assert_type(list(prompts), jnp.int32)
  if rows is not None:
    chex.assert_shape([rows.length_B, rows.last_B, rows.limit_B, rows.adapter_B], (batch,))
    chex.assert_shape([rows.position_B2, rows.stride_B2], (batch, 2))
    chex.assert_type(jax.tree.leaves(rows), jnp.int32)


def next_logits(
  config: config_lib.GLMConfig, params: Any, rows: Rows, state: State, first_B: jax.Array | None = None
) -> tuple[jax.Array, glm.Cache]:
  """Returns logits [B, V] behind each row's last token, and the cache with that token in it; of rows that are done,
  whatever costs least.

  It is written behind those that are there, or, with what the cache says is written along, from `first_B` on.
  """
  positions_B21 = (rows.position_B2 + state.step_B[:, None] * rows.stride_B2)[..., None]
  end_B1 = jnp.where(state.done_B, 0, state.length_B + 1)[:, None]
  model, params = glm.GLM(config), output_rows.for_rows(offload.fetch(params), ~state.done_B)
  params = lowrank.for_rows(params, rows.adapter_B)
  positions = config.position_kind.of_model(positions_B21)
  x_B1D, _ = model.apply({"params": params}, state.last_B[:, None], positions, method="embed")
  places = positions, jnp.zeros_like(end_B1), end_B1, state.length_B if first_B is None else first_B
  if config.scan_layers:
    x_B1D, cache = _through(config, params, state.cache, x_B1D, *places)
  else:
    cache = {}
    for i in range(config.num_layers):
      name, one = f"{params_lib.LAYERS}_{i}", f"{params_lib.LAYERS}_0"
      x_B1D, new = _through(config.one_layer, {one: params[name]}, {one: state.cache[name]}, x_B1D, *places)
      cache[name] = new[one]
  x_B1D = model.apply({"params": params}, x_B1D, method="finish")
  return model.apply({"params": params}, x_B1D, method="head")[:, 0], cache


@functools.partial(jax.jit, static_argnames=("config",), inline=True)
def _through(
  config: config_lib.GLMConfig,
  params: Any,
  cache: glm.Cache,
  x_B1D: jax.Array,
  positions: jax.Array,
  start_B1: jax.Array,
  end_B1: jax.Array,
  lengths_B: jax.Array,
) -> tuple[jax.Array, glm.Cache]:
  """Returns what a model's layers give, and their cache.

  Under jit only so that layers, which are alike, are traced once; a program of its own would copy the cache.
  """
  return glm.GLM(config).apply(
    {"params": params}, x_B1D, positions, start_B1, end_B1, cache=cache, lengths_B=lengths_B, method="through"
  )


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def decode(
  config: config_lib.GLMConfig,
  params: Any,
  rows: Rows,
  state: State,
  draws: sampling.Draws,
  suppressed_V: jax.Array,
  stops_V: jax.Array,
  count: jax.Array,
  constraints: constraints_lib.Constraints | None = None,
) -> State:
  """Adds `count` tokens to each row, fewer where all rows are done before.

  A row is done at its first token of `stops_V` (bool), which is kept, or at its limit.
  """
  chex.assert_shape([suppressed_V, stops_V], (config.vocab_size,))
  chex.assert_type([suppressed_V, stops_V], bool)
  chex.assert_equal_shape([rows.length_B, state.length_B, state.last_B, state.done_B, draws.seeds_B])

  def more(carry: tuple[jax.Array, State]) -> jax.Array:
    added, state = carry
    return (added < count) & ~state.done_B.all()

  def add(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
    added, state = carry
    state = _change_cache(state, lambda layer: layer.unpack(len(state.last_B)))
    raw_BV, cache = next_logits(config, params, rows, state)
    logits_BV = raw_BV
    if constraints is not None:
      logits_BV = constraints_lib.apply(constraints, raw_BV, state.generated_BT, state.step_B, stops_V)
    token_B = sampling.sample(logits_BV, suppressed_V, draws, state.step_B)
    goes_on_B = ~state.done_B
    step_B = state.step_B + goes_on_B
    generated_BT = jax.vmap(_write)(state.generated_BT, jnp.where(goes_on_B, token_B, UNUSED), state.step_B)
    state = State(
      cache,
      length_B=state.length_B + goes_on_B,
      step_B=step_B,
      last_B=jnp.where(goes_on_B, token_B, state.last_B),
      generated_BT=generated_BT,
      done_B=state.done_B | stops_V[token_B] | (step_B >= rows.limit_B),
      finite_B=state.finite_B & (state.done_B | jnp.isfinite(logits_BV).all(-1)),
      logits_BV=raw_BV,
    )
    return added + 1, _change_cache(constrain(state), kv_cache.KVCache.pack)

  batch = len(state.last_B)
  state = _change_cache(state, kv_cache.KVCache.pack)
  state = jax.lax.while_loop(more, add, (jnp.int32(0), state))[1]
  # Said of the result too: XLA lays out what a loop returns as it likes.
  return constrain(_change_cache(state, lambda layer: layer.unpack(batch)))


def _write(row_T: jax.Array, token: jax.Array, at: jax.Array) -> jax.Array:
  """Writes the token at that place of the row; none behind its end."""
  return row_T.at[at].set(token, mode="drop")


def extend(cache: glm.Cache, slots: int) -> glm.Cache:
  """Returns the cache with `slots` empty ones behind those it has."""
  return _each_layer(lambda layer: layer.extend(slots), cache)


def take_rows(cache: glm.Cache, index_B: jax.Array) -> glm.Cache:
  """Returns the cache of the rows with these numbers, in this order."""
  return _each_layer(lambda layer: layer.rows(index_B), cache)


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def grow(config: config_lib.GLMConfig, params: Any, state: State, slots: int) -> State:
  """Returns the state with a cache of `slots` more."""
  del config, params
  return constrain(dataclasses.replace(state, cache=extend(state.cache, slots)))


def constrain(state: State) -> State:
  """Lays the state on the mesh: the cache split by rows and heads, logits by rows and vocabulary, all else whole."""
  cache = _each_layer(kv_cache.KVCache.constrain, state.cache)
  rows = "batch" if len(state.last_B) % partitioning.parts("batch") == 0 else None
  logits_BV = partitioning.constrain(state.logits_BV, rows, "act_vocab")
  rest = dataclasses.replace(state, cache=None, logits_BV=None)
  rest = jax.tree.map(lambda x: partitioning.constrain(x, *[None] * x.ndim), rest)
  return dataclasses.replace(rest, cache=cache, logits_BV=logits_BV)


def take_state(state: State, index_B: jax.Array) -> State:
  """Returns the state of the rows with these numbers, in this order."""
  cache = take_rows(state.cache, index_B)
  rest = jax.tree.map(lambda x: x[index_B], dataclasses.replace(state, cache=None))
  return constrain(dataclasses.replace(rest, cache=cache))


def _change_cache(state: State, change: Callable[[kv_cache.KVCache], kv_cache.KVCache]) -> State:
  """Returns the state with each layer's cache changed."""
  return dataclasses.replace(state, cache=_each_layer(change, state.cache))


def _each_layer(change: Callable[[kv_cache.KVCache], kv_cache.KVCache], cache: glm.Cache) -> glm.Cache:
  return jax.tree.map(change, cache, is_leaf=lambda x: isinstance(x, kv_cache.KVCache))


def check_finite(finite: np.ndarray | jax.Array) -> None:
  """Raises NotFiniteError unless all of these flags say that logits were finite."""
  if not np.all(finite):
    raise not_finite()


def not_finite() -> errors.NotFiniteError:
  """Returns the error of logits that are not finite."""
  return errors.NotFiniteError(
    "the model's logits are not finite: its training diverged, or its weights are damaged or beyond what its dtype "
    "holds; use an earlier checkpoint, or one exported with another --dtype"
  )


def generated(state: State, num_rows: int) -> list[list[int]]:
  """Returns each row's new tokens, its stop token included.

  Raises:
    errors.NotFiniteError: when the logits of one were not finite, so that its tokens mean nothing.
  """
  check_finite(np.asarray(state.finite_B)[:num_rows])
  tokens = np.asarray(state.generated_BT)[:num_rows]
  return [row[row != UNUSED].tolist() for row in tokens]
