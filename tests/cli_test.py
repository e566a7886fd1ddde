"""The command's answers to right and wrong command lines: text, exit status, and before JAX loads."""

import errno
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from glmjax import cli, errors
from glmjax.config import signatures
from glmjax.cli import commands, corpus, process
from glmjax.cli import run as run_lib

NUMBERS = itertools.count()
FAKE = """
import dataclasses, errno, os, pathlib, sys, time
from glmjax import errors


@dataclasses.dataclass
class Result:
  steps: int
  name: str


def train(workdir, steps: int = 3, name: str = "a", mode: str = "ok", overwrite: bool = False, on_start=None):
  print("chatter")
  os.makedirs("here", exist_ok=True)
  if mode == "input":
    raise errors.InputError("batch 6 does not divide over 4 devices; use 8")
  if mode == "crash":
    raise RuntimeError("first line\\nsecond line")
  if mode == "disk":
    raise OSError(errno.ENOSPC, "No space left on device", "runs/a/file")
  if mode == "extra":
    import seqio_missing
  on_start(pathlib.Path(workdir))
  if mode == "kill":
    os.kill(os.getpid(), 9)
  if mode == "sleep":
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
  return Result(steps, name)


def generate(prompts, temperature: float = 0.0):
  texts = [prompt if isinstance(prompt, str) else prompt["prompt"] for prompt in prompts]
  return [{"prompt": text, "output": text.upper()} for text in texts]
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """train and generate commands whose functions are in a module of our own."""
  module = f"fakecommand{next(NUMBERS)}"  # a new name each time: gin never forgets a function
  (tmp_path / f"{module}.py").write_text(FAKE)
  (tmp_path / "x.gin").write_text(
    f"from __gin__ import dynamic_registration\nimport {module}\nSTEPS = 5\n{module}.train.steps = %STEPS\n"
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  signatures.find_module.cache_clear()
  table = {
    "train": commands.Command(
      "train",
      f"{module}.train",
      "train",
      "glmjax train",
      (
        commands.Flag("--workdir", "folder"),
        commands.Flag("--name", "name"),
        commands.Flag("--overwrite", "anew", bool, kind="passed"),
      ),
      folder="workdir",
    ),
    "generate": commands.Command(
      "generate",
      f"{module}.generate",
      "generate",
      "glmjax generate",
      commands.COMMANDS["generate"].flags[1:3],
      reads=commands.COMMANDS["generate"].reads,
      show=commands.COMMANDS["generate"].show,
    ),
  }
  monkeypatch.setattr(commands, "COMMANDS", table)
  return module


def run(*arguments, **options):
  return subprocess.run(
    [sys.executable, "-m", "glmjax", *arguments], capture_output=True, text=True, check=False, **options
  )


def one_line(capsys):
  """What went to standard error, which must be one line."""
  text = capsys.readouterr().err
  assert text.startswith("glmjax: ") and text.count("\n") == 1, text
  return text[len("glmjax: ") : -1]


COMMANDS = {command.name: command for top in commands.COMMANDS.values() for command in (top, *top.modes)}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name, capsys):
  assert cli.main([*name.split(), "--help"]) == 0
  example = f"{capsys.readouterr().out.split('example:')[1].rstrip()} --"
  assert f"glmjax {name} --" in example or f"glmjax {name}=" in example  # a mode that takes a value


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_are_parameters_of_the_function(name):
  """Or fields of its groups of settings."""
  command = COMMANDS[name]
  for target in (command.target, *command.groups.values()):
    module_name, _, function = target.rpartition(".")
    signature = signatures.resolve(signatures.find_module(module_name), [function])
    flags = [flag for flag in command.flags if flag.kind != "prepared" and (flag.of or command.target) == target]
    bound = {flag.parameter for flag in flags}
    assert signature.takes_any or bound <= set(signature.parameters), (signature.parameters, bound)


def test_help_and_mistakes_do_not_load_jax():
  code = textwrap.dedent("""
      import sys
      from glmjax import cli
      assert cli.main(["--help"]) == 0
      assert cli.main(["train", "--help"]) == 0
      assert cli.main(["trian"]) == 2
      assert cli.main(["train", "--workdri=x"]) == 2
      assert cli.main(["train", "--gin_file=models/nope.gin"]) == 2
      assert cli.main(["train", "--gin.TRAIN_STEP=3"]) == 2
      loaded = {"jax", "numpy", "tensorflow", "seqio", "orbax"} & set(sys.modules)
      assert not loaded, loaded
  """)
  start = time.monotonic()
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert time.monotonic() - start < 5
  lines = done.stderr.splitlines()
  assert lines[0] == "glmjax: no command trian; did you mean train?"
  assert lines[1] == "glmjax: unknown argument --workdri=x; did you mean --workdir?"
  assert len(lines) == 4


def test_version_and_module_entry():
  done = run("--version")
  assert done.returncode == 0 and done.stdout.startswith("glmjax ")
  assert run().returncode == 0  # the list of commands
  assert run("--workdir=x").returncode == 2


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (["export", "--bits=3"], "--bits is 3: choose one of 8, 4"),
    (["train", "--stop_at_step=abc"], "--stop_at_step is 'abc': give a whole number, 1 or more"),
    (["train", "--stop_at_step"], "expected one argument"),
    (["generate"], "give --prompt, or --file"),
    (["generate", "--prompt=a", "--file=b"], "both given"),
    (["generate", "--checkpoint=m", "--file=nope.txt"], "cannot read nope.txt"),
    (["train", "--gin.STEPS"], "has no value"),
  ],
)
def test_mistakes_in_flags(arguments, expected, capsys):
  assert cli.main(arguments) == 2
  assert expected in one_line(capsys)


def test_json_is_alone_on_standard_output(fake, capsys):
  assert cli.main(["train", "--gin_file=x.gin", "--workdir=here", "--name=it's", "--gin.STEPS=7", "--json"]) == 0
  captured = capsys.readouterr()
  assert json.loads(captured.out) == {"steps": 7, "name": "it's"}
  assert "chatter" in captured.err


def test_gin_file_and_flag_bind_the_function(fake, capsys):
  assert cli.main(["train", "--gin_file=x.gin", "--workdir=here"]) == 0
  assert '"steps": 5' in capsys.readouterr().out
  assert cli.main(["train", "--gin_file=x.gin"]) == 2
  assert f"no value for workdir of {fake}.train" in one_line(capsys)


@pytest.mark.parametrize(
  "mode, status, expected",
  [
    ("input", 2, "batch 6 does not divide over 4 devices; use 8"),
    ("crash", 1, "RuntimeError: first line second line (run again with --debug for the traceback)"),
    ("disk", 2, "runs/a/file: the disk is full: free some space; run the same command again once that is mended"),
    ("extra", 1, "ModuleNotFoundError: No module named 'seqio_missing' (run again with --debug for the traceback)"),
  ],
)
def test_errors_while_running(fake, capsys, mode, status, expected):
  arguments = ["train", "--gin_file=x.gin", "--workdir=here", f"--gin.{fake}.train.mode='{mode}'"]
  assert cli.main(arguments) == status
  assert capsys.readouterr().err == f"glmjax: {expected}\n"
  assert cli.main([*arguments, "--debug"]) == status
  assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_operative_config_is_written_beside_the_result(fake):
  path = pathlib.Path("here", "config.gin")
  arguments = ["train", "--gin_file=x.gin", "--workdir=here"]
  for mode, status in (("input", 2), ("crash", 1)):
    assert cli.main([*arguments, f"--gin.{fake}.train.mode='{mode}'"]) == status
    assert not path.exists()  # the folder may be another run's
  assert cli.main([*arguments, f"--gin.{fake}.train.mode='ok'"]) == 0
  text = path.read_text()
  assert "STEPS = 5" in text and "train.mode = 'ok'" in text and "train.name = 'a'" in text
  assert os.listdir("here") == ["config.gin"]
  assert cli.main(["train", "--gin_file=here/config.gin"]) == 0  # and can be run as it is
  assert cli.main([*arguments, "--overwrite"]) == 0
  assert "overwrite" not in path.read_text()  # a run of config.gin must not overwrite by itself


def test_stages_gather_the_seconds_of_commands(fake):
  for _ in range(2):
    assert cli.main(["train", "--gin_file=x.gin", "--workdir=here", "--stages=stages.jsonl"]) == 0
  assert cli.main(["train", "--gin_file=x.gin", "--stages=stages.jsonl"]) == 2  # not done: not counted
  lines = [json.loads(line) for line in pathlib.Path("stages.jsonl").read_text().splitlines()]
  assert [line["stage"] for line in lines] == ["train", "train"] and lines[0]["seconds"] >= 0


def test_all_lines_of_an_error_are_told():
  """In one; without gin's, and none without end."""
  told, status = cli._describe(ValueError("\n\nshapes:\n  (3,)\n\n  (5,)\n  In call to configurable 'train' (<f>)"))
  assert told.startswith("ValueError: shapes: (3,) (5,) (run again") and status == 1
  assert cli._describe(ValueError(""))[0].startswith("ValueError: no message (")
  assert 1000 < len(cli._describe(ValueError("x\n" * 10**5))[0]) < 1100


def test_missing_extra_is_named():
  error = ModuleNotFoundError("No module named 'seqio'", name="seqio")
  assert cli._describe(error) == ("this needs seqio: pip install 'glmjax[data]'", 2)


@pytest.mark.parametrize(
  "number, status, words",
  [
    (errno.ENOSPC, 2, "the disk is full"),
    (errno.EDQUOT, 2, "quota"),
    (errno.EFBIG, 2, "ulimit -f"),
    (errno.EACCES, 2, "permission denied"),
    (errno.EROFS, 2, "read-only"),
    (errno.ENOENT, 2, "no such file"),
    (errno.ENOTDIR, 2, "a part of the path is a file"),
    (errno.EISDIR, 2, "a folder"),
    (errno.EMFILE, 2, "ulimit -n"),
    (errno.ENAMETOOLONG, 2, "too long"),
    (errno.ENOMEM, 1, "not enough memory"),
    (errno.EIO, 1, "input/output error"),
    (errno.ESTALE, 1, "stale"),
    (errno.ECONNREFUSED, 1, "Connection refused"),
  ],
)
def test_what_the_system_refuses(number, status, words):
  """Status 2 where the user can mend it: a launch script would start in vain a hundred times."""
  message, found = cli._describe(OSError(number, os.strerror(number), "runs/a"))
  assert found == status and message.startswith("runs/a: ") and words in message
  assert "\n" not in message


def start(fake, mode):
  """`glmjax train` of the fake module in a process of its own."""
  code = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
    "from glmjax import cli; from glmjax.cli import commands as c\n"
    f"train = c.Command('train', '{fake}.train', 't', 'e', (c.Flag('--workdir', 'w'),), folder='workdir')\n"
    "c.COMMANDS = {'train': train}\n"
    f"sys.exit(cli.main(['train', '--workdir=here', '--gin.{fake}.train.mode=\"{mode}\"']))"
  )
  environment = {**os.environ, "PYTHONPATH": os.getcwd()}
  return subprocess.Popen(
    [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
  )


def test_an_environment_without_gin_is_one_line():
  code = "import sys; sys.modules['gin'] = None; from glmjax import cli; sys.exit(cli.main(['inspect', 'x']))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert re.fullmatch(r"glmjax: .*gin.*\n", done.stderr), done.stderr


def test_interrupt(fake):
  """Ctrl-C while the command runs: one line and status 130."""
  with start(fake, "sleep") as process:
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == "glmjax: interrupted\n"


def test_configuration_outlives_kill(fake):
  """A run killed at any moment has left its config.gin."""
  with start(fake, "kill") as process:
    assert process.wait(timeout=60) == -signal.SIGKILL
  assert "train.mode = 'kill'" in pathlib.Path("here", "config.gin").read_text()


def test_prompts_from_file_and_standard_input(fake, capsys, monkeypatch):
  pathlib.Path("p.txt").write_text("one [MASK]\n\n二\n", encoding="utf-8")
  assert cli.main(["generate", "--file=p.txt"]) == 0
  assert capsys.readouterr().out == "ONE [MASK]\n\n二\n"
  assert cli.main(["generate", "--prompt=a", "--prompt=b", "--json"]) == 0
  assert [result["output"] for result in json.loads(capsys.readouterr().out)] == ["A", "B"]
  for name, content, expected in (
    ("bad.txt", b"\xff\n", "bad.txt: not UTF-8 at byte 0 (line 1); convert it, say with iconv -t UTF-8"),
    ("empty.txt", b"\n", "empty.txt: empty; expected one text a line"),
  ):
    pathlib.Path(name).write_bytes(content)
    assert cli.main(["generate", f"--file={name}"]) == 2
    assert one_line(capsys) == expected
  with open("p.txt", encoding="utf-8") as stream:
    monkeypatch.setattr(sys, "stdin", stream)
    assert cli.main(["generate", "--file=-"]) == 0


def test_reader_that_leaves_is_no_error():
  """glmjax ... | head"""
  process = subprocess.Popen([sys.executable, "-m", "glmjax", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  process.stdout.close()
  assert b"Traceback" not in process.stderr.read()
  process.stderr.close()
  process.wait(timeout=20)


def test_threads_are_bounded(monkeypatch):
  for name in ("OMP_NUM_THREADS", "NPROC", "OMP_WAIT_POLICY"):
    monkeypatch.delenv(name, raising=False)
  process._limit_threads()
  assert 1 <= int(os.environ["OMP_NUM_THREADS"]) <= os.cpu_count()
  monkeypatch.setenv("NPROC", "1")
  process._limit_threads()
  assert os.environ["NPROC"] == "1"  # what the user set stays


def test_input_error_is_an_ordinary_value_error():
  assert issubclass(errors.InputError, ValueError)


def test_tokenizer_trains_on_no_held_out_document(tmp_path):
  for name in ("en", "zh"):
    (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n\n" for i in range(1, 121)), encoding="utf-8")
  files = {name: [str(tmp_path / f"{name}.txt")] for name in ("en", "zh")}
  documents = [document.strip() for document in corpus.training_documents(files)]
  assert len(documents) == 2 * 118
  assert not {"en 50", "en 100", "zh 50", "zh 100"} & set(documents)


def test_plan_of_sets_takes_models_and_lists(monkeypatch, capsys):
  """`plan --fits`: no gin file, the shipped models, mistakes told."""
  given = {}
  monkeypatch.setattr(
    run_lib,
    "call",
    lambda command, values: (
      given.update(values)
      or [
        {"model": "6b", "bits": 4, "gpu": "rtx3090", "batch": 1, "context": 512, "count": 1}
        | {"peak_bytes_per_device": 5 << 30},
        {"model": "6b", "bits": 4, "gpu": "rtx3090", "batch": 1, "context": 4096, "count": None}
        | {"why": "the model ends"},
      ]
    ),
  )
  assert cli.main(["plan", "--fits", "--model=6b", "--model=130b", "--bits=4", "--context=512", "--context=512"]) == 0
  assert {name: model.num_layers for name, model in given["models"].items()} == {"6b": 28, "130b": 70}
  assert given["bits"] == [4] and given["contexts"] == [512] and "gpus" not in given
  assert "| 6b | 4 | 1 | 512 | 1 (5.0) |\n| 6b | 4 | 1 | 4,096 | - |\n-: the model ends" in capsys.readouterr().out
  for flag, told in (("--model=7b", "6b, 10b, 130b"), ("--context=0", "1 or more"), ("--target=a100-40:8", "--target")):
    assert cli.main(["plan", "--fits", flag]) == 2
    assert told in one_line(capsys)
  assert cli.main(["plan", "--gin_file=plans/glm_130b_int4_rtx3090_4.gin", "--tries=2"]) == 2
  assert "--search" in one_line(capsys)


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {}])
def test_chinese_paths_in_any_locale(locale, tmp_path):
  (tmp_path / "数据").mkdir()
  (tmp_path / "数据" / "我.gin").write_text(
    "from __gin__ import dynamic_registration\nfrom glmjax.evaluate import report\nreport.write.workdir = '数据'\n",
    encoding="utf-8",
  )
  environment = {name: value for name, value in os.environ.items() if name not in ("LC_ALL", "LANG", "PYTHONUTF8")}
  done = subprocess.run(
    [sys.executable, "-m", "glmjax", "report", "--gin_file=数据/我.gin"],
    cwd=tmp_path,
    check=False,
    capture_output=True,
    env=environment | locale,
  )
  assert done.returncode == 2 and "glmjax: 数据/train/metrics.jsonl" in done.stderr.decode(), done.stderr
