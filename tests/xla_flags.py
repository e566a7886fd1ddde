"""Flags with which tests have XLA compile for CPUs: they compile much and compute little."""

CHEAP = "--xla_backend_optimization_level=0"  # halves the tests' time


def on(devices: int) -> str:
  """Returns the flags for so many virtual devices."""
  return f"--xla_force_host_platform_device_count={devices} {CHEAP}"
