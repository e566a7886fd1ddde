"""Every writer killed at its changes on the disk, and run again: nothing half-done stands there or is left."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


def kill(tmp_path: pathlib.Path, names: str, points: int) -> dict[str, list[dict]]:
  """The reports of each writer's kills."""
  done = subprocess.run(
    [sys.executable, HERE / "kills.py", tmp_path / "drill", names, str(points)],
    check=False,
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found: dict[str, list[dict]] = {}
  for line in map(json.loads, done.stdout.splitlines()):
    if "writer" in line:
      reports = found.setdefault(line["writer"], [])
    else:
      reports.append(line)
  return found


def check(found: dict[str, list[dict]], names: str) -> None:
  assert list(found) == names.split(",")
  for name, reports in found.items():
    assert reports
    for report in reports:
      assert report["status"] == -9 and report["again"] == 0 and report["after"] == "new", (name, report)
      assert report["names"] == ["deep" if name == "tokenizer" else "out"], (name, report)
      assert report["left"] in ("old", "new", *(() if name in ("cache-over", "export-over") else ("none",))), report


LIGHT, HEAVY = "tokenizer,cache,cache-over", "run,run-over,adapter,export,export-over,import,import-over"


@pytest.mark.parametrize(
  "names, points",
  [(LIGHT, 8), pytest.param(LIGHT, 1000, marks=pytest.mark.slow), pytest.param(HEAVY, 6, marks=pytest.mark.slow)],
)
def test_killed_writers(tmp_path, names, points):
  check(kill(tmp_path, names, points), names)
