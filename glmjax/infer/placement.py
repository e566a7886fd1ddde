"""How a model for inference lies on the devices of a mesh: its parameters, its cache, and the rows it reads.

The engine and glmjax.plan build their programs from what is said here, so that what a plan compiles is what runs.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmjax import errors
from glmjax import target as target_lib
from glmjax.infer import decode
from glmjax.infer import offload
from glmjax.infer import rows as rows_lib
from glmjax.infer import sampling
from glmjax.models import config as config_lib
from glmjax.models import kv_cache
from glmjax.models import lowrank
from glmjax.models import output_rows
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.quantize import qarray

_TABLE, _HEAD = "embedding/table", "head/kernel"
_NO_GROUPS: Mapping[str, int] = types.MappingProxyType({})
_UNUSED_AXES = ("stage", "context")  # of the mesh: inference cuts neither layers nor rows in pieces


@dataclasses.dataclass(frozen=True)
class Precision:
  """In what a model computes, where it is not in what it says itself."""

  dtype: str | None = None  # of activations and float weights
  kv_cache_dtype: str | None = None  # of the keys and values that decoding keeps: int8
  activation_bits: int | None = None  # 8: rounds what quantized weights are multiplied with, on CPUs
  head_bits: int | None = None  # 8 or 4: quantizes the head as it is loaded, on CPUs

  def of(self, config: config_lib.GLMConfig) -> config_lib.GLMConfig:
    """Returns a model's configuration with what is said here.

    Raises:
      errors.InputError: for a dtype that there is not.
    """
    return dataclasses.replace(config, **{name: x for name, x in dataclasses.asdict(self).items() if x is not None})


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh, and the rules by which arrays are split over it: tensor over heads, mlp and vocabulary; fsdp over width
  and rows; data over rows."""

  mesh: jax.sharding.Mesh
  rules: partitioning.Rules = partitioning.FSDP

  @contextlib.contextmanager
  def scope(self) -> Iterator[None]:
    """Enters a scope in which programs are traced and called for this mesh."""
    with partitioning.use(self.mesh, self.rules):
      yield

  @property
  def target(self) -> target_lib.Target:
    """The target of the programs."""
    return partitioning.target_of(self.mesh.abstract_mesh, self.rules)

  @property
  def replicated(self) -> jax.sharding.NamedSharding:
    """The sharding of what every device has whole."""
    return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

  @property
  def row_parts(self) -> int:
    """The number of which a batch's rows are a multiple."""
    return partitioning.batch_shards(self.mesh)

  def batch_size(self, rows: int) -> int:
    """Returns the size of a batch of so many rows or more that programs are compiled for: it divides over the mesh."""
    parts = self.row_parts
    return rows_lib.bucket(-(-rows // parts), 1) * parts

  def check(self, config: config_lib.GLMConfig) -> None:
    """Raises InputError, naming the sizes that do, where the model does not divide over the mesh."""
    for axis in _UNUSED_AXES:
      if self.mesh.shape[axis] > 1:
        raise errors.InputError(
          f"inference splits a model over tensor, fsdp and data: {axis}={self.mesh.shape[axis]} is for training"
        )
    sizes = params_lib.sizes(config)
    for name, size, axes in partitioning.uneven(sizes, self.mesh.shape, self.rules):
      [axis] = axes  # inference's rules split no axis of weights over two
      possible = [n for n in range(1, 129) if not partitioning.uneven(sizes, {axis: n}, self.rules)]
      raise errors.InputError(
        f"{name} {size} does not divide over {axis}={self.mesh.shape[axis]}: this "
        f"model takes {axis}={', '.join(map(str, possible))}"
      )

  def params(
    self,
    config: config_lib.GLMConfig,
    bits: int | None = None,
    offload_layers: int = 0,
    groups: Mapping[str, int] = _NO_GROUPS,
  ) -> Any:
    """Returns abstract parameters with their shardings, layers apart: in the compute dtype, or quantized, a kernel's
    inputs in `groups` (by its path in the layer; none: 1) that have scales of their own.

    Shardings of those in the host's memory are over the abstract mesh: JAX forgets the memory of devices elsewhere,
    which tell of none.
    """
    self.check(config)
    offload.check(config.num_layers, offload_layers)
    return params_lib.nest(
      {
        path: self._leaf(
          config,
          param,
          bits if param.quantizes else None,
          groups.get(path.partition("/")[2], 1),
          offload.is_offloaded(path, param, config.num_layers, offload_layers),
        )
        for path, param in params_lib.apart(config)
      }
    )

  def _leaf(
    self, config: config_lib.GLMConfig, param: params_lib.Param, bits: int | None, groups: int, offloaded: bool
  ) -> Any:
    sharding = partitioning.named(self.mesh, self.rules, *param.axes)
    if offloaded:
      here = self.mesh.devices.flat[0] in jax.devices()
      sharding = jax.sharding.NamedSharding(
        self.mesh if here else self.mesh.abstract_mesh, sharding.spec, memory_kind=offload.HOST
      )
    weight = jax.ShapeDtypeStruct(param.shape, config.dtype if param.is_matrix else config.param_dtype)
    if bits is None:
      return _abstract(weight, sharding)
    quantized = qarray.abstract(weight.shape, bits, param.inputs, groups)
    return dataclasses.replace(
      quantized,
      values=_abstract(quantized.values, sharding),
      scale=_abstract(quantized.scale, partitioning.unsplit(sharding, param.inputs, len(param.shape))),
    )

  def place(self, config: config_lib.GLMConfig, params: Any, offload_layers: int = 0, given_away: bool = False) -> Any:
    """Lays out a model's parameters, stacked or apart, float or quantized, wherever they are, as `laid_out` says; what
    was mapped lies so already.

    `config` is what `inference_config` gives. With `given_away` arrays that are laid out anew are deleted, so that
    there is none twice.
    """
    flat = dict(apart(params_lib.flatten(params)))
    if any(isinstance(x, output_rows.OutputRows) for x in flat.values()):
      return params_lib.nest(self._with_head(config, flat))
    as_rows = self._as_rows(config, offload_layers)
    tied = _HEAD not in flat and not config.tie_embeddings
    if tied and not as_rows:
      flat[_HEAD] = flat["embedding/table"].T
    if offload_layers:
      offload.check(config.num_layers, offload_layers)
      offload.check_memory(self.mesh.local_devices[0])
    bits = qarray.bits_of(flat.values())
    targets = params_lib.flatten(self.params(config, bits, offload_layers))
    if tied and as_rows:
      del targets[_HEAD]
    if unknown := sorted({*flat} ^ {*targets}):
      raise errors.InputError(f"{unknown[0]}: the parameters are not those of this model")
    found = {}
    for path, wanted in targets.items():
      if isinstance(flat[path], lowrank.Stacked):  # it lies as it shall (infer/adapters.py)
        found[path] = flat[path]
        continue
      found[path] = jax.tree.map(_put, flat[path], wanted)
      if path in as_rows:
        rows = output_rows.of(found[path], as_rows[path], config.activation_bits == 8)
        found[path] = jax.device_put(rows, self.replicated)
        if given_away:
          jax.block_until_ready(found[path].values)
          jax.tree.leaves(flat[path])[0].delete()  # the values; scales may be the same arrays as before
      if path == _TABLE and self._keeps_bits(config):
        found[path] = _bits(found[path])
        if given_away:
          jax.block_until_ready(found[path])
          flat[path].delete()
    return params_lib.nest(self._with_head(config, found) if as_rows else found)

  def _with_head(self, config: config_lib.GLMConfig, flat: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters that are rows, with the head: a tied one is the table itself, or its codes."""
    head = flat[_HEAD] if _HEAD in flat else output_rows.of_table(flat[_TABLE])
    if config.head_bits is not None:
      head = output_rows.quantized(head, config.head_bits, config.activation_bits == 8)
    return flat | {_HEAD: jax.device_put(head, self.replicated)}

  def laid_out(
    self,
    config: config_lib.GLMConfig,
    bits: int | None = None,
    offload_layers: int = 0,
    groups: Mapping[str, int] = _NO_GROUPS,
  ) -> Any:
    """Returns abstract parameters as programs take them: those of `params`, but on one CPU kernels and head as rows."""
    as_rows = self._as_rows(config, offload_layers)
    fast = config.activation_bits == 8

    def of(path: str, x: Any) -> Any:
      if path == _TABLE and self._keeps_bits(config):
        return jax.ShapeDtypeStruct(x.shape, jnp.uint16, sharding=x.sharding)
      if path not in as_rows:
        return x
      rows = jax.eval_shape(lambda x: output_rows.of(x, as_rows[path], fast), x)
      if path == _HEAD and config.head_bits is not None:
        rows = jax.eval_shape(lambda rows: output_rows.quantized(rows, config.head_bits, fast), rows)
      return jax.tree.map(functools.partial(_abstract, sharding=self.replicated), rows)

    flat = params_lib.flatten(self.params(config, bits, offload_layers, groups))
    return params_lib.nest({path: of(path, x) for path, x in flat.items()})

  def takes_rows(self, config: config_lib.GLMConfig, offload_layers: int = 0) -> bool:
    """Tells whether `laid_out` has rows (models/output_rows.py)."""
    return bool(self._as_rows(config, offload_layers))

  def _keeps_bits(self, config: config_lib.GLMConfig) -> bool:
    """Tells whether half-precision tables are kept as their bits: XLA's CPU makes floats of all rows to look one up."""
    return self.target.platform == "cpu" and self.target.devices == 1 and jnp.dtype(config.dtype).itemsize == 2

  def _as_rows(self, config: config_lib.GLMConfig, offload_layers: int) -> dict[str, int]:
    """Returns the weights that lie as rows, and how many input axes each has."""
    target = self.target
    there = target.is_one_cpu and config.dtype in config_lib.CPU_DTYPES
    for name in ("activation_bits", "head_bits"):
      if getattr(config, name) is not None and (not there or offload_layers):
        raise errors.InputError(
          f"{name} is for one CPU, in {' or '.join(config_lib.CPU_DTYPES)}, without offloaded layers"
        )
    if not there or offload_layers:
      return {}
    return {path: inputs for path, _ in params_lib.apart(config) if (inputs := params_lib.row_inputs(path))}

  def everywhere(self, x: np.ndarray) -> jax.Array:
    """Puts an array of the host on all devices; every process of several gives the same.

    (device_put would compare what the processes give, a collective for each array.)
    """
    return jax.make_array_from_callback(np.shape(x), self.replicated, lambda index: x[index])

  def prompts(self, batch: int, slots: int) -> rows_lib.Batch:
    """Returns abstract prompts."""
    number = functools.partial(self._numbers, batch)
    return rows_lib.Batch(number(slots), number(2, slots), number(slots), number(slots), number())

  def scored(self, batch: int, entries: int) -> jax.ShapeDtypeStruct:
    """Returns abstract places that are scored in rows; targets are as they."""
    return self._numbers(batch, entries)

  def rows(self, batch: int) -> decode.Rows:
    """Returns what is known of abstract rows that decode."""
    number = functools.partial(self._numbers, batch)
    return decode.Rows(number(), number(), number(2), number(2), number(), number())

  def state(self, config: config_lib.GLMConfig, batch: int, slots: int, new_tokens: int) -> decode.State:
    """Returns the abstract state of a batch that decodes: its cache split by rows and heads."""
    rows = "batch" if batch % self.row_parts == 0 else None
    sharding = _of_result(partitioning.named(self.mesh, self.rules, rows, "act_heads", None, None))
    cache = jax.tree.map(
      functools.partial(_abstract, sharding=sharding),
      jax.eval_shape(lambda: kv_cache.empty(self.target, config, batch, slots)),
    )
    number = functools.partial(self._numbers, batch)
    return decode.State(
      cache,
      length_B=number(),
      step_B=number(),
      last_B=number(),
      generated_BT=number(new_tokens),
      done_B=number(dtype=bool),
      finite_B=number(dtype=bool),
      logits_BV=jax.ShapeDtypeStruct((batch, config.vocab_size), jnp.float32, sharding=self.logits(batch)),
    )

  def logits(self, batch: int) -> jax.sharding.NamedSharding:
    """Returns the sharding of a batch's logits."""
    rows = "batch" if batch % self.row_parts == 0 else None
    return _of_result(partitioning.named(self.mesh, self.rules, rows, "act_vocab"))

  def draws(self, batch: int) -> sampling.Draws:
    """Returns abstract greedy draws."""
    concrete = sampling.draws([sampling.Sampling()] * batch, [0] * batch)
    return jax.tree.map(functools.partial(_abstract, sharding=self.replicated), concrete)

  def ids_mask(self, config: config_lib.GLMConfig) -> jax.ShapeDtypeStruct:
    """Returns an abstract set of ids."""
    return self._numbers(config.vocab_size, dtype=bool)

  def number(self) -> jax.ShapeDtypeStruct:
    """Returns an abstract int32."""
    return self._numbers()

  def _numbers(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=self.replicated)


@jax.jit
def _bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _put(x: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
  return jax.device_put(x.astype(wanted.dtype), wanted.sharding)


def inference_config(config: config_lib.GLMConfig, target: target_lib.Target) -> config_lib.GLMConfig:
  """Returns the model as inference computes it: layers apart, so that no step slices a layer's weights out of a
  stack.
  """
  tied = config.tie_embeddings and target.platform != "cpu"
  return dataclasses.replace(
    config,
    scan_layers=False,
    remat="none",
    hidden_dropout=0.0,
    attention_dropout=0.0,
    prefix_dropout=0.0,
    lora_dropout=0.0,
    tie_embeddings=tied,
  )


def apart(flat: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yields parameters by path, stacked layers one by one."""
  for path, x in flat.items():
    first, _, rest = path.partition("/")
    if first != params_lib.LAYERS:
      yield path, x
      continue
    for i in range(len(jax.tree.leaves(x)[0])):
      yield f"{params_lib.LAYERS}_{i}/{rest}", jax.tree.map(lambda part, i=i: part[i], x)


def on_mesh(mesh: mesh_lib.MeshConfig | str | None) -> Placement:
  """Returns a placement on the first devices of a mesh's size, as "tensor=4"; None: on the first device.

  Raises:
    errors.InputError: when it is no mesh, or there are not so many devices.
  """
  config = mesh_lib.given(mesh)
  if config is None:
    return one_device()
  devices = jax.devices()
  sizes = [getattr(config, axis) for axis in mesh_lib.AXES]
  if -1 not in sizes and jax.process_count() == 1:
    devices = devices[: math.prod(sizes)]
  return Placement(mesh_lib.make_mesh(config, devices))


def _of_result(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
  """Returns the sharding as JAX gives it to a program's result: without the mesh axes that have one device."""

  def parts(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    names = (axes,) if isinstance(axes, str) else axes or ()
    split = tuple(name for name in names if sharding.mesh.shape[name] > 1)
    return split[0] if len(split) == 1 else split or None

  return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*map(parts, sharding.spec)))


def one_device() -> Placement:
  """Returns a placement of all on the first device."""
  return Placement(mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1), jax.local_devices()[:1]))


def _abstract(x: Any, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
