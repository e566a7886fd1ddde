"""What a plan says of memory, against what a process takes: the same step, compiled for the processor here, and run."""

import json
import os
import subprocess
import sys

import pytest
import xla_flags

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import estimate, programs, targets

def status(name):
  return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

config = config_lib.GLMConfig(vocab_size=16384, num_layers=2, embed_dim=512, num_heads=8, mlp_dim=2048, max_length=512,
                              scan_layers=True)
work = {"train": programs.Train(4, 256, micro_batch=2), "decode": programs.Decode(32, 512)}[sys.argv[1]]
mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1), jax.devices()[:1])
program = work.program(config, mesh)
compiled = program.traced.lower().compile()
planned = estimate.peak_memory(compiled, program.parts, targets.CHIPS["a100-40"])
train = sys.argv[1] == "train"  # all tokens count; of decoding no row is done
make = lambda: jax.block_until_ready(jax.tree.map(lambda x: jnp.full(x.shape, train, x.dtype), compiled.args_info))
make()  # its own programs are there before anything is measured
before = status("VmRSS")
arguments, keywords = make()
if not train:
  arguments = (*arguments[:-1], jnp.int32(1))  # one token
held = status("VmRSS") - before
arrays = sum(x.nbytes for x in jax.live_arrays())
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
result = compiled(*arguments, **keywords)
jax.block_until_ready(result)
print(json.dumps(planned | {"arrays": arrays, "held": held, "peak": status("VmHWM") - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("work", ["train", "decode"])
def test_a_process_takes_what_is_planned(work):
  """Within 10 %: threads' stacks and the allocator's own are the rest."""
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, work],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "XLA_FLAGS": xla_flags.CHEAP},
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout)
  parts = found["memory"]
  assert found["arrays"] == pytest.approx(sum(parts.values()) - parts["temporaries"], rel=0.01)
  assert found["held"] == pytest.approx(found["arrays"], rel=0.1)
  assert found["peak"] == pytest.approx(found["peak_bytes_per_device"], rel=0.1), parts
