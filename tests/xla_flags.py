"""Flags with which tests have XLA compile for CPUs: they compile much and compute little."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

# Code that is not optimized halves the tests' time. Without the emitters of fusions what compiles much takes three
# fifths of the rest; jaxlib 0.11 and later have no other emitters, and end a process that asks for others.
_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
_OTHER_EMITTERS = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
CHEAP = "--xla_backend_optimization_level=0" + (f" {_EMITTERS}" if _OTHER_EMITTERS else "")


def on(devices: int) -> str:
  """Returns the flags for so many virtual devices."""
  return f"--xla_force_host_platform_device_count={devices} {CHEAP}"


def run_as_users_do(test: str) -> bool:
  """Runs a test in a process with the emitters that users have, unless this one has them; returns whether it did.

  Args:
    test: its node in pytest.

  Raises:
    AssertionError: it fails there; with all that the process printed.
  """
  flags = os.environ.get("XLA_FLAGS", "").split()
  if _EMITTERS not in flags:
    return False
  process = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", test],
    env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    | {"XLA_FLAGS": " ".join(flag for flag in flags if flag != _EMITTERS)},
    cwd=pathlib.Path(__file__).parents[1],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert process.returncode == 0, process.stdout
  return True
