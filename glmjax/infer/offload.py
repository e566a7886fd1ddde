"""Weights in the host's memory: kernels of a model's last layers, copied to the device each time they are used.

The last layers, because their copies have the products of the layers before them to hide behind; a step could not
begin before the copy of a first layer has arrived. XLA for GPUs starts a copy before it is waited for only with its
latency-hiding scheduler; XLA for TPUs has one of its own.
"""

from typing import Any

import jax
import numpy as np

from glmjax import errors
from glmjax.quantize import qarray
from glmjax.quantize import tree

HOST = "pinned_host"  # JAX's name of the page-locked memory that a device reads by itself
GPU_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}  # of XLA, where weights are offloaded


def is_offloaded(names: tuple[str, ...], num_layers: int, offload_layers: int) -> bool:
  """Whether the parameter at this path of dict keys, of layers that are apart, is among those in the host's memory."""
  if tree.kernel_axes(names) is None:
    return False
  return int(names[-4].removeprefix("layers_")) >= num_layers - offload_layers


def check(num_layers: int, offload_layers: int) -> None:
  """Raises InputError unless the model has so many layers."""
  if not 0 <= offload_layers <= num_layers:
    raise errors.InputError(f"offload_layers is {offload_layers}, and the model has {num_layers}: give 0 "
                            f"to {num_layers}")


def place(params: Any, num_layers: int, offload_layers: int) -> Any:
  """Arrays of layers that are apart, each where it belongs; those of NumPy go to the first device or to its host.

  Raises:
    errors.InputError: for more layers than there are, and where JAX knows no host memory of the device.
  """
  check(num_layers, offload_layers)
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def put(path: tuple[Any, ...], x: Any) -> Any:
    offloaded = is_offloaded(tuple(str(key.key) for key in path), num_layers, offload_layers)

    def one(x: Any) -> jax.Array:
      sharding = x.sharding if isinstance(x, jax.Array) else first
      return jax.device_put(x, _in_host_memory(sharding) if offloaded else sharding)

    return jax.tree.map(one, x)

  return jax.tree_util.tree_map_with_path(put, params, is_leaf=_is_quantized)


def fetch(params: Any) -> Any:
  """Within jit: what is in the host's memory, copied to the device; XLA does so where each array is first read."""
  space = jax.memory.Space
  return jax.tree.map(lambda x: jax.device_put(x, space.Device) if jax.typeof(x).memory_space == space.Host else x,
                      params)


def reading() -> jax.sharding.Sharding:
  """Where a model is read whose weights do not all go to the device: the CPU's memory.

  Raises:
    errors.InputError: where that is of no use.
  """
  _in_host_memory(jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
  try:
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  except RuntimeError as error:
    raise errors.InputError("offload_layers reads weights by the CPU, which JAX_PLATFORMS leaves out: "
                            "set JAX_PLATFORMS=cuda,cpu, or leave it unset") from error


def layers_apart(params: Any) -> Any:
  """Parameters in the CPU's memory as NumPy's views of them, the stack of layers cut up; nothing is copied."""
  params = jax.tree.map(np.asarray, params)
  stacked = params.pop("layers", None)
  count = 0 if stacked is None else len(jax.tree.leaves(stacked)[0])
  return params | {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)}


def _in_host_memory(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
  device = min(sharding.device_set, key=lambda device: device.id)
  if HOST not in (memory.kind for memory in device.addressable_memories()):
    raise errors.InputError(f"offload_layers: JAX {jax.__version__} has no {HOST} memory for {device.device_kind}: "
                            "leave it out, or use another version")
  return sharding.with_memory_kind(HOST)


def _is_quantized(x: Any) -> bool:
  return isinstance(x, qarray.QuantizedArray)
