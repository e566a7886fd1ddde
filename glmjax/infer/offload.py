"""Weights in the host's memory: kernels of a model's last layers, copied to the device each time they are used.

The last layers, because their copies have the products of the layers before them to hide behind; a step could not
begin before the copy of a first layer has arrived. XLA for GPUs starts a copy before it is waited for only with its
latency-hiding scheduler; XLA for TPUs has one of its own.
"""

from typing import Any

import jax

from glmjax import errors
from glmjax.models import params as params_lib

HOST = "pinned_host"  # JAX's name of the page-locked memory that a device reads by itself
GPU_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}  # of XLA, where weights are offloaded


def is_offloaded(path: str, param: params_lib.Param, num_layers: int, offload_layers: int) -> bool:
  """Tells whether a parameter of layers that are apart, at this path, is among those in the host's memory."""
  if not param.quantizes:
    return False
  return int(path.split("/")[0].removeprefix("layers_")) >= num_layers - offload_layers


def check(num_layers: int, offload_layers: int) -> None:
  """Raises InputError unless the model has so many layers."""
  if not 0 <= offload_layers <= num_layers:
    raise errors.InputError(
      f"offload_layers is {offload_layers}, and the model has {num_layers}: give 0 to {num_layers}"
    )


def check_memory(device: jax.Device) -> None:
  """Raises InputError where JAX knows no host memory of the device."""
  if HOST not in (memory.kind for memory in device.addressable_memories()):
    raise errors.InputError(
      f"offload_layers: JAX {jax.__version__} has no {HOST} memory for {device.device_kind}: "
      "leave it out, or use another version"
    )


def fetch(params: Any) -> Any:
  """Copies, within jit, what is in the host's memory to the device; XLA does so where each array is first read."""
  space = jax.memory.Space
  return jax.tree.map(
    lambda x: jax.device_put(x, space.Device) if jax.typeof(x).memory_space == space.Host else x, params
  )
