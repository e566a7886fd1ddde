"""What a program is for: the machine, the kernel compilers that it has, and how a mesh splits arrays over it.

A value: `parallel.partitioning.target` makes it where a model's trace begins, `Target.of` anywhere else; from there it
is passed as an argument to wherever a kernel or a layout is chosen. Its devices may be elsewhere
(jax.experimental.topologies).
"""

from collections.abc import Mapping
import dataclasses
import functools
import importlib
import re
from types import ModuleType
from typing import Any

import jax

from glmjax.kernels.cpu import library


@functools.cache
def triton() -> Any:
  """Returns Pallas's compiler for GPUs, a module; None where this JAX comes without.

  It and `mosaic` are loaded when they are asked for, 0.07 s that CPUs do without. No other module looks for them. JAX
  warns of Triton's end each time a kernel is lowered, not here, and nothing of ours silences that.
  """
  return _backend("triton")


@functools.cache
def mosaic() -> Any:
  """Returns Pallas's compiler for TPUs, a module; None where this JAX comes without."""
  return _backend("tpu")


def _backend(name: str) -> ModuleType | None:
  try:
    return importlib.import_module(f"jax.experimental.pallas.{name}")
  except ImportError:
    return None


# What to know of Pallas's compilers: what loads each, and what `glmjax doctor` says.
COMPILERS = {
  "Pallas Triton": (
    triton,
    "deprecated since JAX 0.11; its successor is Mosaic GPU, for Ampere too; without it GPUs use XLA's own ways",
  ),
  "Pallas Mosaic": (mosaic, "without it TPUs use XLA's own ways"),
}

PLATFORMS = ("cpu", "gpu", "tpu")
FEATURES = (*PLATFORMS, "triton", "mosaic", "large_shared_memory", "cpu_library")

# Parts of JAX's device kinds: NVIDIA GPUs before Ampere, for which Triton has no tensor cores or no code at all (Tesla,
# Quadro and GTX were names of none since), and AMD's, on which the kernels were never tried.
_OTHERS = ("P100", "V100", "T4", "Tesla", "Quadro", "GTX", "RTX 206", "RTX 207", "RTX 208", "TITAN", "AMD")

# Kinds whose blocks may take 160 KiB of shared memory or more; of Ampere and later, others take 99.
_LARGE_SHARED_MEMORY = re.compile(r"\b(A100|A800|A30|H20|G?[HB]\d00)\b")


@dataclasses.dataclass(frozen=True)
class Target:
  """The devices of a program, all of one kind.

  Args:
    platform: one of PLATFORMS.
    kind: JAX's name of the device.
    features: those of FEATURES that it has.
    devices: how many there are in the program's mesh.
    parts: logical axes that the mesh splits, and into how many parts.
  """

  platform: str
  kind: str
  features: frozenset[str]
  devices: int = 1
  parts: tuple[tuple[str, int], ...] = ()

  @classmethod
  def of(cls, device: Any, devices: int = 1, parts: Mapping[str, int] | None = None) -> "Target":
    """Returns the target that consists of so many such devices, real or abstract, with these parts of logical axes."""
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    kind = device.device_kind
    features = frozenset(name for name in FEATURES if _lacks(name, platform, kind) is None)
    return cls(platform, kind, features, devices, tuple(sorted((parts or {}).items())))

  @property
  def is_one_cpu(self) -> bool:
    """Whether it is one CPU device, for which weights of inference lie as rows (models/output_rows.py)."""
    return self.devices == 1 and self.platform == "cpu"

  def split(self, axis: str) -> int:
    """Says into how many parts the mesh splits a logical axis."""
    return dict(self.parts).get(axis, 1)

  def lacks(self, feature: str) -> str | None:
    """Says in words why it has not this feature; None where it has."""
    return None if feature in self.features else _lacks(feature, self.platform, self.kind) or f"no {feature}"


def _lacks(feature: str, platform: str, kind: str) -> str | None:
  if feature in PLATFORMS:
    return None if platform == feature else f"is for {feature}s"
  if feature == "triton":
    if platform != "gpu":
      return "is for GPUs"
    if any(name in kind for name in _OTHERS):
      return "is for NVIDIA GPUs from Ampere on"
    if triton() is None:
      return (
        f"JAX {jax.__version__} has no Pallas Triton; its successor is Mosaic GPU, for which nothing is written yet"
      )
  if feature == "mosaic":
    if platform != "tpu" or "v2" in kind or "v3" in kind:
      return "is for TPUs from v4 on"
    if mosaic() is None:
      return f"JAX {jax.__version__} has no Pallas for TPUs: XLA's own is used"
  if feature == "cpu_library":
    if platform != "cpu":  # before the library is loaded, and what is said to it counts
      return "is for CPUs"
    found = library.status()
    return None if found.available else found.words
  if feature == "large_shared_memory" and not _LARGE_SHARED_MEMORY.search(kind):
    return "is for GPUs whose blocks may take more than 99 KiB of shared memory"
  return None
