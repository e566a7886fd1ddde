"""What the C++ library of products on CPUs computes (product.py), by XLA alone: for machines without a compiler.

Codes are multiplied as integers, whose sums are exact, whatever rows are computed together. A few rows that stay floats
become whole numbers of the row's unit, of as many digits as they have bits: float32's 24 three, bfloat16's two, so that
the unit is the largest magnitude / 32,385, below what rounding rows to bfloat16 has cost already. More rows are
multiplied as floats.

What XLA's CPU must be kept from (all of jax 0.10.2):

- Of one row it copies all the weights as floats, and of codes that are unpacked for a product all the codes. Some
  outputs are taken at a time, whose copy stays in the cache, and two rows or more (`_by_blocks`).
- A row of codes is multiplied and summed without a product (`_one_row`), in loops that the compiler turns into vector
  instructions: a few products make sums of 16 bits, these sums of 32. A sum over an axis longer than 32 would be cut
  into parts that are written to memory: the axis is split.
- What does not change in a loop over tokens is computed before it, for all layers: unpacked codes. The barriers tie
  weights to rows.

R rows, I inputs, O outputs, G groups of inputs that have scales of their own, P digits.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_BASE = 255  # of digits from -127 to 127: 127 x 255 x 255 is the largest number of three, and below 2^23
_FEW = 8  # rows: of more, floats' products are faster than three digits'
_BLOCK = 2**22  # weights at a time: their floats stay in the cache
_LEAST = 2.0**-100  # rows whose largest magnitude is below count as zeros: their digits' scale would not be normal
_MOST_INPUTS = 2**17  # of a group, whose sums of digits times codes stay below 2^31
_LANES, _TOGETHER = 32, 4  # numbers side by side, and how many such lines are summed before others
_MOST_AXIS = 32  # the longest that XLA sums in one go


def product(x_RI: jax.Array, weight: jax.Array, scale_GO: jax.Array, bits: int, fast: bool) -> jax.Array:
  """Returns what product.product returns, of the same arguments; float32 [R, O]."""
  groups, inputs = scale_GO.shape[0], x_RI.shape[1]
  x_RI, weight = jax.lax.optimization_barrier((x_RI, weight))
  if inputs // groups > _MOST_INPUTS or (len(x_RI) > _FEW and not fast):
    return _scaled(_sums_of_codes(_parts(x_RI, bits), weight, groups, bits), scale_GO)
  axes = _axes(weight.shape[1] // groups, bits) if len(x_RI) == 1 else None
  kind = jnp.int8 if axes is None else jnp.int16
  count = 1 if fast else 3 if x_RI.dtype == jnp.float32 else 2
  digits, unit_R = _digits(x_RI.astype(jnp.float32), count, bits, kind)
  if axes is None:
    sums_PRGO = _sums_of_codes(digits, weight, groups, bits)
  else:
    sums_PRGO = _one_row(digits, weight, (groups, *axes), bits)
  sums_RGO = functools.reduce(lambda total, digit: total * _BASE + digit, sums_PRGO.astype(jnp.float32))
  return _scaled(sums_RGO, scale_GO) * unit_R[:, None]


def float_product(x_RI: jax.Array, weight_OI: jax.Array) -> jax.Array:
  """Returns what product.float_product returns, of the same arguments; float32 [R, O]."""
  if weight_OI.dtype == jnp.float32:
    return _dot(x_RI.astype(jnp.float32), weight_OI)
  x_RI, weight_OI = jax.lax.optimization_barrier((x_RI, weight_OI))
  dtype = x_RI.dtype

  def of(block: jax.Array) -> jax.Array:
    return _dot(_two(x_RI), _floats(block, dtype))

  return _by_blocks(of, x_RI, weight_OI, weight_OI.shape[1])[: len(x_RI)]


def _floats(weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  if weight.dtype == jnp.uint16:
    weight = jax.lax.bitcast_convert_type(weight, jnp.bfloat16)
  return weight.astype(dtype)


def _two(x_RI: jax.Array) -> jax.Array:
  """Returns one row twice, several as they are."""
  return jnp.broadcast_to(x_RI, (2, *x_RI.shape[1:])) if len(x_RI) == 1 else x_RI


def _dot(x_RI: jax.Array, weight_OI: jax.Array) -> jax.Array:
  kind = jnp.int32 if x_RI.dtype == jnp.int8 else jnp.float32
  return jax.lax.dot_general(x_RI, weight_OI, (((1,), (1,)), ((), ())), preferred_element_type=kind)


def _digits(
  x_RI: jax.Array, count: int, bits: int, dtype: jax.typing.DTypeLike
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Returns the digits of each row, [P, R, ...] for `_unpacked` codes, the most significant first, and its unit, [R].

  Of rows that are not finite, the digits are zeros and the unit is a NaN.
  """
  largest_R = jnp.abs(x_RI).max(1)
  most = 127 * _BASE ** (count - 1)
  is_finite_R = jnp.isfinite(x_RI).all(1)  # the largest may leave out a NaN

  def of(x_RI: jax.Array, largest_R: jax.Array) -> tuple[jax.Array, ...]:
    factor_R = jnp.where(largest_R < _LEAST, 0, most / jnp.maximum(largest_R, _LEAST))
    rest_RI = jnp.round(x_RI * factor_R[:, None]).astype(jnp.int32)
    digits = []
    for _ in range(count - 1):
      higher_RI = jnp.floor_divide(rest_RI + _BASE // 2, _BASE)
      digits.append(rest_RI - higher_RI * _BASE)
      rest_RI = higher_RI
    return _parts(jnp.stack([*digits, rest_RI][::-1]).astype(dtype), bits)

  def of_finite(x_RI: jax.Array, largest_R: jax.Array) -> tuple[jax.Array, ...]:
    return of(jnp.where(is_finite_R[:, None], x_RI, 0), jnp.where(is_finite_R, largest_R, 0))

  # Two ways, so that digits are numbers in memory: XLA would compute them again for each output.
  digits = jax.lax.cond(is_finite_R.all(), of, of_finite, x_RI, largest_R)
  unit_R = jnp.where(largest_R < _LEAST, 0, largest_R * np.float32(1 / most))
  return digits, jnp.where(is_finite_R, unit_R, jnp.nan)


def _axes(count: int, bits: int) -> tuple[int, ...] | None:
  """Returns into which axes `_one_row` splits so many bytes of codes; None where it cannot."""
  if count % (_TOGETHER * _LANES):
    return None
  rest, axes = count // (_TOGETHER * _LANES), []
  while rest > 1:
    size = max(size for size in range(1, _MOST_AXIS + 1) if rest % size == 0)
    if size == 1:
      return None
    axes.insert(0, size)
    rest //= size
  return *axes, _TOGETHER, _LANES


def _one_row(digits: tuple[jax.Array, ...], weight: jax.Array, axes: tuple[int, ...], bits: int) -> jax.Array:
  """Returns the sums of one row's digits times codes, int32 [P, 1, G, O]; `axes`: G and what a group's bytes become."""
  parts = [part.reshape(len(part), *axes) for part in digits]
  codes = weight.reshape(len(weight), *axes)
  most = 2 if bits == 8 else _TOGETHER  # products, or pairs of them, of which 16 bits hold the sum
  sums = [0] * len(parts[0])
  for first in range(0, _TOGETHER, most):
    short = [0] * len(sums)
    for k in range(first, first + most):
      some = _unpacked(codes[..., k, :].astype(jnp.int16), bits)
      for p in range(len(sums)):
        short[p] += sum(c * part[p, ..., k, :] for c, part in zip(some, parts))
    sums = [total + each.astype(jnp.int32) for total, each in zip(sums, short)]
  found = jax.lax.reduce(
    tuple(sums), (np.int32(0),) * len(sums), lambda a, b: tuple(map(jnp.add, a, b)), tuple(range(2, sums[0].ndim))
  )
  return jnp.stack([each_OG.T for each_OG in found])[:, None]


def _parts(x: jax.Array, bits: int) -> tuple[jax.Array, ...]:
  """Returns the last axis's even and odd entries for codes of 4 bits, x itself for those of 8."""
  return (x,) if bits == 8 else (x[..., 0::2], x[..., 1::2])


def _unpacked(codes: jax.Array, bits: int) -> tuple[jax.Array, ...]:
  """Returns the codes for `_parts`, sign-extended, in the integer type that bytes of them come in."""
  above = np.array(8 * codes.dtype.itemsize - 4, codes.dtype)
  return (codes,) if bits == 8 else (codes >> np.array(4, codes.dtype), (codes << above) >> above)


def _sums_of_codes(parts: tuple[jax.Array, ...], weight: jax.Array, groups: int, bits: int) -> jax.Array:
  """Returns the sums of rows times codes, [..., G, O]; `parts`: the rows for `_unpacked` codes, in the type of both."""
  leading, dtype = parts[0].shape[:-1], parts[0].dtype
  rows = [_two(part.reshape(-1, part.shape[-1])) for part in parts]
  grouped = [part.reshape(len(part), groups, -1) for part in rows]

  def of(block: jax.Array) -> jax.Array:
    codes = [part.astype(dtype).reshape(len(block), groups, -1) for part in _unpacked(block, bits)]
    sums = [sum(_dot(x[:, g], c[:, g]) for x, c in zip(grouped, codes)) for g in range(groups)]
    return jnp.stack(sums, 1)

  found = _by_blocks(of, rows[0], weight, weight.shape[1] * 8 // bits)
  return found[: math.prod(leading)].reshape(*leading, groups, len(weight))


def _scaled(sums_RGO: jax.Array, scale_GO: jax.Array) -> jax.Array:
  """Returns the groups' sums times scales, summed in one order however many rows there are."""
  return sum(sums_RGO[:, g] * scale_GO[g].astype(jnp.float32) for g in range(len(scale_GO)))


def _by_blocks(of: Callable[[jax.Array], jax.Array], x: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
  """Returns of(weight) for a function of x and of rows of the weight that gives [..., O], computed of some at a time.

  The last of them are computed with some of those before, so that all blocks are alike.
  """
  outputs, size = len(weight), max(1, min(len(weight), _BLOCK // inputs))
  if size == outputs:
    return of(weight)
  like = jax.eval_shape(of, jax.ShapeDtypeStruct((size, *weight.shape[1:]), weight.dtype))

  def add(i: jax.Array, found: jax.Array) -> jax.Array:
    first = jnp.minimum(i * size, outputs - size)
    block = of(jax.lax.dynamic_slice_in_dim(weight, first, size))
    return jax.lax.dynamic_update_slice_in_dim(found, block, first, found.ndim - 1)

  # Any number will do, but one of x: XLA would make all layers' constants first, and keep them.
  begin = jnp.full((*like.shape[:-1], outputs), x.ravel()[0].astype(like.dtype))
  return jax.lax.fori_loop(0, -(-outputs // size), add, begin)
