"""How commands end when a bucket does not answer: with status 1, after which launch scripts start them again; with 2
where that would not help.
"""

import ast
import copy
import errno
import itertools
import os
import pathlib
import pickle
import socket
import subprocess
import sys

import bucket_server
import forked
import pytest
import tiny_world
import xla_flags

from glmjax import errors
from glmjax.data import workers
from glmjax.io import bucket

_URL = "gs://bucket"
_GIN = ["--gin_file=world.gin", f"--gin.CACHE='{_URL}/cache'", f"--gin.TOKENIZER='{_URL}/tokenizer'"]
_TEXTS = f"--gin.TEXT_FILES={{'en': '{_URL}/text/en.txt', 'zh': '{_URL}/text/zh.jsonl'}}"
_PAIRS = f"--gin.INSTRUCTIONS={{'qa': '{_URL}/text/qa.jsonl'}}"
_ANSWERS = [f"--out={_URL}/new/answers.jsonl", f"--samples={_URL}/new/samples.jsonl"]
COMMANDS = {
  "cache": ["cache", *_GIN, _TEXTS, _PAIRS, f"--directory={_URL}/new", "--num_workers=0"],
  "train": ["train", *_GIN, f"--workdir={_URL}/run", "--gin.TOTAL_SAMPLES=48"],
  "export": ["export", f"--checkpoint={_URL}/run", f"--out={_URL}/new", "--bits=4"],
  "import": ["import", "chatglm-6b", f"{_URL}/hub", f"{_URL}/new"],
  "evaluate": ["evaluate", *_GIN, f"--checkpoint={_URL}/export", f"--out={_URL}/new.json"],
  "generate": ["generate", f"--checkpoint={_URL}/export", "--prompt=On day 3", "--max_tokens=2", *_ANSWERS],
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
  """The folder of all commands' programs."""
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def world(tmp_path_factory, compiled):
  """The folder of a tiny run and its models, on a disk."""
  folder, scratch = tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("scratch")
  with forked.Server(scratch, forked.COMMANDS, **forked.compiled_once(compiled)) as server:
    tiny_world.make(folder, server)
  return folder


@pytest.fixture
def run(world, compiled, server, tmp_path):
  """A function that gives a command to processes whose bucket holds the world; at each call as it was at first."""
  for path in world.rglob("*"):
    if path.is_file():
      server.put(path.relative_to(world).as_posix(), path.read_bytes())
  there = dict(server.objects["bucket"])
  (tmp_path / "scratch").mkdir()
  (tmp_path / "world.gin").write_text(tiny_world.GIN, encoding="utf-8")
  environment = {bucket.PATIENCE: "0.2", "GLMJAX_CACHE_DIR": str(tmp_path / "nearby")} | forked.compiled_once(compiled)

  with forked.Server(tmp_path / "scratch", forked.COMMANDS, **environment) as processes:

    def call(argv, fault):
      server.objects["bucket"], server.fault = copy.copy(there), fault
      server.log.clear()
      return processes.command(*argv, cwd=tmp_path)

    yield call


def _after(count: int, fault: bucket_server.Fault):
  """Lets so many requests pass before the fault begins, which lasts."""
  numbers = itertools.count()
  return lambda method, path: fault if next(numbers) >= count else None


def _check_one_line(ended: forked.Ended) -> None:
  assert ended.line.startswith("glmjax: ") and "Traceback" not in ended.err and "Error" not in ended.line, ended


@pytest.mark.parametrize(
  "name, tries",
  [
    pytest.param(name, tries, marks=[pytest.mark.slow] if tries > 2 or name == "train" else [])
    for name in COMMANDS
    for tries in (2, 12)
  ],
)
def test_no_answer_is_status_1(run, server, name, tries):
  """An outage that begins early, later, ... and lasts longer than there is patience."""
  assert run(COMMANDS[name], lambda method, path: None).status == 0
  requests = len(server.log)
  for i in range(tries):
    fault = bucket_server.Fault(drop=True) if i % 2 else bucket_server.Fault(status=503)
    ended = run(COMMANDS[name], _after(requests * (2 * i + 1) // (3 * tries), fault))
    assert ended.status == 1, (i, ended)
    _check_one_line(ended)


def test_rows_that_processes_of_their_own_cannot_read_are_status_1(run):
  fault = bucket_server.Fault(status=503)
  ended = run(COMMANDS["train"], lambda method, path: fault if path.endswith(".tokens") else None)
  assert ended.status == 1 and ".tokens" in ended.line, ended
  _check_one_line(ended)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_bucket_and_no_permission_are_status_2(run, name):
  elsewhere = [argument.replace(_URL, "gs://elsewhere") for argument in COMMANDS[name]]
  refused = bucket_server.Fault(status=403, code="AccessDenied")
  for argv, fault, words in (
    (elsewhere, lambda method, path: None, "there is no bucket gs://elsewhere"),
    (COMMANDS[name], lambda method, path: refused, "permission denied"),
    (COMMANDS[name], lambda method, path: refused if method in ("PUT", "POST") else None, "permission denied"),
  ):
    ended = run(argv, fault)
    assert ended.status == 2 and words in ended.line, ended
    _check_one_line(ended)


def test_what_may_pass_is_told_from_causes_and_between_processes():
  def raised(error: OSError) -> errors.InputError:
    try:
      raise errors.InputError("a line") from error
    except errors.InputError as caught:
      return caught

  for number, passes in ((errno.EREMOTEIO, True), (errno.EIO, True), (errno.EACCES, False), (errno.ENOSPC, False)):
    error = raised(OSError(number, "x"))
    assert errors.may_pass(error) == passes
    assert errors.may_pass(pickle.loads(pickle.dumps(workers._picklable(error)))) == passes
  assert not errors.may_pass(errors.InputError("x")) and not errors.may_pass(OSError("x")) and not errors.may_pass(None)


def test_what_is_raised_for_an_oserror_tells_of_it():
  """So that it can be told whether the next try may go well."""
  found = []
  for path in sorted((pathlib.Path(__file__).parents[1] / "glmjax").rglob("*.py")):
    for handler in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(handler, ast.ExceptHandler) and handler.name and "OSError" in ast.unparse(handler.type):
        for each in ast.walk(handler):
          if (
            isinstance(each, ast.Raise) and "InputError" in ast.unparse(each) and handler.name in ast.unparse(each.exc)
          ):
            if each.cause is None or ast.unparse(each.cause) != handler.name:
              found.append(f"{path.name}:{each.lineno}")
  assert not found


@pytest.mark.slow
@pytest.mark.parametrize(
  "part", ["run/.lock", "checkpoints/12/", "checkpoints/8/state"], ids=["begin", "save", "go_on"]
)
def test_all_processes_of_a_run_end_with_status_1(world, server, tmp_path, part):
  """Where process 0 alone gets no answer too: the launch scripts look at all."""
  for path in world.rglob("*"):
    if path.is_file():
      server.put(path.relative_to(world).as_posix(), path.read_bytes())
  (tmp_path / "world.gin").write_text(tiny_world.GIN, encoding="utf-8")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  settings = {bucket.PATIENCE: "1", "XLA_FLAGS": xla_flags.CHEAP, "GLMJAX_CACHE_DIR": str(tmp_path / "nearby")}
  server.fault = lambda method, path: bucket_server.Fault(status=503) if part in path else None
  command = [sys.executable, "-m", "glmjax", *COMMANDS["train"], "--gin.mesh.MeshConfig.data=-1", "--num_processes=2"]
  started = [
    subprocess.Popen(
      [*command, f"--coordinator=localhost:{port}", f"--process_id={i}"],
      cwd=tmp_path,
      env={**os.environ, **settings, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in (0, 1)
  ]
  said = [process.communicate(timeout=200)[1] for process in started]
  assert [process.returncode for process in started] == [1, 1], said
  assert not any("Traceback" in each for each in said)
