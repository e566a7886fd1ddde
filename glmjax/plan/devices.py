"""Devices that are not there: topologies for which the real compilers of TPU and GPU compile."""

import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from glmjax import errors
from glmjax.plan import targets

INSTALL = "pip install 'glmjax[plan]'"
# libtpu asks the cloud's metadata server for these otherwise; the last lets several processes compile at a time.
_TPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_CHIP_CONFIGS = {"v4": {"chip_config_name": "megacore"}}  # both cores of a chip as one device


def of(target: targets.Target) -> Sequence[Any]:
  """Returns its devices, in the order in which meshes are made of them.

  Raises:
    errors.InputError: when the compiler is not installed, does not fit this JAX, or does not know the target.
  """
  make = _tpu if target.chip.platform == "tpu" else _gpu
  try:
    found = make(target).devices
  except errors.InputError:
    raise
  except Exception as error:  # whatever a plug-in of another version says
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    raise errors.InputError(
      f"target {target.name}: its compiler does not take it ({line}); is it of this JAX's "
      f"version, {jax.__version__}? {INSTALL}"
    ) from error
  if len(found) != target.devices:
    raise errors.InputError(f"target {target.name}: its compiler sees {len(found)} devices, not {target.devices}")
  return found


def _tpu(target: targets.Target) -> Any:
  if importlib.util.find_spec("libtpu") is None:
    raise errors.InputError(f"target {target.name} needs libtpu, TPU's compiler: {INSTALL}")
  kind = {"v5e": "v5litepod"}.get(target.chip.topology, target.chip.topology)
  os.environ.update(_TPU_ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": f"{kind}-{target.devices}"})
  name = f"{target.chip.topology}:{'x'.join(map(str, target.shape))}"
  return topologies.get_topology_desc(platform="tpu", topology_name=name, **_CHIP_CONFIGS.get(target.chip.topology, {}))


def _gpu(target: targets.Target) -> Any:
  if importlib.util.find_spec("jax_plugins") is None or not any(
    importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
  ):
    raise errors.InputError(f"target {target.name} needs JAX's CUDA plug-in: {INSTALL}")
  _find_ptxas()
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # of libraries that compiling does without
  nodes, devices = target.shape
  return topologies.get_topology_desc(
    "plan", platform="cuda", topology=f"1x{nodes}x{devices}", target_config=_configuration(target.chip)
  )


def _configuration(chip: targets.Chip) -> str:
  """Returns XLA's GpuTargetConfigProto as text."""
  major, minor = chip.compute_capability
  threads = 2048 if minor == 0 else 1024 if major == 7 else 1536
  return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
    shared_memory_per_core: {chip.shared_memory} threads_per_core_limit: {threads}
    core_count: {chip.cores} fpus_per_core: {chip.fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
    block_dim_limit_z: 65535 memory_bandwidth: {int(chip.memory_bandwidth)} l2_cache_size: {chip.l2_cache}
    clock_rate_ghz: {chip.clock_ghz} device_memory_size: {chip.memory_bytes}
    shared_memory_per_block_optin: {chip.shared_memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
    registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
  platform_name: "CUDA" runtime_version {{ major: 12 minor: 8 }} dnn_version_info {{ major: 9 minor: 7 }}
  device_description_str: "{chip.kind}" """


def _find_ptxas() -> None:
  """Puts pip's ptxas on the path; it is not where XLA looks when no CUDA is installed."""
  spec = importlib.util.find_spec("nvidia")
  for root in spec.submodule_search_locations if spec else ():
    for binary in pathlib.Path(root).glob("*/bin/ptxas"):
      os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{binary.parent}"
      return
