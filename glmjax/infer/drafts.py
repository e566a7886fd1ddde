"""Drafts: tokens that may come next, read in the same pass as the last one, so that a pass may give several.

The free lanes of a program read a request's draft (infer/drafting.py), each token at its place behind the request's
last one. What the model draws there is what it would have drawn anyway, as draws follow from a request's seed and the
step: a token of a draft is right where it equals the draw in front of it. The program has the rows that it has without
drafts, so that no text changes by a bit, and costs what it costs without them.

B batch, J the tokens of one request that a pass reads at most, T new tokens, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from glmjax.infer import constraints as constraints_lib
from glmjax.infer import decode
from glmjax.infer import sampling
from glmjax.models import config as config_lib
from glmjax.models import kv_cache

MOST = 7  # tokens of a draft: behind so many few are still right


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
  """Which lane reads what in a pass; int32."""

  owner_B: jax.Array  # the lane whose request this one reads for: its own, or another's
  ahead_B: jax.Array  # how many tokens behind the request's last one; 0 in its own lane
  token_B: jax.Array  # of the draft, in others' lanes
  lanes_BJ: jax.Array  # of each lane the lanes that read for the same request, in order; B where there are no more


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def verify(
  config: config_lib.GLMConfig,
  params: Any,
  rows: decode.Rows,
  state: decode.State,
  draws: sampling.Draws,
  suppressed_V: jax.Array,
  stops_V: jax.Array,
  drafts: Drafts,
  constraints: constraints_lib.Constraints | None = None,
) -> decode.State:
  """Adds to each request its next token, and those behind it that its draft had right.

  Lanes that read for another's request have its `rows`, `draws` and `constraints`, and in their cache what its own
  lane has.
  """
  seen = _seen(state, drafts, constraints is not None)
  raw_BV, cache = decode.next_logits(config, params, rows, seen, state.length_B[drafts.owner_B])
  logits_BV = raw_BV
  if constraints is not None:
    logits_BV = constraints_lib.apply(constraints, raw_BV, seen.generated_BT, seen.step_B, stops_V)
  drawn_B = sampling.sample(logits_BV, suppressed_V, draws, seen.step_B)
  ended_B = stops_V[drawn_B] | (seen.step_B + 1 >= rows.limit_B)
  finite_B = jnp.isfinite(logits_BV).all(-1)

  drawn_BJ, token_BJ, ended_BJ, finite_BJ = (_of(x, drafts) for x in (drawn_B, drafts.token_B, ended_B, finite_B))
  follows_BJ = (drafts.lanes_BJ < len(drawn_B))[:, 1:] & (token_BJ[:, 1:] == drawn_BJ[:, :-1]) & ~ended_BJ[:, :-1]
  taken_BJ = jnp.cumprod(jnp.pad(follows_BJ, ((0, 0), (1, 0)), constant_values=True), axis=1, dtype=jnp.int32)
  taken_BJ *= (~state.done_B & (drafts.ahead_B == 0))[:, None]
  count_B = taken_BJ.sum(1)
  last_B1 = jnp.maximum(count_B - 1, 0)[:, None]

  def at_last(x_BJ: jax.Array, otherwise_B: jax.Array) -> jax.Array:
    return jnp.where(count_B > 0, jnp.take_along_axis(x_BJ, last_B1, axis=1)[:, 0], otherwise_B)

  return decode.constrain(
    decode.State(
      cache=cache,
      length_B=state.length_B + count_B,
      step_B=state.step_B + count_B,
      last_B=at_last(drawn_BJ, state.last_B),
      generated_BT=_write(state.generated_BT, drawn_BJ, state.step_B, taken_BJ > 0),
      done_B=at_last(ended_BJ, state.done_B),
      finite_B=state.finite_B & (finite_BJ | (taken_BJ == 0)).all(1),
      logits_BV=raw_BV,
    )
  )


def _seen(state: decode.State, drafts: Drafts, generated: bool) -> decode.State:
  """Returns the state in which each lane reads its token: its request's, that many tokens on; with what was generated
  until there, if asked.
  """
  owner_B, ahead_B = drafts.owner_B, drafts.ahead_B
  step_B = state.step_B[owner_B]
  generated_BT = state.generated_BT
  if generated:
    token_BJ = _of(drafts.token_B, drafts)[:, 1:]
    generated_BT = _write(generated_BT[owner_B], token_BJ, step_B, jnp.arange(token_BJ.shape[1]) < ahead_B[:, None])
  return dataclasses.replace(
    state,
    cache=jax.tree.map(
      lambda layer: dataclasses.replace(layer, rows_BJ=drafts.lanes_BJ),
      state.cache,
      is_leaf=lambda x: isinstance(x, kv_cache.KVCache),
    ),
    length_B=state.length_B[owner_B] + ahead_B,
    step_B=step_B + ahead_B,
    done_B=state.done_B[owner_B],
    last_B=jnp.where(ahead_B > 0, drafts.token_B, state.last_B),
    generated_BT=generated_BT,
  )


def _of(x_B: jax.Array, drafts: Drafts) -> jax.Array:
  """Returns [B, J]: what the lanes have that read for the same request."""
  return jnp.take(x_B, drafts.lanes_BJ, mode="clip")


def _write(into_BT: jax.Array, tokens_BJ: jax.Array, first_B: jax.Array, written_BJ: jax.Array) -> jax.Array:
  """Writes those tokens of each row that are to be, at its places from the first on."""
  places_BJ = jnp.where(written_BJ, first_B[:, None] + jnp.arange(tokens_BJ.shape[1]), into_BT.shape[1])
  return into_BT.at[jnp.arange(len(into_BT))[:, None], places_BJ].set(tokens_BJ, mode="drop")


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def copy(
  config: config_lib.GLMConfig, params: Any, state: decode.State, lane: jax.Array, other: jax.Array
) -> decode.State:
  """Returns the state with what a lane has in its cache in another's too."""
  del config, params

  def put(x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, jax.lax.dynamic_index_in_dim(x, lane, 0), other, 0)

  return decode.constrain(dataclasses.replace(state, cache=jax.tree.map(put, state.cache)))
