"""glmjax doctor: one line for each thing, whatever the machine."""

import json
import os
import subprocess
import sys
import types

import bucket_server
import pytest

from glmjax import cli
from glmjax import doctor
from glmjax.kernels import operations
from glmjax.kernels import quantized
from glmjax.kernels import rows
from glmjax.kernels.cpu import library


def test_tells_versions_devices_and_kernels(capsys):
  assert cli.main(["doctor"]) == 0
  lines = capsys.readouterr().out.splitlines()
  named = dict(line.split("  ", 1) for line in lines if "  " in line.strip())
  assert {"python", "jax", "jaxlib", "flax", "glmjax", "host memory", "device 0", "Pallas Triton"} <= {*named}
  for operation in operations.ALL:
    at = lines.index(operation.computes)
    ways = lines[at + 1 : at + 1 + len(operation.implementations)]
    assert [way.strip().split("  ")[0] for way in ways] == [way.name for way in operation.implementations]
    assert sum("chosen: takes" in way for way in ways) == 1


def test_json(capsys):
  assert cli.main(["doctor", "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert set(found) == {"versions", "host_memory", "programs", "devices", "compilers", "kernels", "cpu"}
  assert found["host_memory"]["total"] > found["host_memory"]["available"] > 0
  assert set(found["kernels"]) == {operation.computes for operation in operations.ALL} | {doctor.CACHED}
  assert found["cpu"]["cores"] >= 1


@pytest.mark.parametrize("isa", ["none", "generic"])
def test_tells_whether_products_on_cpus_are_fast(monkeypatch, capsys, isa):
  monkeypatch.setenv(library.ISA, isa)
  assert cli.main(["doctor"]) == 0
  lines = capsys.readouterr().out.splitlines()
  now = library.status()
  there = now.available
  (processor,) = [line for line in lines if line.startswith("processor")]
  assert processor.endswith(f"C++ library: {now.words}") and now.words.startswith("generic, of" if there else "")
  for operation, takes in ((rows.PRODUCT.computes, "float32 and bfloat16"), (doctor.CACHED, "one query, float32")):
    at = lines.index(operation)
    ways = [line.split("  ")[-1].strip() for line in lines[at + 1 : at + 3]]
    assert ways[0].startswith(f"chosen: takes {takes}" if there else now.words)
    assert ways[1] == ("for the rest: takes all" if there else "chosen: takes all")
  for said in ("GB/s when they read memory", "products read"):
    assert any(said in line for line in lines) == there


@pytest.mark.parametrize("available", [0, 2**10, 2**29, None])
def test_nothing_is_measured_where_memory_is_short(monkeypatch, capsys, available):
  monkeypatch.setattr(doctor.memory, "available", lambda: available)
  assert cli.main(["doctor"]) == 0
  said = capsys.readouterr().out
  assert "C++ library: " in said and "GB/s" not in said


def test_what_is_for_cpus_is_left_out_elsewhere(monkeypatch, capsys):
  gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: None)
  monkeypatch.setattr(doctor.jax, "devices", lambda: [gpu])
  assert cli.main(["doctor"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert quantized.PRODUCT.computes in lines and not any("one CPU" in line or "processor" in line for line in lines)


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_no_device_that_starts_is_told_of(platforms: str):
  environment = os.environ | {"JAX_PLATFORMS": platforms}
  done = subprocess.run(
    [sys.executable, "-m", "glmjax", "doctor"], env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  (line,) = [line for line in done.stdout.splitlines() if line.startswith("devices")]
  assert "none:" in line and platforms in line


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_tries_a_bucket_and_leaves_nothing_there(server, scheme, capsys):
  server.put("kept", b"")
  assert cli.main(["doctor", f"--bucket={scheme}://bucket/folder"]) == 0
  lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
  assert lines["conditions on writes"].strip() == "hold" and "MB/s" in lines["reads"] and server.keys() == ["kept"]
  assert "ms" in lines["copies"] and "16,777,217 bytes in" in lines["writes in parts"] and not server.uploads()


def test_says_what_a_bucket_lacks(server, capsys):
  server.honors_conditions = set()
  for bucket, words in (("s3://bucket", "s3://bucket ignores conditions"), ("s3://elsewhere", "there is no bucket")):
    assert cli.main(["doctor", f"--bucket={bucket}"]) == 2
    assert words in capsys.readouterr().err and server.keys() == []
  server.honors_conditions = {"create", "replace"}
  refused = bucket_server.Fault(status=403, code="AccessDenied")
  for faults in (
    lambda method, path: True,
    lambda method, path: path.endswith("/copy"),
    lambda method, path: path.endswith("/parts"),
    lambda method, path: method == "DELETE" and path.endswith("/given_up"),
  ):
    server.fault = lambda method, path, faults=faults: refused if faults(method, path) else None
    assert cli.main(["doctor", "--bucket=gs://bucket/x"]) == 2
    assert "permission denied" in capsys.readouterr().err
