"""What the program being traced will run on: the devices of the mesh in scope, or else JAX's default ones.

A mesh may be of devices that are not here (jax.experimental.topologies): kernels and layouts are chosen for those.
"""

import importlib.util
import re

import jax

# Parts of JAX's device kinds: NVIDIA GPUs before Ampere, for which Triton has no tensor cores or no code at all (Tesla,
# Quadro and GTX were names of none since), and AMD's, on which the kernels were never tried.
_OTHERS = ("P100", "V100", "T4", "Tesla", "Quadro", "GTX", "RTX 206", "RTX 207", "RTX 208", "TITAN", "AMD")

# Kinds whose blocks may take 160 KiB of shared memory or more; of Ampere and later, others take 99.
_LARGE_SHARED_MEMORY = re.compile(r"\b(A100|A800|A30|G?[HB]\d+)\b")


def platform() -> str:
  """ "cpu", "gpu" or "tpu"."""
  found = _platform_and_kind()[0]
  return "gpu" if found in ("cuda", "rocm") else found


def runs_triton() -> bool:
  """Whether Pallas kernels for Triton compile for it. A later JAX may come without them (0.11.2 says so)."""
  found, kind = _platform_and_kind()
  if importlib.util.find_spec("jax.experimental.pallas.triton") is None or found not in ("gpu", "cuda"):
    return False
  return not any(name in kind for name in _OTHERS)


def has_large_shared_memory() -> bool:
  """Whether a block of a GPU's kernel may take more than 99 KiB."""
  return bool(_LARGE_SHARED_MEMORY.search(_platform_and_kind()[1]))


def runs_mosaic() -> bool:
  """Whether Pallas kernels for Mosaic compile for it: TPUs from v4 on."""
  found, kind = _platform_and_kind()
  if importlib.util.find_spec("jax.experimental.pallas.tpu") is None or found != "tpu":
    return False
  return not any(name in kind for name in ("v2", "v3"))


def _platform_and_kind() -> tuple[str, str]:
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  return device.platform, device.device_kind
