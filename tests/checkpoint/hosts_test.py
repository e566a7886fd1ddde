"""Checkpoints of several processes: all save, read, pass over and refuse the same step."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

from glmjax.checkpoint import agreement
from glmjax.checkpoint import files

PROGRAM = """
import errno, os, sys
import jax
import numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port, folder, scenario = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"localhost:{port}", 2, index)
from glmjax.checkpoint import manager

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("data",), ()))

def state(step):
  w = np.arange(8, dtype=np.float32).reshape(4, 2) + step
  return {"w": jax.make_array_from_callback((4, 2), split, lambda place: w[place]),
          "rng": jax.make_array_from_callback((4, 2), whole, lambda place: w[place])}

def restore():
  try:
    found, metadata = saver.restore(state(0))
    for name, x in state(metadata["step"]).items():
      for ours, theirs in zip(found[name].addressable_shards, x.addressable_shards):
        assert np.array_equal(ours.data, theirs.data), name
    print("> restored", metadata["step"])
  except Exception as error:
    print(">", type(error).__name__, error)

saver = manager.Manager(folder)
for step in (10, 20):
  saver.save(step, state(step), {"step": step})
saver.wait()
failing = {"missing": errno.ENOENT, "handles": errno.EMFILE, "disk": errno.EIO}.get(scenario)
true_open, true_preadv = os.open, os.preadv

def refuse(path, *arguments, **others):
  if index == 1 and "/20/" in str(path) and str(path).endswith(sys.argv[5]):
    raise OSError(failing, os.strerror(failing), str(path))
  return true_open(path, *arguments, **others)

def garble(descriptor, buffers, offset):
  count = true_preadv(descriptor, buffers, offset)
  if index == 1 and "/20/" in os.readlink(f"/proc/self/fd/{descriptor}"):
    buffers[0][0] ^= 1
  return count

if failing:
  os.open = refuse
if scenario == "garbled":
  os.preadv = garble
restore()
os.open, os.preadv = true_open, true_preadv
saver.save(15, state(15), {"step": 15})  # sets 20 aside, in one process, before the other looks
saver.save(20, state(21), {"step": 21})
restore()
saver.close()
"""


def run(folder: pathlib.Path, scenario: str, victim: str) -> tuple[list[list[str]], list[str]]:
  """What each process says of its restoring, and what it writes to standard error."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  started = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, str(i), str(port), str(folder), scenario, victim],
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for i in (0, 1)
  ]
  outputs = [process.communicate(timeout=200) for process in started]
  assert [process.returncode for process in started] == [0, 0], outputs
  said = [[line for line in out.splitlines() if line.startswith(">")] for out, _ in outputs]  # gloo talks, too
  return said, [err for _, err in outputs]


@pytest.mark.parametrize("scenario, victim", [("missing", "w/1.0"), ("missing", "checksums.json"), ("garbled", "")])
def test_what_one_finds_damaged_all_pass_over(tmp_path, scenario, victim):
  said, [first, second] = run(tmp_path, scenario, victim)
  assert said == [["> restored 10", "> restored 21"]] * 2
  (line,) = [line for line in first.splitlines() if "is damaged" in line]
  where = f"process 1: .*{re.escape(victim)} is missing" if victim else "w .checksum differs: state/w"
  assert re.search(f"20 is damaged, step 10 is used instead: {where}", line), line
  assert "is damaged" not in second and (tmp_path / "20.aside").exists()


@pytest.mark.parametrize("scenario, words", [("handles", "may open no more files"), ("disk", "input/output error")])
def test_what_one_is_refused_ends_all(tmp_path, scenario, words):
  said, errors_ = run(tmp_path, scenario, ".zarray")
  (first, then), (second, later) = said
  assert words in first and first.startswith("> InputError process 1: ") and words in second, said
  assert then == later == "> restored 21" and not any("is damaged" in err for err in errors_)


def test_alone():
  assert agreement.together(lambda: 3) == 3 and agreement.of_first(lambda: "x") == "x"
  for error in (files.DamagedError("x"), OSError(5, "y"), KeyError("z")):

    def fail(error: Exception = error) -> None:
      raise error

    with pytest.raises(type(error)):
      agreement.together(fail)
