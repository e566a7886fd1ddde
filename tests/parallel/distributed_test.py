"""What counts as a run of several processes, and what is left alone."""

import os

import jax
import pytest

from glmjax import errors
from glmjax.cli import commands, hosts, run
from glmjax.parallel import distributed

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
CLUSTERS = ("SLURM_", "OMPI_", "PMI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "CUDA_VISIBLE")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
  """No cluster of ours."""
  for name in list(os.environ):
    if name.startswith(CLUSTERS):
      monkeypatch.delenv(name)


@pytest.mark.parametrize(
  "environment, cluster",
  [
    ({}, None),
    (STEP, "SLURM"),
    (STEP | {"SLURM_NTASKS": "1"}, None),  # srun of one task
    ({name: value for name, value in STEP.items() if "STEP" not in name}, None),  # the batch script, outside of srun
    ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}, "Open MPI"),
    ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "TPU pod"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "TPU pod"),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod of its own
  ],
)
def test_clusters(monkeypatch, environment, cluster):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert distributed._cluster() == cluster


def test_one_machine_is_left_as_it_is():
  before = jax.config.jax_cpu_collectives_implementation
  assert distributed.join() == 1 and not distributed.joined()
  assert distributed.join("localhost:1", 1, 0) == 1
  assert jax.config.jax_cpu_collectives_implementation == before and not jax.distributed.is_initialized()


def test_mpi_that_jax_cannot_read(monkeypatch):
  monkeypatch.setenv("PMI_SIZE", "2")
  monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.InputError, match="pip install mpi4py, or give --coordinator"):
    distributed.join()


@pytest.mark.parametrize(
  "visible, tasks, gpus",
  [
    ("0,1,2,3", "1(x2)", [0, 1, 2, 3]),  # one task a node: all of it
    ("0,1,2,3", "4(x2)", None),  # one GPU each: JAX takes that of the task's rank
    ("0", "4(x2)", [0]),  # bound by SLURM to one
    ("0,1", "1,2", None),
    ("", "1(x2)", None),
  ],
)
def test_gpus_of_a_slurm_task(monkeypatch, visible, tasks, gpus):
  monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
  monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
  assert distributed._slurm_gpus() == gpus


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--coordinator=h:1"], "--num_processes and --process_id missing"),
    (["--num_processes=2", "--process_id=0"], "--coordinator missing"),
    (["--coordinator=h", "--num_processes=2", "--process_id=0"], "give HOST:PORT"),
    (["--coordinator=h:x", "--num_processes=2", "--process_id=0"], "give HOST:PORT"),
    (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "--process_id is 2 of --num_processes 2"),
    ([], None),
    (["--coordinator=[::1]:99", "--num_processes=2", "--process_id=1"], None),
  ],
)
def test_flags(flags, message):
  options = run._parse_command(commands.COMMANDS["train"], flags)
  if message is None:
    assert hosts.check(options) == {}
  else:
    with pytest.raises(errors.InputError, match=message):
      hosts.check(options)
  assert hosts.is_first()
