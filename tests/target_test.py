"""Which devices the kernels are for."""

import pathlib
import types

import jax
import pytest

from glmjax import target
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning


def features(platform: str, kind: str) -> frozenset[str]:
  return target.Target.of(types.SimpleNamespace(platform=platform, device_kind=kind)).features


@pytest.fixture(autouse=True)
def _compilers(monkeypatch):
  """Both are there, whichever JAX this is."""
  for name in ("triton", "mosaic"):
    found = getattr(target, name)() or types.ModuleType(name)
    monkeypatch.setattr(target, name, lambda found=found: found)


@pytest.mark.parametrize(
  "platform, kind, expected",
  [
    ("gpu", "NVIDIA H100 80GB HBM3", True),
    ("gpu", "NVIDIA A100-SXM4-40GB", True),
    ("cuda", "NVIDIA A10G", True),
    ("gpu", "NVIDIA GeForce RTX 3090", True),
    ("gpu", "NVIDIA RTX 2000 Ada Generation", True),
    ("gpu", "Tesla V100-SXM2-16GB", False),
    ("gpu", "Tesla T4", False),
    ("gpu", "NVIDIA GeForce GTX 1080 Ti", False),
    ("gpu", "NVIDIA GeForce RTX 2080 Ti", False),
    ("gpu", "Quadro P6000", False),
    ("gpu", "AMD Instinct MI300X", False),
    ("gpu", "NVIDIA L4", True),
    ("rocm", "AMD Instinct MI300X", False),
    ("tpu", "TPU v4", False),
    ("cpu", "cpu", False),
  ],
)
def test_triton_is_for_ampere_and_later(platform: str, kind: str, expected: bool):
  assert ("triton" in features(platform, kind)) is expected


@pytest.mark.parametrize(
  "platform, kind, expected",
  [
    ("tpu", "TPU v4", True),
    ("tpu", "TPU v5 lite", True),
    ("tpu", "TPU v5", True),
    ("tpu", "TPU v6 lite", True),
    ("tpu", "TPU v2", False),
    ("tpu", "TPU v3", False),
    ("gpu", "NVIDIA L4", False),
    ("cpu", "cpu", False),
  ],
)
def test_mosaic_is_for_tpus_from_v4_on(platform: str, kind: str, expected: bool):
  assert ("mosaic" in features(platform, kind)) is expected


@pytest.mark.parametrize(
  "kind, expected",
  [
    ("NVIDIA A100-SXM4-40GB", True),
    ("NVIDIA H100 80GB HBM3", True),
    ("NVIDIA GH200 480GB", True),
    ("NVIDIA B200", True),
    ("NVIDIA H200", True),
    ("NVIDIA H20", True),
    ("NVIDIA GB200", True),
    ("NVIDIA B300 SXM6 AC", True),
    ("NVIDIA GB10", False),
    ("NVIDIA GeForce RTX 3090", False),
    ("NVIDIA RTX A6000", False),
    ("NVIDIA A10G", False),
    ("NVIDIA L4", False),
    ("NVIDIA RTX A1000", False),
  ],
)
def test_shared_memory(kind: str, expected: bool):
  assert ("large_shared_memory" in features("gpu", kind)) is expected


@pytest.mark.parametrize(
  "name, device, successor",
  [("triton", ("gpu", "NVIDIA H100 80GB HBM3"), "Mosaic GPU"), ("mosaic", ("tpu", "TPU v4"), "XLA")],
)
def test_a_compiler_that_jax_has_dropped_is_told_of(monkeypatch, name: str, device: tuple[str, str], successor: str):
  monkeypatch.setattr(target, name, lambda: None)
  found = target.Target.of(types.SimpleNamespace(platform=device[0], device_kind=device[1]))
  why = found.lacks(name)
  assert jax.__version__ in why and successor in why and "\n" not in why
  assert found.lacks(device[0]) is None


def test_the_library_of_cpus_is_asked_for_on_cpus_alone(monkeypatch):
  """It is not loaded elsewhere, and what GLMJAX_CPU_ISA names does not matter there."""
  monkeypatch.setattr(target.library, "status", lambda: pytest.fail("asked"))
  found = target.Target.of(types.SimpleNamespace(platform="gpu", device_kind="NVIDIA L4"))
  assert found.lacks("cpu_library") == "is for CPUs"


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_target_of_the_mesh_in_scope():
  alone = partitioning.target()
  assert alone == target.Target.of(jax.devices()[0]) and alone.split("batch") == 1
  with partitioning.use(mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, tensor=4))):
    found = partitioning.target()
  assert found.devices == 8 and found.platform == alone.platform
  assert [found.split(axis) for axis in ("batch", "act_heads", "heads", "length", "embed")] == [2, 4, 4, 1, 1]
  assert hash(found) == hash(found) and found != alone


def test_the_scope_is_read_where_traces_begin_and_nowhere_deeper():
  root = pathlib.Path(target.__file__).parent
  found = {str(path.relative_to(root)) for path in root.rglob("*.py") if "partitioning.target(" in path.read_text()}
  assert found == {
    "models/glm.py",
    "train/pipeline/ring.py",
    "train/pipeline/one_f_one_b.py",
    "train/losses.py",
    "infer/decode.py",
    "infer/lanes.py",
    "infer/prefill.py",
    "infer/scoring.py",
  }
