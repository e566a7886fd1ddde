"""The runner: a model on its mesh, ready to run inference's programs. Arrays in, arrays out."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from glmjax import errors
from glmjax.checkpoint import load
from glmjax.checkpoint import stream
from glmjax.infer import adapters as adapters_lib
from glmjax.infer import placement as placement_lib
from glmjax.io import memory
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import partitioning


def read(
  folder: paths.Named,
  placement: placement_lib.Placement,
  precision: placement_lib.Precision = placement_lib.Precision(),
  offload_layers: int = 0,
  adapter: adapters_lib.Adapters = None,
) -> load.LoadedModel:
  """Reads a model from an exported or a training folder, each array straight to the devices that own it.

  What was exported for CPUs is mapped for one CPU, its parameters as programs take them.

  Args:
    folder: either kind.
    placement: the mesh.
    precision: in what to compute.
    offload_layers: how many layers, the last, keep their kernels in the host's memory.
    adapter: a run that trained one beside this model, or its export; several by name, LoRA's; None: the model alone.
  """
  trained = adapters_lib.read(adapter)

  def targets(config: config_lib.GLMConfig, bits: int | None, groups: Mapping[str, int]) -> Any:
    return placement.params(precision.of(config), bits, offload_layers, groups)

  def rows(config: config_lib.GLMConfig, bits: int | None, groups: Mapping[str, int]) -> Any:
    config = dataclasses.replace(precision.of(config), head_bits=None)  # the head is quantized when it is there
    if not placement.takes_rows(config, offload_layers):
      return None
    return placement.laid_out(config, bits, offload_layers, groups)

  found = stream.stream(folder, targets, rows)
  found = dataclasses.replace(found, config=precision.of(found.config))
  return found if trained is None else adapters_lib.beside(trained, found, folder, placement)


_LARGE = 1 << 22  # bytes of an array that is worth huge pages, of 2 MiB each


class Runner:
  """A model whose parameters lie as inference wants them.

  Every program of infer/ (decode.prefill, decode.decode, scoring.log_probs, beam.step) takes the configuration and the
  parameters first: `run` calls it with them, on the mesh.
  """

  def __init__(
    self,
    config: config_lib.GLMConfig,
    params: Any,
    placement: placement_lib.Placement | None = None,
    offload_layers: int = 0,
    given_away: bool = False,
    adapters: Sequence[str] = (),
  ) -> None:
    """Lays out parameters as they were trained, exported or quantized.

    Args:
      config: the model's, as trained.
      params: stacked or layers apart, on the host or on devices.
      placement: the mesh; None: the first device.
      offload_layers: how many layers, the last, keep their kernels in the host's memory.
      given_away: whether parameters that are laid out anew may be deleted, so that there is none twice.
      adapters: the names of those among which each row has one, in the order of their numbers from 1 on.
    """
    self.adapters = tuple(adapters)
    self.placement = placement or placement_lib.one_device()
    self.config = placement_lib.inference_config(config, self.placement.target)
    self.params = self.placement.place(self.config, params, offload_layers, given_away)
    if self.placement.target.is_one_cpu:
      _join_pages(self.params)

  def run(self, program: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls program(config, params, *arguments, **options); arrays of the host go to every device whole."""
    arguments = self.on_devices(arguments)
    with self.placement.scope():
      return program(self.config, self.params, *arguments, **options)

  def adapter_number(self, name: str | None) -> int:
    """Returns the number of the adapter of this name; 0 for None, which is none.

    Raises:
      errors.InputError: where there is no such adapter.
    """
    if name is None:
      return 0
    if name not in self.adapters:
      there = f"there are {', '.join(self.adapters)}" if self.adapters else "the model was loaded with none by name"
      raise errors.InputError(f"no adapter {str(name)[:60]!r}: {there}")
    return 1 + self.adapters.index(name)

  def layer(self, i: int) -> "Runner":
    """Returns a runner of one of the layers, alone; for programs that call no other part."""
    layer = copy.copy(self)
    layer.config = self.config.one_layer
    layer.params = {f"{params_lib.LAYERS}_0": self.params[f"{params_lib.LAYERS}_{i}"]}
    return layer

  def with_exact_caches(self) -> "Runner":
    """Returns a runner of the same parameters whose caches keep keys and values as they are computed."""
    runner = copy.copy(self)
    runner.config = dataclasses.replace(self.config, kv_cache_dtype=None)
    return runner

  def batch_size(self, rows: int) -> int:
    """Returns the size of a batch of so many rows or more that programs are compiled for: it divides over the mesh."""
    return self.placement.batch_size(rows)

  def free_bytes(self) -> int | None:
    """Returns how many bytes a cache, split over the mesh, may take in all while memory lasts; None: unknown."""
    on_devices = [device.memory_stats() or {} for device in self.placement.mesh.local_devices]
    if not all("bytes_limit" in stats for stats in on_devices):
      return memory.available(self._mapped_bytes())  # the CPU's devices share the host's
    with self.placement.scope():
      parts = partitioning.parts("batch") * partitioning.parts("act_heads")
    return parts * min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in on_devices)

  def _mapped_bytes(self) -> int:
    """Returns how many bytes of the parameters are those of a file."""
    if not self.placement.target.is_one_cpu:  # for which alone files are mapped
      return 0
    arrays = [x for x in jax.tree.leaves(self.params) if isinstance(x, jax.Array)]
    return memory.in_files((x.unsafe_buffer_pointer(), x.nbytes) for x in arrays)

  def on_devices(self, arguments: Any) -> Any:
    """Returns arguments with their arrays of the host on every device, whole."""

    def put(x: Any) -> Any:
      return self.placement.everywhere(x) if isinstance(x, np.ndarray | np.generic) else x

    return jax.tree.map(put, arguments)


def _join_pages(params: Any) -> None:
  """Has a CPU's large arrays lie in huge pages, where the system gives them: decoding reads them all for each token."""
  for x in jax.tree.leaves(params):
    if isinstance(x, jax.Array) and x.nbytes >= _LARGE:
      jax.block_until_ready(x)
      memory.join_pages(x.unsafe_buffer_pointer(), x.nbytes)
