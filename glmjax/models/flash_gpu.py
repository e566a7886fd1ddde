"""Attention over intervals for NVIDIA GPUs from Ampere on, without L x M matrices: Pallas kernels for Triton.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): softmax in float32 block by block, backward from the saved log-sum.
A block of queries reads only the blocks of keys that one of its intervals meets, so that causal rows cost half and
packed samples less.

B batch, L query length, M key length, H heads, K head dimension.
"""

import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

try:
  from jax.experimental.pallas import triton
except ImportError:  # `target.runs_triton` then says so
  triton = None

_LOG2E = math.log2(math.e)
_LOW = -1e30  # a score that no query sees; finite, so that it minus itself is 0

# Queries and keys of a block, warps, stages of the loop: fastest on an H100 at K = 128 (benchmarks/attention.py).
_FORWARD = (64, 32, 4, 3)
_KEYS = (64, 64, 4, 2)  # of the kernel for the gradients of keys and values
_QUERIES = (128, 64, 8, 3)  # of that for queries
_DECODE = (16, 128, 4, 2)  # of one new query: its copies, and the keys of a part
BLOCK = 128  # lengths must be multiples of it
DECODE_BLOCK = _DECODE[1]  # and so must a cache's slots, of this


def forward(q_BLHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, start_BL: jax.Array, end_BL: jax.Array, *,
            interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """What `attention.attend` returns, and the float32 [B, H, L] base-2 logarithms of the softmax's sums."""
  of = _Blocks(*_FORWARD[:2], q_BLHK.shape, k_BMHK.shape[1])
  return _call_forward(of, _FORWARD, of.query(), of.all_keys(), jax.ShapeDtypeStruct(q_BLHK.shape, q_BLHK.dtype),
                       (q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL), interpret)


def decode(q_B1HK: jax.Array, k_BHMK: jax.Array, v_BHMK: jax.Array, start_B1: jax.Array, end_B1: jax.Array, *,
           interpret: bool = False) -> jax.Array:
  """`attention.attend` of one query a row, [B, 1, H, K], over keys in the cache's own layout.

  Each part of P keys is attended to apart, so that the whole machine reads them, and the parts are then weighed by
  their sums.
  """
  copies, block_k = _DECODE[:2]  # of the query, as many as tensor cores take at least
  batch, _, heads, width = q_B1HK.shape
  parts = k_BHMK.shape[2] // block_k
  edges = jnp.repeat(jnp.arange(parts, dtype=jnp.int32) * block_k, copies)
  of = _Blocks(copies, block_k, (batch, parts * copies, heads, width), k_BHMK.shape[2])
  out_BLHK, sums_BHL = _call_forward(
      of, _DECODE, of.same_query(), of.all_keys_of_a_head(),
      jax.ShapeDtypeStruct((batch, parts * copies, heads, width), jnp.float32),
      (jnp.repeat(q_B1HK, copies, axis=1), k_BHMK, v_BHMK, jnp.maximum(start_B1, edges),
       jnp.minimum(end_B1, edges + block_k)), interpret)
  weights_BHP = jax.nn.softmax(sums_BHL[:, :, ::copies] / _LOG2E, axis=-1)
  out_BHK = (jnp.swapaxes(out_BLHK[:, ::copies], 1, 2) * weights_BHP[..., None]).sum(2)
  return out_BHK[:, None].astype(q_B1HK.dtype)


def _call_forward(of: "_Blocks", sizes: tuple[int, ...], query: pl.BlockSpec, keys: pl.BlockSpec,
                  out: jax.ShapeDtypeStruct, inputs: tuple[jax.Array, ...], interpret: bool
                  ) -> tuple[jax.Array, jax.Array]:
  block_q, block_k, warps, stages = sizes
  first, last = key_range(*inputs[3:], block_q, block_k, of.num_keys)
  return pl.pallas_call(
      functools.partial(_forward_kernel, scale=of.width ** -0.5, block_k=block_k),
      grid=(of.num_queries // block_q, of.heads, of.batch),
      in_specs=[of.ranges(first), of.ranges(last), query, keys, keys, of.places(), of.places()],
      out_specs=[of.query(), of.sums()],
      out_shape=[out, jax.ShapeDtypeStruct((of.batch, of.heads, of.num_queries), jnp.float32)],
      compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
      cost_estimate=of.cost(2, inputs[1].dtype.itemsize), interpret=interpret,
      name="flash_forward")(first, last, *inputs)


def backward(q_BLHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, start_BL: jax.Array, end_BL: jax.Array,
             sums_BHL: jax.Array, delta_BHL: jax.Array, d_BLHK: jax.Array, *, interpret: bool = False
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k and v; delta is the sum over K of the output times its gradient d, float32."""
  scale = q_BLHK.shape[-1] ** -0.5
  inputs = q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL, sums_BHL, delta_BHL, d_BLHK
  call = functools.partial(pl.pallas_call, interpret=interpret)
  block_q, block_k, warps, stages = _QUERIES
  of = _Blocks(block_q, block_k, q_BLHK.shape, k_BMHK.shape[1])
  first, last = key_range(start_BL, end_BL, block_q, block_k, k_BMHK.shape[1])
  dq_BLHK = call(
      functools.partial(_query_kernel, scale=scale, block_k=block_k),
      grid=(of.num_queries // block_q, of.heads, of.batch),
      in_specs=[of.ranges(first), of.ranges(last), of.query(), of.all_keys(), of.all_keys(), of.places(), of.places(),
                of.sums(), of.sums(), of.query()],
      out_specs=of.query(), out_shape=jax.ShapeDtypeStruct(q_BLHK.shape, q_BLHK.dtype),
      compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
      cost_estimate=of.cost(3, k_BMHK.dtype.itemsize), name="flash_dq")(
          first, last, *inputs)
  block_q, block_k, warps, stages = _KEYS
  of = _Blocks(block_q, block_k, q_BLHK.shape, k_BMHK.shape[1])
  first, last = query_range(start_BL, end_BL, block_q, block_k, k_BMHK.shape[1])
  dk_BMHK, dv_BMHK = call(
      functools.partial(_key_kernel, scale=scale, block_q=block_q),
      grid=(of.num_keys // block_k, of.heads, of.batch),
      in_specs=[of.ranges(first), of.ranges(last), of.all_queries(), of.key(), of.key(), of.all_places(),
                of.all_places(), of.all_sums(), of.all_sums(), of.all_queries()],
      out_specs=[of.key(), of.key()],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BMHK, v_BMHK)],
      compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
      cost_estimate=of.cost(4, k_BMHK.dtype.itemsize), name="flash_dkv")(
          first, last, *inputs)
  return dq_BLHK, dk_BMHK, dv_BMHK


def key_range(start_BL: jax.Array, end_BL: jax.Array, block_q: int, block_k: int, num_keys: int
              ) -> tuple[jax.Array, jax.Array]:
  """First and past-the-last block of keys that each block of queries sees, int32 [B, L / block_q] each."""
  split = lambda x: x.reshape(x.shape[0], -1, block_q)
  last = jnp.minimum(-(-split(end_BL).max(-1) // block_k), num_keys // block_k)
  return jnp.clip(split(start_BL).min(-1) // block_k, 0, last), last


def query_range(start_BL: jax.Array, end_BL: jax.Array, block_q: int, block_k: int, num_keys: int
                ) -> tuple[jax.Array, jax.Array]:
  """First and past-the-last block of queries that sees each block of keys, int32 [B, M / block_k] each."""
  first, last = (x[..., None] for x in key_range(start_BL, end_BL, block_q, block_k, num_keys))
  blocks = jnp.arange(num_keys // block_k)
  seen = (first <= blocks) & (blocks < last)  # [B, query blocks, key blocks]
  any_seen = seen.any(1)
  past = seen.shape[1] - jnp.argmax(seen[:, ::-1], axis=1)
  return (jnp.where(any_seen, jnp.argmax(seen, axis=1), 0).astype(jnp.int32),
          jnp.where(any_seen, past, 0).astype(jnp.int32))


class _Blocks:
  """Which part of an array each program reads; the grid is (block, head, row)."""

  def __init__(self, block_q: int, block_k: int, q_shape: tuple[int, ...], num_keys: int):
    self.batch, self.num_queries, self.heads, self.width = q_shape
    self.num_keys, self.block_q, self.block_k = num_keys, block_q, block_k

  def cost(self, products: int, itemsize: int) -> pl.CostEstimate:
    """Of so many products of queries and keys, all of them visible; every array read or written once."""
    pairs, tokens = self.num_queries * self.num_keys, self.num_queries + self.num_keys
    rows = self.batch * self.heads
    return pl.CostEstimate(flops=2 * products * rows * pairs * self.width, transcendentals=rows * pairs,
                           bytes_accessed=2 * rows * tokens * self.width * itemsize)

  def _tokens(self, block: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, block, None, self.width), lambda i, h, b: (b, i, h, 0))

  def _row(self, length: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, length, None, self.width), lambda i, h, b: (b, 0, h, 0))

  def query(self) -> pl.BlockSpec:
    return self._tokens(self.block_q)

  def same_query(self) -> pl.BlockSpec:
    return pl.BlockSpec((None, self.block_q, None, self.width), lambda i, h, b: (b, 0, h, 0))

  def key(self) -> pl.BlockSpec:
    return self._tokens(self.block_k)

  def all_queries(self) -> pl.BlockSpec:
    return self._row(self.num_queries)

  def all_keys(self) -> pl.BlockSpec:
    return self._row(self.num_keys)

  def all_keys_of_a_head(self) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, self.num_keys, self.width), lambda i, h, b: (b, h, 0, 0))

  def places(self) -> pl.BlockSpec:
    return pl.BlockSpec((None, self.block_q), lambda i, h, b: (b, i))

  def all_places(self) -> pl.BlockSpec:
    return pl.BlockSpec((None, self.num_queries), lambda i, h, b: (b, 0))

  def sums(self) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, self.block_q), lambda i, h, b: (b, h, i))

  def all_sums(self) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, self.num_queries), lambda i, h, b: (b, h, 0))

  def ranges(self, of: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, of.shape[1]), lambda i, h, b: (b, 0))


def _visible(keys: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
  """bool [queries, keys]."""
  return (keys[None] >= start[:, None]) & (keys[None] < end[:, None])


def _forward_kernel(first_ref: Any, last_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any,
                    out_ref: Any, sums_ref: Any, *, scale: float, block_k: int) -> None:
  i = pl.program_id(0)
  q, start, end = q_ref[...], start_ref[...], end_ref[...]
  block_q, width = q.shape

  def body(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    out, high, total = carry
    here = pl.ds(j * block_k, block_k)
    scores = triton.dot(q, k_ref[here, :].T) * (scale * _LOG2E)
    seen = _visible(j * block_k + jnp.arange(block_k), start, end)
    scores = jnp.where(seen, scores, _LOW)
    new_high = jnp.maximum(high, scores.max(-1))
    weights = jnp.where(seen, jnp.exp2(scores - new_high[:, None]), 0.0)
    shrink = jnp.exp2(high - new_high)
    v = v_ref[here, :]
    out = out * shrink[:, None] + triton.dot(weights.astype(v.dtype), v)
    return out, new_high, total * shrink + weights.sum(-1)

  out, high, total = jax.lax.fori_loop(
      first_ref[i], last_ref[i], body,
      (jnp.zeros((block_q, width), jnp.float32), jnp.full(block_q, _LOW, jnp.float32), jnp.zeros(block_q, jnp.float32)))
  total = jnp.maximum(total, 1e-30)  # of a query that sees nothing
  out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
  sums_ref[...] = high + jnp.log2(total)


def _query_kernel(first_ref: Any, last_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any,
                  sums_ref: Any, delta_ref: Any, d_ref: Any, dq_ref: Any, *, scale: float, block_k: int) -> None:
  i = pl.program_id(0)
  q, d, start, end, sums, delta = (ref[...] for ref in (q_ref, d_ref, start_ref, end_ref, sums_ref, delta_ref))

  def body(j: jax.Array, dq: jax.Array) -> jax.Array:
    here = pl.ds(j * block_k, block_k)
    k, v = k_ref[here, :], v_ref[here, :]
    scores = triton.dot(q, k.T) * (scale * _LOG2E)
    seen = _visible(j * block_k + jnp.arange(block_k), start, end)
    weights = jnp.where(seen, jnp.exp2(scores - sums[:, None]), 0.0)
    d_scores = weights * (triton.dot(d, v.T) - delta[:, None]) * scale
    return dq + triton.dot(d_scores.astype(k.dtype), k)

  dq = jax.lax.fori_loop(first_ref[i], last_ref[i], body, jnp.zeros(q.shape, jnp.float32))
  dq_ref[...] = dq.astype(dq_ref.dtype)


def _key_kernel(first_ref: Any, last_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any,
                sums_ref: Any, delta_ref: Any, d_ref: Any, dk_ref: Any, dv_ref: Any, *, scale: float, block_q: int
                ) -> None:
  i = pl.program_id(0)
  k, v = k_ref[...], v_ref[...]
  keys = i * k.shape[0] + jnp.arange(k.shape[0])

  def body(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    dk, dv = carry
    here = pl.ds(j * block_q, block_q)
    q, d = q_ref[here, :], d_ref[here, :]
    start, end, sums, delta = (ref[here] for ref in (start_ref, end_ref, sums_ref, delta_ref))
    scores = triton.dot(k, q.T) * (scale * _LOG2E)  # [keys, queries], so that no product needs it transposed
    seen = (keys[:, None] >= start[None]) & (keys[:, None] < end[None])
    weights = jnp.where(seen, jnp.exp2(scores - sums[None]), 0.0)
    dv += triton.dot(weights.astype(d.dtype), d)
    d_scores = weights * (triton.dot(v, d.T) - delta[None]) * scale
    return dk + triton.dot(d_scores.astype(q.dtype), q), dv

  zeros = jnp.zeros(k.shape, jnp.float32)
  dk, dv = jax.lax.fori_loop(first_ref[i], last_ref[i], body, (zeros, zeros))
  dk_ref[...] = dk.astype(dk_ref.dtype)
  dv_ref[...] = dv.astype(dv_ref.dtype)
