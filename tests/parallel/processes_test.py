"""What several hosts agree on, in real processes on this machine."""

import os
import socket
import subprocess
import sys

import pytest

from glmjax.parallel import processes

PROGRAM = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port, fails = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "fails"
jax.distributed.initialize(f"localhost:{port}", 2, index)
from glmjax.parallel import processes

def action():
  assert jax.process_index() == 0
  print("> acted")
  if fails:
    raise OSError("no room")

try:
  processes.on_first(action)
  print("> went on")
except Exception as error:
  print(">", type(error).__name__, error)
"""


@pytest.mark.parametrize(
  "outcome, first, second",
  [
    ("works", ["> acted", "> went on"], ["> went on"]),
    ("fails", ["> acted", "> OSError no room"], ["> InputError process 0 could not begin: its own message says why"]),
  ],
)
def test_all_hear_of_the_first_one(outcome: str, first: list[str], second: list[str]):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  started = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, str(index), str(port), outcome],
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for index in (0, 1)
  ]
  outputs = [process.communicate(timeout=120) for process in started]
  said = [[line for line in out.splitlines() if line.startswith(">")] for out, _ in outputs]  # gloo talks, too
  assert said == [first, second], outputs


def test_alone():
  called = []
  processes.on_first(lambda: called.append(1))
  assert called == [1]
  with pytest.raises(ZeroDivisionError):
    processes.on_first(lambda: 1 // 0)
