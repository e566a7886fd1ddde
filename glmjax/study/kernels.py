"""How a model's kernels are spread, and what rounding changes of them: the figures of each, read block by block.

GLM-130B's paper asks so why its weights bear INT4 (Fig. 5, Table 10, appendix B.8). A block is at most
stored_weights.ELEMENTS numbers of one layer's kernel, and is read twice: for the moments, and for what is counted in
units of them. I inputs of a kernel, O outputs.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from glmjax import errors
from glmjax.checkpoint import blocks
from glmjax.checkpoint import source as source_lib
from glmjax.checkpoint import stored_weights
from glmjax.io import paths
from glmjax.io import progress
from glmjax.models import params as params_lib
from glmjax.quantize import qarray

OUTLIER = 6.0  # standard deviations from the mean; of normal values two in a thousand million are as far out
WIDTH, REACH = 0.25, 32.0  # of a histogram's bins, and up to where, in units of the kernel's rms
KINDS = ("attention/qkv", "attention/out", "mlp/wi", "mlp/wo", "embedding/table", "head")
_PART = 1 << 20  # numbers that are float64 at a time


@dataclasses.dataclass(frozen=True)
class Scheme:
  """A way to round kernels: symmetric absmax codes, as `qarray.quantize` has them."""

  bits: int
  group: int | None = None  # how many inputs of an output share a scale; None: all, the scheme of GLM-130B

  @property
  def label(self) -> str:
    """What people call it."""
    return f"INT{self.bits} rows" if self.group is None else f"INT{self.bits} groups of {self.group}"


SCHEMES = {"int8": Scheme(8), "int4": Scheme(4), "int4_group64": Scheme(4, 64), "int4_group32": Scheme(4, 32)}


@dataclasses.dataclass(frozen=True)
class Kernel:
  """The figures of one layer's kernel, of the embedding's table or of the head.

  Of a kernel whose values are all the same none can be told, and they are 0.
  """

  path: str  # layers_3/mlp/wo
  kind: str  # of KINDS
  count: int  # of its numbers
  rms: float
  kurtosis: float  # excess: 0 of normal values, 3 of Laplace's
  outliers: float  # share of the numbers beyond OUTLIER
  largest: float  # absolute, over the rms
  errors: dict[str, float]  # of each of SCHEMES: ||w - rounded|| / ||w||
  histogram: np.ndarray  # int64: how many lie in each bin, what is beyond REACH in the outermost ones


def bins() -> np.ndarray:
  """Returns the edges of a histogram's bins, in units of the kernel's rms."""
  return np.linspace(-REACH, REACH, 1 + round(2 * REACH / WIDTH))


def kind_of(name: str) -> str | None:
  """Returns the kind of a stored weight, by its name there; None of those that no scheme is for: norms, biases."""
  if name in ("embedding/table", "head/kernel"):
    return name.removesuffix("/kernel")
  param = params_lib.known(name)
  return name.split("/", 1)[1].removesuffix("/kernel") if param.quantizes else None


@functools.partial(jax.jit, static_argnames=("scheme", "inputs"))
def rounded(kernel: jax.Array, scheme: Scheme, inputs: tuple[int, ...]) -> jax.Array:
  """Returns what a scheme makes of one layer's kernel, as floats ("fake quantization").

  Args:
    kernel: in the dtype that it is stored in, as which it is rounded.
    scheme: a row's inputs that are no multiple of its groups leave a smaller one at their end.
    inputs: the kernel's input axes.

  Returns:
    float32, in the kernel's shape.
  """
  first = tuple(range(len(inputs)))
  moved = jnp.moveaxis(kernel, inputs, first)
  x_IO = moved.reshape(math.prod(moved.shape[: len(inputs)]), -1)
  count, outputs = x_IO.shape
  size = scheme.group or count + count % 2  # INT4 packs pairs; zeros change no scale
  groups = jnp.pad(x_IO, ((0, -count % size), (0, 0))).reshape(-1, size, outputs)
  found = qarray.dequantize(qarray.quantize(groups, scheme.bits, (1,)))
  return jnp.moveaxis(found.reshape(-1, outputs)[:count].reshape(moved.shape), first, inputs)


@functools.partial(jax.jit, static_argnames=("scheme", "inputs"))
def _squared_errors(kernel: jax.Array, scheme: Scheme, inputs: tuple[int, ...]) -> jax.Array:
  """Returns the sum over the first axis of what rounding changes, squared."""
  return jnp.square(rounded(kernel, scheme, inputs) - kernel.astype(jnp.float32)).sum(0)


def measure(folder: paths.Named) -> tuple[int | None, list[Kernel]]:
  """Returns the step of a run or an export, and the figures of its kernels, a layer's one after the other.

  Raises:
    errors.InputError: where it is no model's, is quantized already, or does not have finite weights.
  """

  def of(source: source_lib.Source) -> tuple[int | None, list[Kernel]]:
    if source.bits is not None:
      raise errors.InputError(
        f"{folder} is an INT{source.bits} model, rounded already: name the training run or a float export"
      )
    source.check_size()
    return source.step, list(_kernels(source))

  return source_lib.use(folder, of)


def _kernels(source: source_lib.Source) -> Iterator[Kernel]:
  reader = blocks.Reader(source.arrays, source.records)
  kinds = {weight.name: kind_of(weight.name) for weight in source.weights()}
  of_kinds = [weight for weight in source.weights() if kinds[weight.name] is not None]
  total = sum(math.prod(weight.shape) for weight in of_kinds)
  with progress.bar(total=total, unit=" weights", unit_scale=True, desc="weights", disable=None) as bar:
    for weight in of_kinds:
      for layer in range(weight.shape[0] if weight.stacked else 1):
        stored = _Stored(source, reader, weight, layer)
        kernel = figures(stored.path, kinds[weight.name], stored.blocks, stored.inputs)
        bar.update(kernel.count)
        yield kernel
      reader.verify([source.prefix + weight.name])


@dataclasses.dataclass(frozen=True)
class _Stored:
  """One layer's kernel where it is stored."""

  source: source_lib.Source
  reader: blocks.Reader
  weight: stored_weights.StoredWeight
  layer: int

  @property
  def path(self) -> str:
    rest = self.weight.name.removesuffix("/kernel")
    return f"{params_lib.LAYERS}_{self.layer}/{rest.split('/', 1)[1]}" if self.weight.stacked else rest

  @property
  def inputs(self) -> tuple[int, ...]:
    """The input axes of its blocks; of a table those of the head that it may be."""
    param = params_lib.known(self.weight.name)
    axes = param.inputs or (len(param.shape) - 1,)
    return tuple(axis - self.weight.stacked for axis in axes)

  def blocks(self) -> Iterator[np.ndarray]:
    """Reads the kernel block by block, all inputs of some outputs at a time, in the dtype that it is stored in.

    Raises:
      errors.NotFiniteError: naming the array.
    """
    one = dataclasses.replace(self.weight, shape=(1, *self.weight.shape[1:])) if self.weight.stacked else self.weight
    for region in one.regions():
      if self.weight.stacked:
        region = (slice(self.layer, self.layer + 1), *region[1:])
      block = self.reader.read(self.source.prefix + self.weight.name, region)
      stored_weights.check_finite({self.weight.name: block}, f"of {self.source.arrays} is not finite")
      yield block[0] if self.weight.stacked else block


def figures(path: str, kind: str, read: Callable[[], Iterator[np.ndarray]], inputs: tuple[int, ...]) -> Kernel:
  """Returns the figures of a kernel, which is read twice.

  Args:
    path, kind: as Kernel has them.
    read: yields it in blocks that have all of some outputs' inputs.
    inputs: the input axes of a block.
  """
  count, total, squares, largest = 0, 0.0, 0.0, 0.0
  for block in read():
    for x in _parts(block):
      count, total, squares = count + x.size, total + x.sum(), squares + np.square(x).sum()
      largest = max(largest, np.abs(x).max())
  mean, rms = total / count, math.sqrt(squares / count)
  variance = max(squares / count - mean**2, 0.0)
  fourth, outliers, changed = 0.0, 0, dict.fromkeys(SCHEMES, 0.0)
  histogram = np.zeros(len(bins()) - 1, np.int64)
  for block in read():
    for x in _parts(block):
      squared = np.square(x - mean)
      fourth += np.square(squared).sum()
      outliers += int(np.count_nonzero(squared > OUTLIER**2 * variance))
      histogram += np.histogram(np.clip(x / (rms or 1.0), -REACH, REACH), bins())[0]
    for name, scheme in SCHEMES.items():
      sums = _squared_errors(jnp.asarray(block), scheme, inputs)
      changed[name] += float(np.asarray(sums, np.float64).sum())
  is_spread = variance > 1e-12 * rms**2  # else all of it is what the sums were rounded by
  return Kernel(
    path,
    kind,
    count,
    rms,
    kurtosis=float(fourth / count / variance**2 - 3) if is_spread else 0.0,
    outliers=outliers / count if is_spread else 0.0,
    largest=float(largest / rms) if rms else 0.0,
    errors={name: math.sqrt(error / squares) if squares else 0.0 for name, error in changed.items()},
    histogram=histogram,
  )


def _parts(block: np.ndarray) -> Iterator[np.ndarray]:
  """Yields a block's numbers in float64, some at a time."""
  flat = block.reshape(-1)
  for at in range(0, flat.size, _PART):
    yield flat[at : at + _PART].astype(np.float64)


def of_kind(kernels: list[Kernel]) -> dict[str, object]:
  """Returns the figures of one kind's kernels together, those of all layers, for weights.json.

  Kurtosis and outliers are means, `largest` the largest; errors are those of all their numbers together. The histogram
  begins at `from` with bins of WIDTH, and leaves out the empty ones at both ends.
  """
  squares = [kernel.count * kernel.rms**2 for kernel in kernels]
  histogram = np.sum([kernel.histogram for kernel in kernels], axis=0)
  filled = np.flatnonzero(histogram)
  first, last = int(filled[0]), int(filled[-1])

  def error(name: str) -> float:
    changed = sum(square * kernel.errors[name] ** 2 for square, kernel in zip(squares, kernels))
    return math.sqrt(changed / sum(squares)) if sum(squares) else 0.0

  counts = [kernel.count for kernel in kernels]
  return {
    "kernels": len(kernels),
    "count": sum(counts),
    "kurtosis": float(np.mean([kernel.kurtosis for kernel in kernels])),
    "kurtosis_range": [min(kernel.kurtosis for kernel in kernels), max(kernel.kurtosis for kernel in kernels)],
    "outliers": float(np.average([kernel.outliers for kernel in kernels], weights=counts)),
    "largest": max(kernel.largest for kernel in kernels),
    "errors": {name: error(name) for name in SCHEMES},
    "histogram": {"from": float(bins()[first]), "width": WIDTH, "counts": histogram[first : last + 1].tolist()},
  }
