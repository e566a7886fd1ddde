"""Which devices the Triton kernels are for."""

import pytest

from glmjax import target


@pytest.mark.parametrize("platform, kind, expected", [
    ("gpu", "NVIDIA H100 80GB HBM3", True), ("gpu", "NVIDIA A100-SXM4-40GB", True), ("cuda", "NVIDIA A10G", True),
    ("gpu", "NVIDIA GeForce RTX 3090", True), ("gpu", "NVIDIA RTX 2000 Ada Generation", True),
    ("gpu", "Tesla V100-SXM2-16GB", False), ("gpu", "Tesla T4", False), ("gpu", "NVIDIA GeForce GTX 1080 Ti", False),
    ("gpu", "NVIDIA GeForce RTX 2080 Ti", False), ("gpu", "Quadro P6000", False), ("gpu", "AMD Instinct MI300X", False),
    ("gpu", "NVIDIA L4", True),
    ("rocm", "AMD Instinct MI300X", False), ("tpu", "TPU v4", False), ("cpu", "cpu", False)])
def test_triton_is_for_ampere_and_later(monkeypatch, platform, kind, expected):
  monkeypatch.setattr(target, "_platform_and_kind", lambda: (platform, kind))
  monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: name)
  assert target.runs_triton() is expected
