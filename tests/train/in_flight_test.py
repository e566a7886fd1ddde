"""What looks at a whole state on many devices of a CPU does not leave them waiting for each other."""

import os
import subprocess
import sys

import pytest

# XLA ends a process whose devices have waited for each other so long.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=20"
CODE = """
import types
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from glmjax.checkpoint import checksums
from glmjax.train import diagnose

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("data"))
arrays = {str(i): jax.device_put(np.ones((8 * (i + 1), 4096), np.float32), split) for i in range(30)}
state = types.SimpleNamespace(params=arrays, opt_state={}, loss_scale=None)
with jax.set_mesh(mesh):
  for _ in range(20):
    assert diagnose._is_good(state, 1e30)
    checksums.array_sums(arrays)
"""


@pytest.mark.slow
def test_sums_of_many_arrays_do_not_wait_for_ever() -> None:
  subprocess.run([sys.executable, "-c", CODE], env=os.environ | {"XLA_FLAGS": FLAGS}, check=True)
