"""Attention over intervals for TPUs, without L x M matrices: Pallas kernels for Mosaic.

FlashAttention (Dao 2023, arXiv:2307.08691) as it suits a TPU: softmax in float32 block by block, backward from the
saved log-sum in one kernel that holds the gradient of a row's queries in vector memory, so that scores are computed
once. Blocks of keys that no query of a block sees are neither copied nor computed. Scores lie [keys, queries]: what
belongs to a query lies along lanes, and softmax runs over sublanes.

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
from glmjax.target import mosaic

# Most queries and keys of a block. The float32 scores of a block, and what is made of them, must fit the vector memory
# of a v4 (16 MiB).
_FORWARD = (1024, 512)
_BACKWARD = (512, 512)
_QUERIES = 4096  # whose gradients lie in vector memory at a time, in float32
BLOCK = 128  # lengths must be multiples of it, and so must the head dimension: lanes

_PLAIN = (((1,), (0,)), ((), ()))  # dimensions of a matrix product
_ROW = (((1,), (1,)), ((), ()))  # dot over both operands' last axes
_COLUMN = (((0,), (0,)), ((), ()))  # and over both first ones

Index = jax.Array | int  # of a block


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
  of = _Blocks(_FORWARD, q_BLHK.shape, k_BMHK.shape[1])
  first, last = flash_blocks.key_range(start_BL, end_BL, of.block_q, of.block_k, of.num_keys)
  lines, rate = flash_blocks.lines(start_BL, end_BL, dropout)
  lines = tuple(map(_along_lanes, lines))

  def query(b: Index, h: Index, i: Index, j: Index, first: Any, last: Any) -> Index:
    return i

  def key(b: Index, h: Index, i: Index, j: Index, first: Any, last: Any) -> Index:
    return _visited(first[b, i] + j, last[b, i])

  out_BHLK, sums_BH1L = pl.pallas_call(
    functools.partial(_forward_kernel, scale=of.width**-0.5, rate=rate),
    grid_spec=mosaic().PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(of.batch, of.heads, of.num_queries // of.block_q, of.num_keys // of.block_k),
      in_specs=[
        of.tokens(of.block_q, query),
        of.tokens(of.block_k, key),
        of.tokens(of.block_k, key),
        of.lines(query, lines),
      ],
      out_specs=[of.tokens(of.block_q, query), of.line(query)],
      scratch_shapes=[
        mosaic().VMEM((of.width, of.block_q), jnp.float32),
        mosaic().VMEM((1, of.block_q), jnp.float32),
        mosaic().VMEM((1, of.block_q), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((of.batch, of.heads, of.num_queries, of.width), q_BLHK.dtype),
      jax.ShapeDtypeStruct((of.batch, of.heads, 1, of.num_queries), jnp.float32),
    ],
    compiler_params=_params(),
    cost_estimate=of.cost(2, k_BMHK.dtype.itemsize),
    interpret=interpret,
    name="flash_forward",
  )(first, last, *map(_heads_first, (q_BLHK, k_BMHK, v_BMHK)), lines)
  return _heads_first(out_BHLK), sums_BH1L[:, :, 0]


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
  del target  # one size of blocks for all
  parts = []
  for at in range(0, q_BLHK.shape[1], _QUERIES):
    here = slice(at, at + _QUERIES)
    part = dropout and dropout._replace(seeds=dropout.seeds[:, :, here])
    places = start_BL[:, here], end_BL[:, here]
    sums = sums_BHL[:, :, here], delta_BHL[:, :, here]
    parts.append(_backward((q_BLHK[:, here], k_BMHK, v_BMHK, *places, *sums, d_BLHK[:, here]), part, interpret))
  if len(parts) == 1:
    return parts[0]
  dq, dk, dv = zip(*parts)
  dk, dv = (sum(x.astype(jnp.float32) for x in each).astype(k_BMHK.dtype) for each in (dk, dv))
  return jnp.concatenate(dq, 1), dk, dv


def _backward(
  arrays: tuple[jax.Array, ...], dropout: dropout_lib.Dropout | None, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns gradients for queries that fit vector memory; `arrays`: q, k, v and so on, as `backward` takes them."""
  q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL, sums_BHL, delta_BHL, d_BLHK = arrays
  of = _Blocks(_BACKWARD, q_BLHK.shape, k_BMHK.shape[1])
  first, last = flash_blocks.query_range(start_BL, end_BL, of.block_q, of.block_k, of.num_keys)
  lines, rate = flash_blocks.lines(start_BL, end_BL, dropout)
  lines = tuple(map(_along_lanes, lines))

  def query(b: Index, h: Index, j: Index, i: Index, first: Any, last: Any) -> Index:
    return _visited(first[b, j] + i, last[b, j])

  def key(b: Index, h: Index, j: Index, i: Index, first: Any, last: Any) -> Index:
    return j

  blocks = of.num_queries // of.block_q
  gradients = pl.pallas_call(
    functools.partial(_backward_kernel, scale=of.width**-0.5, rate=rate),
    grid_spec=mosaic().PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(of.batch, of.heads, of.num_keys // of.block_k, blocks),
      in_specs=[
        of.tokens(of.block_q, query),
        of.tokens(of.block_k, key),
        of.tokens(of.block_k, key),
        of.lines(query, lines),
        of.line(query),
        of.line(query),
        of.tokens(of.block_q, query),
      ],
      out_specs=[of.tokens(of.num_queries, lambda *_: 0), of.tokens(of.block_k, key), of.tokens(of.block_k, key)],
      scratch_shapes=[
        mosaic().VMEM((blocks, of.width, of.block_q), jnp.float32),
        *[mosaic().VMEM((of.block_k, of.width), jnp.float32)] * 2,
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((of.batch, of.heads, size, of.width), q_BLHK.dtype)
      for size in (of.num_queries, of.num_keys, of.num_keys)
    ],
    compiler_params=_params(),
    cost_estimate=of.cost(5, k_BMHK.dtype.itemsize),
    interpret=interpret,
    name="flash_backward",
  )(
    first,
    last,
    *map(_heads_first, (q_BLHK, k_BMHK, v_BMHK)),
    lines,
    *map(_along_lanes, (sums_BHL, delta_BHL)),
    _heads_first(d_BLHK),
  )
  return tuple(map(_heads_first, gradients))


def _params() -> Any:
  """Lets a core have its own rows and heads; the blocks of one head are visited in turn."""
  return mosaic().CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"))


def _heads_first(x: jax.Array) -> jax.Array:
  """Turns [B, L, H, K] into [B, H, L, K] and back: the compiler lays arrays out so, and copies nothing."""
  return jnp.swapaxes(x, 1, 2)


def _along_lanes(x: jax.Array) -> jax.Array:
  """Lays out [..., L] so that blocks can be cut of it."""
  return x[..., None, :]


def _visited(block: jax.Array, last: jax.Array) -> jax.Array:
  """Returns the block that a turn reads; behind the last one it stays, so that nothing is copied."""
  return jnp.maximum(jnp.minimum(block, last - 1), 0)


class _Blocks:
  """Sizes of the arrays and of the blocks that a turn reads."""

  def __init__(self, most: tuple[int, int], q_shape: tuple[int, ...], num_keys: int):
    self.batch, self.num_queries, self.heads, self.width = q_shape
    self.num_keys = num_keys
    self.block_q, self.block_k = (
      next(n for n in range(min(size, length), 0, -BLOCK) if length % n == 0)
      for size, length in zip(most, (self.num_queries, num_keys))
    )

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

  def tokens(self, block: int, index: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, block, self.width), lambda b, h, *at: (b, h, index(b, h, *at), 0))

  def line(self, index: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, 1, self.block_q), lambda b, h, *at: (b, h, 0, index(b, h, *at)))

  def lines(self, index: Any, lines: tuple[jax.Array, ...]) -> tuple[pl.BlockSpec, ...]:
    """Reads this block's lines of what `_along_lanes` gives."""
    of_all_heads = pl.BlockSpec((None, 1, self.block_q), lambda b, h, *at: (b, 0, index(b, h, *at)))
    return tuple(of_all_heads if line.ndim == 3 else self.line(index) for line in lines)


def _dot(a: jax.Array, b: jax.Array, dimensions: Any = _PLAIN) -> jax.Array:
  """Multiplies in float32; what jax.default_matmul_precision may ask for, Mosaic takes with float32 operands alone."""
  precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _scores(
  q: jax.Array, k: jax.Array, lines: tuple[jax.Array, ...], block: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Returns scores [keys, queries] to the base 2, and the keys' places [keys, 1]."""
  start, end = lines[:2]
  keys = block * k.shape[0] + jax.lax.broadcasted_iota(jnp.int32, (k.shape[0], 1), 0)
  scores = _dot(k, q, _ROW) * (scale * LOG2E)
  return jnp.where((keys >= start) & (keys < end), scores, UNSEEN), keys


def _forward_kernel(
  first_ref: Any,
  last_ref: Any,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  line_refs: tuple[Any, ...],
  out_ref: Any,
  sums_ref: Any,
  acc_ref: Any,
  high_ref: Any,
  total_ref: Any,
  *,
  scale: float,
  rate: float,
) -> None:
  row, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  block = first_ref[row, i] + j

  @pl.when(j == 0)
  def _() -> None:
    acc_ref[...] = jnp.zeros_like(acc_ref)
    high_ref[...] = jnp.full_like(high_ref, LOW)
    total_ref[...] = jnp.zeros_like(total_ref)

  @pl.when(block < last_ref[row, i])
  def _() -> None:
    lines, v, high = [ref[...] for ref in line_refs], v_ref[...], high_ref[...]
    scores, keys = _scores(q_ref[...], k_ref[...], lines, block, scale)
    new_high = jnp.maximum(high, scores.max(0, keepdims=True))
    weights = jnp.exp2(scores - new_high)
    shrink = jnp.exp2(high - new_high)
    high_ref[...] = new_high
    total_ref[...] = total_ref[...] * shrink + weights.sum(0, keepdims=True)
    if rate:
      weights = jnp.where(dropout_lib.keep(rate, lines[2], keys), weights, 0.0)
    acc_ref[...] = acc_ref[...] * shrink + _dot(v, weights.astype(v.dtype), _COLUMN)

  @pl.when(j == pl.num_programs(3) - 1)
  def _() -> None:
    total = jnp.maximum(total_ref[...], LEAST)
    out_ref[...] = (acc_ref[...] / (total * (1 - rate))).T.astype(out_ref.dtype)
    sums_ref[...] = high_ref[...] + jnp.log2(total)


def _backward_kernel(
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
  dk_ref: Any,
  dv_ref: Any,
  dq_acc: Any,
  dk_acc: Any,
  dv_acc: Any,
  *,
  scale: float,
  rate: float,
) -> None:
  row, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  block, last_turn = first_ref[row, j] + i, i == pl.num_programs(3) - 1

  @pl.when((j == 0) & (i == 0))
  def _() -> None:
    dq_acc[...] = jnp.zeros_like(dq_acc)

  @pl.when(i == 0)
  def _() -> None:
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)

  @pl.when(block < last_ref[row, j])
  def _() -> None:
    lines, q, k, d = [ref[...] for ref in line_refs], q_ref[...], k_ref[...], d_ref[...]
    scores, keys = _scores(q, k, lines, j, scale)
    weights = jnp.exp2(scores - sums_ref[...])
    d_weights = _dot(v_ref[...], d, _ROW)
    dropped = weights
    if rate:
      kept = dropout_lib.keep(rate, lines[2], keys)
      dropped = jnp.where(kept, weights, 0.0)
      d_weights = jnp.where(kept, d_weights * (1 / (1 - rate)), 0.0)
    dv_acc[...] += _dot(dropped.astype(d.dtype), d)
    d_scores = (weights * (d_weights - delta_ref[...]) * scale).astype(q.dtype)
    dk_acc[...] += _dot(d_scores, q)
    dq_acc[block] += _dot(k, d_scores, _COLUMN)

  @pl.when(last_turn)
  def _() -> None:
    dk_ref[...] = dk_acc[...].astype(dk_ref.dtype)
    dv_ref[...] = (dv_acc[...] * (1 / (1 - rate))).astype(dv_ref.dtype)

  @pl.when(last_turn & (j == pl.num_programs(2) - 1))
  def _() -> None:
    for part in range(dq_acc.shape[0]):
      dq_ref[part * dq_acc.shape[2] : (part + 1) * dq_acc.shape[2], :] = dq_acc[part].T.astype(dq_ref.dtype)
