"""Attention over intervals for NVIDIA GPUs from Ampere on, without L x M matrices: Pallas kernels for Triton.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): softmax in float32 block by block, backward from the saved log-sum.
A block of queries reads only the blocks of keys that one of its intervals meets, so that causal rows cost half and
packed samples less.

B batch, L query length, M key length, H heads, K head dimension.
"""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import dropout as dropout_lib
from glmjax.kernels import flash_blocks
from glmjax.kernels.flash_blocks import LEAST, LOG2E, LOW, UNSEEN
from glmjax.target import triton

# Queries and keys of a block, warps, stages of the loop: fastest on an H100 at K = 128 (benchmarks/kernels.py).
_FORWARD = (64, 32, 4, 3)
_KEYS = (64, 64, 4, 2)  # of the kernel for the gradients of keys and values
_QUERIES = (128, 64, 8, 3)  # of that for queries
_QUERIES_SMALL = (128, 64, 8, 2)  # the same in 99 KiB of shared memory
_DECODE = (16, 128, 4, 2)  # of one new query: its copies, and the keys of a part
BLOCK = 128  # lengths must be multiples of it
DECODE_BLOCK = _DECODE[1]  # and so must a cache's slots, of this


def forward(
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  dropout: dropout_lib.Dropout | None = None,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Returns what `attention.attend` does, and the float32 [B, H, L] base-2 logarithms of the softmax's sums."""
  of = _Blocks(*_FORWARD[:2], q_BLHK.shape, k_BMHK.shape[1])
  return _call_forward(
    of,
    _FORWARD,
    of.query(),
    of.all_keys(),
    jax.ShapeDtypeStruct(q_BLHK.shape, q_BLHK.dtype),
    (q_BLHK, k_BMHK, v_BMHK),
    (start_BL, end_BL),
    dropout,
    interpret,
  )


def decode(
  q_B1HK: jax.Array,
  k_BHMK: jax.Array,
  v_BHMK: jax.Array,
  start_B1: jax.Array,
  end_B1: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Computes `attention.attend` of one query a row, [B, 1, H, K], over keys in the cache's own layout.

  Each part of P keys is attended to apart, so that the whole machine reads them, and the parts are then weighed by
  their sums.
  """
  copies, block_k = _DECODE[:2]  # of the query, as many as tensor cores take at least
  batch, _, heads, width = q_B1HK.shape
  parts = k_BHMK.shape[2] // block_k
  edges = jnp.repeat(jnp.arange(parts, dtype=jnp.int32) * block_k, copies)
  of = _Blocks(copies, block_k, (batch, parts * copies, heads, width), k_BHMK.shape[2])
  out_BLHK, sums_BHL = _call_forward(
    of,
    _DECODE,
    of.same_query(),
    of.all_keys_of_a_head(),
    jax.ShapeDtypeStruct((batch, parts * copies, heads, width), jnp.float32),
    (jnp.repeat(q_B1HK, copies, axis=1), k_BHMK, v_BHMK),
    (jnp.maximum(start_B1, edges), jnp.minimum(end_B1, edges + block_k)),
    None,
    interpret,
  )
  weights_BHP = jax.nn.softmax(sums_BHL[:, :, ::copies] / LOG2E, axis=-1)
  out_BHK = (jnp.swapaxes(out_BLHK[:, ::copies], 1, 2) * weights_BHP[..., None]).sum(2)
  return out_BHK[:, None].astype(q_B1HK.dtype)


def _call_forward(
  of: "_Blocks",
  sizes: tuple[int, ...],
  query: pl.BlockSpec,
  keys: pl.BlockSpec,
  out: jax.ShapeDtypeStruct,
  inputs: tuple[jax.Array, ...],
  places: tuple[jax.Array, jax.Array],
  dropout: dropout_lib.Dropout | None,
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  block_q, block_k, warps, stages = sizes
  first, last = flash_blocks.key_range(*places, block_q, block_k, of.num_keys)
  lines, rate = flash_blocks.lines(*places, dropout)
  return pl.pallas_call(
    functools.partial(_forward_kernel, scale=of.width**-0.5, rate=rate, block_k=block_k),
    grid=(of.num_queries // block_q, of.heads, of.batch),
    in_specs=[of.ranges(first), of.ranges(last), query, keys, keys, of.lines(lines)],
    out_specs=[of.query(), of.sums()],
    out_shape=[out, jax.ShapeDtypeStruct((of.batch, of.heads, of.num_queries), jnp.float32)],
    compiler_params=triton().CompilerParams(num_warps=warps, num_stages=stages),
    cost_estimate=of.cost(2, inputs[1].dtype.itemsize),
    interpret=interpret,
    name="flash_forward",
  )(first, last, *inputs, lines)


def backward(
  target: target_lib.Target,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  sums_BHL: jax.Array,
  delta_BHL: jax.Array,
  d_BLHK: jax.Array,
  dropout: dropout_lib.Dropout | None = None,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns gradients of q, k and v; delta is the sum over K of the output times its gradient d, float32."""
  lines, rate = flash_blocks.lines(start_BL, end_BL, dropout)
  inputs = q_BLHK, k_BMHK, v_BMHK, lines, sums_BHL, delta_BHL, d_BLHK
  constants = {"scale": q_BLHK.shape[-1] ** -0.5, "rate": rate}
  call = functools.partial(pl.pallas_call, interpret=interpret)
  block_q, block_k, warps, stages = _QUERIES if "large_shared_memory" in target.features else _QUERIES_SMALL
  of = _Blocks(block_q, block_k, q_BLHK.shape, k_BMHK.shape[1])
  first, last = flash_blocks.key_range(start_BL, end_BL, block_q, block_k, k_BMHK.shape[1])
  dq_BLHK = call(
    functools.partial(_query_kernel, **constants, block_k=block_k),
    grid=(of.num_queries // block_q, of.heads, of.batch),
    in_specs=[
      of.ranges(first),
      of.ranges(last),
      of.query(),
      of.all_keys(),
      of.all_keys(),
      of.lines(lines),
      of.sums(),
      of.sums(),
      of.query(),
    ],
    out_specs=of.query(),
    out_shape=jax.ShapeDtypeStruct(q_BLHK.shape, q_BLHK.dtype),
    compiler_params=triton().CompilerParams(num_warps=warps, num_stages=stages),
    cost_estimate=of.cost(3, k_BMHK.dtype.itemsize),
    name="flash_dq",
  )(first, last, *inputs)
  block_q, block_k, warps, stages = _KEYS
  of = _Blocks(block_q, block_k, q_BLHK.shape, k_BMHK.shape[1])
  first, last = flash_blocks.query_range(start_BL, end_BL, block_q, block_k, k_BMHK.shape[1])
  dk_BMHK, dv_BMHK = call(
    functools.partial(_key_kernel, **constants, block_q=block_q),
    grid=(of.num_keys // block_k, of.heads, of.batch),
    in_specs=[
      of.ranges(first),
      of.ranges(last),
      of.all_queries(),
      of.key(),
      of.key(),
      of.all_lines(lines),
      of.all_sums(),
      of.all_sums(),
      of.all_queries(),
    ],
    out_specs=[of.key(), of.key()],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BMHK, v_BMHK)],
    compiler_params=triton().CompilerParams(num_warps=warps, num_stages=stages),
    cost_estimate=of.cost(4, k_BMHK.dtype.itemsize),
    name="flash_dkv",
  )(first, last, *inputs)
  return dq_BLHK, dk_BMHK, dv_BMHK


class _Blocks:
  """Blocks of the arrays, which say what part each program reads; the grid is (block, head, row)."""

  def __init__(self, block_q: int, block_k: int, q_shape: tuple[int, ...], num_keys: int):
    self.batch, self.num_queries, self.heads, self.width = q_shape
    self.num_keys, self.block_q, self.block_k = num_keys, block_q, block_k

  def cost(self, products: int, itemsize: int) -> pl.CostEstimate:
    """Estimates the cost of so many products of queries and keys, all of them visible, every array read or written
    once.
    """
    pairs, tokens = self.num_queries * self.num_keys, self.num_queries + self.num_keys
    rows = self.batch * self.heads
    return pl.CostEstimate(
      flops=2 * products * rows * pairs * self.width,
      transcendentals=rows * pairs,
      bytes_accessed=2 * rows * tokens * self.width * itemsize,
    )

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

  def lines(self, lines: tuple[jax.Array, ...]) -> tuple[pl.BlockSpec, ...]:
    """Reads this block's lines of what `flash_blocks.lines` gives: [B, L], or [B, H, L] of each head."""
    place = pl.BlockSpec((None, self.block_q), lambda i, h, b: (b, i))
    return tuple(place if line.ndim == 2 else self.sums() for line in lines)

  def all_lines(self, lines: tuple[jax.Array, ...]) -> tuple[pl.BlockSpec, ...]:
    place = pl.BlockSpec((None, self.num_queries), lambda i, h, b: (b, 0))
    return tuple(place if line.ndim == 2 else self.all_sums() for line in lines)

  def sums(self) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, self.block_q), lambda i, h, b: (b, h, i))

  def all_sums(self) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, self.num_queries), lambda i, h, b: (b, h, 0))

  def ranges(self, of: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, of.shape[1]), lambda i, h, b: (b, 0))


def _masked(scores: jax.Array, keys: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
  """Masks scores of queries and keys, whose places broadcast."""
  return jnp.where((keys >= start) & (keys < end), scores, UNSEEN)


def _forward_kernel(
  first_ref: Any,
  last_ref: Any,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  line_refs: tuple[Any, ...],
  out_ref: Any,
  sums_ref: Any,
  *,
  scale: float,
  rate: float,
  block_k: int,
) -> None:
  i = pl.program_id(0)
  q, lines = q_ref[...], [ref[...][:, None] for ref in line_refs]
  block_q, width = q.shape

  def body(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    out, high, total = carry
    here = pl.ds(j * block_k, block_k)
    keys = (j * block_k + jnp.arange(block_k))[None]
    scores = _masked(triton().dot(q, k_ref[here, :].T) * (scale * LOG2E), keys, *lines[:2])
    new_high = jnp.maximum(high, scores.max(-1))
    weights = jnp.exp2(scores - new_high[:, None])
    shrink = jnp.exp2(high - new_high)
    total = total * shrink + weights.sum(-1)
    if rate:
      weights = jnp.where(dropout_lib.keep(rate, lines[2], keys), weights, 0.0)
    v = v_ref[here, :]
    return out * shrink[:, None] + triton().dot(weights.astype(v.dtype), v), new_high, total

  out, high, total = jax.lax.fori_loop(
    first_ref[i],
    last_ref[i],
    body,
    (jnp.zeros((block_q, width), jnp.float32), jnp.full(block_q, LOW, jnp.float32), jnp.zeros(block_q, jnp.float32)),
  )
  total = jnp.maximum(total, LEAST)
  out_ref[...] = (out / (total * (1 - rate))[:, None]).astype(out_ref.dtype)
  sums_ref[...] = high + jnp.log2(total)


def _query_kernel(
  first_ref: Any,
  last_ref: Any,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  line_refs: tuple[Any, ...],
  sums_ref: Any,
  delta_ref: Any,
  d_ref: Any,
  dq_ref: Any,
  *,
  scale: float,
  rate: float,
  block_k: int,
) -> None:
  i = pl.program_id(0)
  q, d, lines = q_ref[...], d_ref[...], [ref[...][:, None] for ref in line_refs]
  sums, delta = sums_ref[...][:, None], delta_ref[...][:, None]

  def body(j: jax.Array, dq: jax.Array) -> jax.Array:
    here = pl.ds(j * block_k, block_k)
    k, v = k_ref[here, :], v_ref[here, :]
    keys = (j * block_k + jnp.arange(block_k))[None]
    scores = _masked(triton().dot(q, k.T) * (scale * LOG2E), keys, *lines[:2])
    d_weights = triton().dot(d, v.T)
    if rate:
      d_weights = jnp.where(dropout_lib.keep(rate, lines[2], keys), d_weights * (1 / (1 - rate)), 0.0)
    d_scores = jnp.exp2(scores - sums) * (d_weights - delta) * scale
    return dq + triton().dot(d_scores.astype(k.dtype), k)

  dq = jax.lax.fori_loop(first_ref[i], last_ref[i], body, jnp.zeros(q.shape, jnp.float32))
  dq_ref[...] = dq.astype(dq_ref.dtype)


def _key_kernel(
  first_ref: Any,
  last_ref: Any,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  line_refs: tuple[Any, ...],
  sums_ref: Any,
  delta_ref: Any,
  d_ref: Any,
  dk_ref: Any,
  dv_ref: Any,
  *,
  scale: float,
  rate: float,
  block_q: int,
) -> None:
  i = pl.program_id(0)
  k, v = k_ref[...], v_ref[...]
  keys = (i * k.shape[0] + jnp.arange(k.shape[0]))[:, None]

  def body(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    dk, dv = carry
    here = pl.ds(j * block_q, block_q)
    q, d, lines = q_ref[here, :], d_ref[here, :], [ref[here][None] for ref in line_refs]
    # [keys, queries], so that no product needs it transposed.
    scores = _masked(triton().dot(k, q.T) * (scale * LOG2E), keys, *lines[:2])
    weights = jnp.exp2(scores - sums_ref[here][None])
    d_weights, dropped = triton().dot(v, d.T), weights
    if rate:
      kept = dropout_lib.keep(rate, lines[2], keys)
      d_weights, dropped = jnp.where(kept, d_weights * (1 / (1 - rate)), 0.0), jnp.where(kept, weights, 0.0)
    dv += triton().dot(dropped.astype(d.dtype), d)
    d_scores = weights * (d_weights - delta_ref[here][None]) * scale
    return dk + triton().dot(d_scores.astype(q.dtype), q), dv

  zeros = jnp.zeros(k.shape, jnp.float32)
  dk, dv = jax.lax.fori_loop(first_ref[i], last_ref[i], body, (zeros, zeros))
  dk_ref[...] = dk.astype(dk_ref.dtype)
  dv_ref[...] = (dv * (1 / (1 - rate))).astype(dv_ref.dtype)
