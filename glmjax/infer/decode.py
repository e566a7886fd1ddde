"""Decoding: prefill the cache with a batch of prompts, then a loop on the device that adds tokens.

Each prompt's last token is left to the loop, whose body is then the only place that samples: read the
last token, write its key and value, sample the next. `decode` runs to any step given as an argument, so
that streaming calls the same compiled program as decoding to the end.

B batch, P prompt slots, T new slots, M = P + T slots, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmjax import errors
from glmjax.infer import cache as cache_lib
from glmjax.infer import constraints as constraints_lib
from glmjax.infer import offload
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import sampling
from glmjax.models import config as config_lib
from glmjax.models import glm

UNUSED = -1  # in generated tokens: behind a row's end


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """All that changes from token to token."""

  cache: glm.Cache
  first: jax.Array  # int32 []: slot of the first new token
  step: jax.Array  # int32 []: tokens generated so far; the next is written to slot first + step
  last_B: jax.Array  # int32: the token to read next
  generated_BT: jax.Array  # int32; UNUSED behind a row's end
  done_B: jax.Array  # bool
  finite_B: jax.Array  # bool: all logits that the row's tokens were taken from


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What stays the same while a batch decodes."""

  tokens_BP: jax.Array  # int32, without each prompt's last token; padded on the left
  positions_B2P: jax.Array  # int32: position, block position
  start_BP: jax.Array  # int32: the interval that each prompt token sees
  end_BP: jax.Array
  last_B: jax.Array  # int32: each prompt's last token
  position_B2: jax.Array  # int32: its position and block position
  stride_B2: jax.Array  # int32: what each step adds to them
  start_B: jax.Array  # int32: first slot that holds a token of the row
  limit_B: jax.Array  # int32: most tokens to generate; 0 in rows that only fill the batch


def make_rows(prompts: Sequence[prompt_lib.Prompt], limits: Sequence[int], pad: int, batch: int | None = None,
              slots: int | None = None) -> Rows:
  """Prompts as one padded batch of `batch` rows and `slots` prompt slots (both bucketed if not given)."""
  batch = batch or cache_lib.bucket(len(prompts), 1)
  slots = slots or cache_lib.bucket(max(len(p.tokens) for p in prompts) - 1)
  heads = [dataclasses.replace(p, tokens=p.tokens[:-1], positions=p.positions[:, :-1]) for p in prompts]
  filling = batch - len(prompts)
  column = lambda values, fill: jnp.asarray(np.array([*values, *[fill] * filling], np.int32))
  return Rows(
      *map(jnp.asarray, prompt_lib.pad_left(heads, pad, batch, slots)),
      last_B=column((p.tokens[-1] for p in prompts), pad),
      position_B2=column((p.positions[:, -1] for p in prompts), (0, 0)),
      stride_B2=column((p.stride for p in prompts), (0, 0)),
      start_B=column((slots - len(p.tokens) for p in heads), slots),
      limit_B=column(limits, 0))


def without_prompts(rows: Rows) -> Rows:
  """All that `decode` needs: one program then serves prompts of any length, if their caches are of one size."""
  return dataclasses.replace(rows, tokens_BP=None, positions_B2P=None, start_BP=None, end_BP=None)


@functools.partial(jax.jit, static_argnames=("config", "new_slots", "all_slots"))
def prefill(config: config_lib.GLMConfig, params: Any, rows: Rows, new_slots: int, all_slots: int | None = None
            ) -> State:
  """The state after reading all but the last token of each prompt, with room for `new_slots` tokens.

  `all_slots` sets the size of the cache (P + T without it), which may be extended later.
  """
  batch, slots = rows.tokens_BP.shape
  # Attention here runs over the prompt's slots only; the empty ones are added behind.
  _, cache = glm.GLM(config).apply(
      {"params": offload.fetch(params)}, rows.tokens_BP, model_positions(config, rows.positions_B2P), rows.start_BP,
      rows.end_BP, cache=cache_lib.empty(config, batch, slots), cache_index=jnp.int32(0), method="hidden")
  room = new_slots if all_slots is None else all_slots - slots
  return State(cache=cache_lib.extend(cache, room), first=jnp.int32(slots), step=jnp.int32(0), last_B=rows.last_B,
               generated_BT=jnp.full((batch, new_slots), UNUSED, jnp.int32), done_B=rows.limit_B <= 0,
               finite_B=jnp.ones(batch, bool))


def next_logits(config: config_lib.GLMConfig, params: Any, rows: Rows, state: State
                ) -> tuple[jax.Array, glm.Cache]:
  """Logits [B, V] behind each row's last token, and the cache with that token in it."""
  slot = state.first + state.step
  positions_B2 = rows.position_B2 + state.step * rows.stride_B2
  end_B1 = jnp.broadcast_to(slot + 1, (len(state.last_B), 1))
  model, params = glm.GLM(config), offload.fetch(params)
  x_B1D, cache = model.apply(
      {"params": params}, state.last_B[:, None], model_positions(config, positions_B2[..., None]),
      rows.start_B[:, None], end_B1, cache=state.cache, cache_index=slot, method="hidden")
  return model.apply({"params": params}, x_B1D, method="head")[:, 0], cache


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def decode(config: config_lib.GLMConfig, params: Any, rows: Rows, state: State, draws: sampling.Draws,
           suppressed_V: jax.Array, stops_V: jax.Array, until: jax.Array,
           constraints: constraints_lib.Constraints | None = None) -> State:
  """Adds tokens until every row is done or `until` tokens are generated.

  A row is done at its first token of `stops_V` (bool), which is kept, or at its limit.
  """

  def more(state: State) -> jax.Array:
    return (state.step < until) & ~state.done_B.all()

  def step(state: State) -> State:
    state = dataclasses.replace(state, cache=cache_lib.split_heads(state.cache, config.num_heads))
    logits_BV, cache = next_logits(config, params, rows, state)
    if constraints is not None:
      logits_BV = constraints_lib.apply(constraints, logits_BV, state.generated_BT, state.step, stops_V)
    token_B = sampling.sample(logits_BV, suppressed_V, draws, state.step)
    written_B1 = jnp.where(state.done_B, UNUSED, token_B)[:, None]
    return dataclasses.replace(
        state, cache=cache_lib.merge_heads(cache), step=state.step + 1, last_B=token_B,
        generated_BT=jax.lax.dynamic_update_slice(state.generated_BT, written_B1, (0, state.step)),
        done_B=state.done_B | stops_V[token_B] | (state.step + 1 >= rows.limit_B),
        finite_B=state.finite_B & (state.done_B | jnp.isfinite(logits_BV).all(-1)))

  state = dataclasses.replace(state, cache=cache_lib.merge_heads(state.cache))
  state = jax.lax.while_loop(more, step, state)
  return dataclasses.replace(state, cache=cache_lib.split_heads(state.cache, config.num_heads))


def model_positions(config: config_lib.GLMConfig, positions_B2L: jax.Array) -> jax.Array:
  """Positions as the family takes them: [B, L], or [B, 2, L] for two-dimensional ones."""
  return positions_B2L[:, 0] if config.positions == "rotary" else positions_B2L


def check_finite(finite: np.ndarray | jax.Array) -> None:
  """Raises NotFiniteError unless all of these flags say that logits were finite."""
  if not np.all(finite):
    raise errors.NotFiniteError(
        "the model's logits are not finite: its training diverged, or its weights are damaged or beyond what its dtype "
        "holds; use an earlier checkpoint, or one exported with another --dtype")


def generated(state: State, num_rows: int) -> list[list[int]]:
  """Each row's new tokens, its stop token included.

  Raises:
    errors.NotFiniteError: when the logits of one were not finite, so that its tokens mean nothing.
  """
  check_finite(np.asarray(state.finite_B)[:num_rows])
  tokens = np.asarray(state.generated_BT)[:num_rows]
  return [row[row != UNUSED].tolist() for row in tokens]
