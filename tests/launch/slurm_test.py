"""A SLURM of this one machine, and a training of two tasks through launch/slurm.sbatch."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import patterns
import pytest
import xla_flags

MISSING = [
  name
  for name in ("slurmctld", "slurmd", "munged", "sbatch")
  if not shutil.which(name, path=(f"{os.environ['PATH']}:/usr/sbin"))
]
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: apt-get install slurm-wlm munge"),
  pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts tasks as their users: it needs root"),
]
SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "slurm.sbatch"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
MailProg=/bin/true
NodeName=localhost NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000
PartitionName=all Nodes=localhost Default=YES
"""


def free_ports(count: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for free in sockets:
      free.bind(("localhost", 0))
    return [free.getsockname()[1] for free in sockets]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
  """The environment in which SLURM's commands find it."""
  folder = tmp_path_factory.mktemp("slurm")
  folder.chmod(0o755)
  for name in ("state", "spool"):
    (folder / name).mkdir()
  (folder / "munge.key").write_bytes(os.urandom(1024))
  (folder / "munge.key").chmod(0o600)
  (folder / "slurm.conf").write_text(
    CONFIGURATION.format(host=socket.gethostname().split(".")[0], folder=folder, ports=free_ports(2))
  )
  environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
  files = [
    f"--{name}={folder}/munge.{end}"
    for name, end in (
      ("key-file", "key"),
      ("socket", "socket"),
      ("pid-file", "pid"),
      ("log-file", "log"),
      ("seed-file", "seed"),
    )
  ]
  commands = ["munged", "--force", "--foreground", *files], ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]
  daemons = []
  with open(folder / "log", "wb") as log:
    for command in commands:
      daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
      time.sleep(1)
    try:
      ends = time.monotonic() + 60
      while (
        "idle"
        not in subprocess.run(
          ["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True, check=False
        ).stdout
      ):
        assert time.monotonic() < ends, (folder / "log").read_text()
        time.sleep(0.5)
      yield environment
    finally:
      subprocess.run(["scancel", "-u", "root"], env=environment, check=False)
      time.sleep(2)
      for daemon in reversed(daemons):
        daemon.kill()
        daemon.wait()


def lines(workdir: pathlib.Path) -> list[dict]:
  file = workdir / "metrics.jsonl"
  written = file.read_text().splitlines(True) if file.exists() else []
  return [json.loads(line) for line in written if line.endswith("\n")]


def test_two_tasks_and_one_dies(slurm, tmp_path):
  """The job starts the training again, which goes on; all of it is the run of one process."""
  gin_file, workdir, read, out = tmp_path / "p.gin", tmp_path / "run", tmp_path / "read", tmp_path / "out"
  gin_file.write_text(patterns.GIN)
  read.mkdir()
  command = tmp_path / "glmjax"
  command.write_text(f"#!{sys.executable}\nimport sys\nfrom glmjax import cli\nsys.exit(cli.main())\n")
  command.chmod(0o755)
  flags = [f"--gin_file={gin_file}", "--gin.patterns.Source.seconds=0.5"]
  environment = slurm | {
    "GLMJAX": str(command),
    "PYTHONPATH": str(pathlib.Path(patterns.__file__).parent),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": xla_flags.on(2),
  }
  job = subprocess.run(
    [
      "sbatch",
      "--parsable",
      "--ntasks-per-node=2",
      f"--output={out}",
      str(SCRIPT),
      *flags,
      f"--workdir={workdir}",
      f"--gin.patterns.Source.batches_read={str(read)!r}",
    ],
    env=environment,
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  try:
    ends = time.monotonic() + 240
    while len(lines(workdir)) < 5:
      assert time.monotonic() < ends, out.read_text()
      time.sleep(0.2)
    assert len(list(read.iterdir())) == 2  # named by the tasks' process ids
    os.kill(int(sorted(read.iterdir())[-1].stem), signal.SIGKILL)
    while subprocess.run(["squeue", "-h", "-j", job], env=slurm, capture_output=True, text=True, check=False).stdout:
      assert time.monotonic() < ends, out.read_text()
      time.sleep(0.5)
  finally:
    subprocess.run(["scancel", job], env=slurm, check=False, capture_output=True)
  said = out.read_text()
  assert "start 2 of the training" in said and said.count("resumed at step") == 1, said
  assert [line["step"] for line in lines(workdir)] == list(range(1, 11)), said
  alone = subprocess.run(
    [command, "train", *flags, f"--workdir={tmp_path / 'alone'}"],
    capture_output=True,
    text=True,
    check=False,
    env=environment | {"XLA_FLAGS": environment["XLA_FLAGS"].replace("count=2", "count=4")},
  )
  assert alone.returncode == 0, alone.stderr
  ours, theirs = ([line["loss"] for line in lines(tmp_path / name)] for name in ("run", "alone"))
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
