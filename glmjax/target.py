"""What the program being traced will run on: the devices of the mesh in scope, or else JAX's default ones.

A mesh may be of devices that are not here (jax.experimental.topologies): kernels and layouts are chosen for those.
"""

import importlib.util

import jax

# Parts of JAX's device kinds: NVIDIA GPUs before Ampere, for which Triton has no tensor cores or no code at all (Tesla,
# Quadro and GTX were names of none since), and AMD's, on which the kernels were never tried.
_OTHERS = ("P100", "V100", "T4", "Tesla", "Quadro", "GTX", "RTX 206", "RTX 207", "RTX 208", "TITAN", "AMD")


def platform() -> str:
  """"cpu", "gpu" or "tpu"."""
  found = _platform_and_kind()[0]
  return "gpu" if found in ("cuda", "rocm") else found


def runs_triton() -> bool:
  """Whether Pallas kernels for Triton compile for it. A later JAX may come without them (0.11.2 says so)."""
  found, kind = _platform_and_kind()
  if importlib.util.find_spec("jax.experimental.pallas.triton") is None or found not in ("gpu", "cuda"):
    return False
  return not any(name in kind for name in _OTHERS)


def runs_mosaic() -> bool:
  """Whether Pallas kernels for Mosaic compile for it: TPUs from v4 on."""
  found, kind = _platform_and_kind()
  if importlib.util.find_spec("jax.experimental.pallas.tpu") is None or found != "tpu":
    return False
  return not any(name in kind for name in ("v2", "v3"))


def _platform_and_kind() -> tuple[str, str]:
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  return device.platform, device.device_kind
