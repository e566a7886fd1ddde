"""Which devices the kernels are for."""

import pytest

from glmjax import target


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
def test_triton_is_for_ampere_and_later(monkeypatch, platform, kind, expected):
  monkeypatch.setattr(target, "_platform_and_kind", lambda: (platform, kind))
  monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: name)
  assert target.runs_triton() is expected


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
def test_mosaic_is_for_tpus_from_v4_on(monkeypatch, platform, kind, expected):
  monkeypatch.setattr(target, "_platform_and_kind", lambda: (platform, kind))
  monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: name)
  assert target.runs_mosaic() is expected


@pytest.mark.parametrize(
  "kind, expected",
  [
    ("NVIDIA A100-SXM4-40GB", True),
    ("NVIDIA H100 80GB HBM3", True),
    ("NVIDIA GH200 480GB", True),
    ("NVIDIA B200", True),
    ("NVIDIA H200", True),
    ("NVIDIA GeForce RTX 3090", False),
    ("NVIDIA RTX A6000", False),
    ("NVIDIA A10G", False),
    ("NVIDIA L4", False),
    ("NVIDIA RTX A1000", False),
  ],
)
def test_shared_memory(monkeypatch, kind, expected):
  monkeypatch.setattr(target, "_platform_and_kind", lambda: ("gpu", kind))
  assert target.has_large_shared_memory() is expected
