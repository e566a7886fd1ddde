"""Every mistake in a gin file or override gets one line with the place and the nearest right name."""

import contextlib
import os
import subprocess
import sys
import time

import gin
import pytest

from glmjax import errors
from glmjax.config import gin_checker, gin_files, signatures

LOOP = """
import dataclasses
from fakelib.parts import Adam, constant as flat


@dataclasses.dataclass(frozen=True)
class Model:
  num_layers: int
  width: int = 64
  hidden: list = dataclasses.field(init=False, default=None)


@dataclasses.dataclass(frozen=True)
class WideModel(Model):
  depth_scale: float = 1.0


def train(model, optimizer=None, num_steps: int = 10, name: str | None = None, *, rate: float = 0.1):
  return {"model": model, "optimizer": optimizer, "num_steps": num_steps, "rate": rate, "name": name}


def anything(**kwargs):
  return kwargs


class Plain:
  def __init__(self, size, colour="red"):
    self.size = size

  def grow(self, by=1):
    return self.size + by
"""
PARTS = """
def constant(value=1.0):
  return value


def export(model, out):
  return out


class Adam:
  def __init__(self, b1=0.9, b2=0.95):
    self.b1, self.b2 = b1, b2
"""
HEAD = "from __gin__ import dynamic_registration\nfrom fakelib import loop\n"
RUN = (
  HEAD
  + """import fakelib.parts
TRAIN_STEPS = 20
MODEL = @loop.WideModel()
loop.train:
  model = %MODEL
  optimizer = @fakelib.parts.Adam()
  num_steps = %TRAIN_STEPS
loop.WideModel.num_layers = 2
loop.WideModel.depth_scale = 2
fakelib.parts.Adam.b1 = 0.8
"""
)


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
  """A package to configure, in the working directory."""
  (tmp_path / "fakelib").mkdir()
  (tmp_path / "fakelib" / "__init__.py").write_text("")
  (tmp_path / "fakelib" / "loop.py").write_text(LOOP)
  (tmp_path / "fakelib" / "parts.py").write_text(PARTS)
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "train.gin").write_text(RUN)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  for name in [name for name in sys.modules if name.split(".")[0] == "fakelib"]:
    del sys.modules[name]
  signatures.find_module.cache_clear()
  signatures._names.cache_clear()
  with gin.config.interactive_mode():  # lets each test register its own fakelib
    yield tmp_path


def message(text="", overrides=(), files=(), **options):
  """The error for a file of that text; asserts that it is one line and that nothing was imported."""
  if text:
    with open("x.gin", "w", encoding="utf-8") as file:
      file.write(text)
    files = [*files, "x.gin"]
  with pytest.raises(errors.InputError) as caught:
    gin_files.check(files, overrides, **options)
  assert "fakelib" not in sys.modules and "fakelib.loop" not in sys.modules
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_good_file_passes_and_binds():
  gin_files.parse(
    ["runs/train.gin"],
    ["TRAIN_STEPS=3", "loop.train.rate=0.5", "fakelib.parts.Adam.b2=0.7"],
    entry="fakelib.loop.train",
  )
  result = gin_files.configured("fakelib.loop.train")()
  assert result["num_steps"] == 3 and result["rate"] == 0.5
  assert (result["optimizer"].b1, result["optimizer"].b2) == (0.8, 0.7)
  assert result["model"].num_layers == 2 and result["model"].depth_scale == 2
  written = gin_files.operative_config()
  assert "TRAIN_STEPS = 3" in written and "loop.train.name = None" in written
  with open("again.gin", "w", encoding="utf-8") as file:
    file.write(written)
  gin_files.parse(["again.gin"], entry="fakelib.loop.train", commands=["fakelib.loop.train"])
  assert gin_files.configured("fakelib.loop.train")()["num_steps"] == 3


def test_function_that_no_file_names():
  gin_files.parse([], [])
  assert gin_files.configured("fakelib.parts.constant")() == 1.0


def test_file_not_found():
  assert "did you mean runs/train.gin?" in message(files=["runs/trian.gin"])
  assert "did you mean runs/train.gin?" in message(files=["train.gin"])


def test_what_is_replaced_may_leave_others_idle():
  command = dict(entry="fakelib.loop.train", commands=["fakelib.loop.train"])
  gin_files.check(["runs/train.gin"], ["loop.train.optimizer=None"], **command)
  with open("x.gin", "w", encoding="utf-8") as file:
    file.write("include 'runs/train.gin'\n" + HEAD + "loop.train.optimizer = None\n")
  gin_files.check(["x.gin"], **command)
  with open("y.gin", "w", encoding="utf-8") as file:
    file.write(RUN.replace("  optimizer = @fakelib.parts.Adam()\n", ""))
  assert "y.gin:11: nothing uses fakelib.parts.Adam" in message(files=["y.gin"], **command)


def test_include_is_followed():
  text = "include 'runs/train.gin'\n" + HEAD + "loop.train.num_steps = %TRAIN_STEP\n"
  assert message(text) == "x.gin:4: %TRAIN_STEP is not defined; did you mean TRAIN_STEPS?"
  assert message("include 'runs/tran.gin'\n") == "x.gin:1: no gin file runs/tran.gin; did you mean runs/train.gin?"
  assert "includes itself" in message("include 'x.gin'\n")


@pytest.mark.parametrize(
  "text, place",
  [
    (HEAD + "loop.train.num_steps == 3\n", "x.gin:3: "),
    (HEAD + "loop.train.num_steps = abc\n", "x.gin:3: "),
    (HEAD + "loop.train.num_steps = (1,\n", "x.gin:"),
    (HEAD + "loop.train:\nnum_steps = 3\n", "x.gin:"),
    ("import fakelib.loop, fakelib.parts\n", "x.gin:1: "),
    (HEAD + "loop.train.name = 'abc\n", "x.gin:3"),
  ],
)
def test_syntax_error(text, place):
  assert message(text).startswith(place)


def test_unknown_module_function_parameter():
  start = "from __gin__ import dynamic_registration\n"
  assert "x.gin:2: no module fakelib.lop; did you mean fakelib.loop?" == message(start + "from fakelib import lop\n")
  moved = message(start + "from glmjax.models import pipeline\n")
  assert moved == "x.gin:2: no module glmjax.models.pipeline; did you mean glmjax.train.pipeline?"
  renamed = message(start + "from glmjax.train import pipeline\npipeline.Schedule.rounds = 2\n")
  assert "glmjax.train.pipeline has no Schedule; it has KINDS, PipelineConfig, Pipeline, make" in renamed
  assert "fakelib.loop is a module" in message(start + "from fakelib.loop import train\n")
  assert "nosuchlib is not installed" in message(start + "import nosuchlib\n")
  assert "x.gin:3: fakelib.loop has no trian; did you mean train?" in message(HEAD + "loop.trian.num_steps = 3\n")
  assert "has no Admam; did you mean Adam?" in message(HEAD + "loop.train.optimizer = @loop.Admam()\n")
  found = message(HEAD + "loop.train.num_step = 3\n")
  assert found.startswith("x.gin:3: loop.train has no parameter num_step; did you mean num_steps? (fakelib/loop.py:")
  assert "did you mean num_layers?" in message(HEAD + "loop.WideModel.num_layer = 3\n")
  assert "has no parameter hidden" in message(HEAD + "loop.Model.hidden = 3\n")
  assert "did you mean colour?" in message(HEAD + "loop.Plain.color = 'blue'\n")
  assert "has no parameter self" in message(HEAD + "loop.Plain.grow.self = 1\n")
  assert "it takes b1, b2" in message(HEAD + "loop.Adam.b3 = 1\n")  # imported into loop
  assert "no import provides lop; did you mean loop?" in message(HEAD + "lop.train.num_steps = 3\n")
  assert "is a module" in message(start + "import fakelib.loop\nfakelib.loop.train = 3\n")
  assert "begin the file with" in message("from fakelib import loop\nloop.train.num_steps = 3\n")


def test_accepts_what_source_cannot_tell():
  with open("x.gin", "w", encoding="utf-8") as file:
    file.write(HEAD + "loop.anything.colour = 1\nloop.flat.value = 2.0\nloop.Plain.grow.by = 2\n")
    file.write("import math\nmath.sqrt.x = 1\n")
  gin_files.check(["x.gin"])


def test_macros():
  assert message(files=["runs/train.gin"], overrides=["TRAIN_STEP=3"]) == (
    "--gin.TRAIN_STEP: no gin file uses the macro TRAIN_STEP; did you mean TRAIN_STEPS?"
  )
  unused = message(HEAD + "STEPS = 3\n")
  assert unused == "x.gin:3: nothing uses the macro STEPS; remove the line, or use it as %STEPS"
  typo = message(HEAD + "TRAIN_STEP = 3\nloop.train.num_steps = %TRAIN_STEPS\n")
  assert typo == "x.gin:4: %TRAIN_STEPS is not defined; did you mean TRAIN_STEP?"
  assert "(nor B)" in message(HEAD + "loop.train.num_steps = %A\nloop.train.rate = [%B]\n")


def test_required_names_every_one():
  text = HEAD + "OUT = %gin.REQUIRED\nloop.train.name = %OUT\nloop.train.model = %gin.REQUIRED\n"
  found = message(text)
  assert "--gin.OUT=VALUE --gin.loop.train.model=VALUE" in found and "x.gin:3, x.gin:5" in found
  gin_files.check(["x.gin"], ["OUT='there'", "loop.train.model=1"])


def test_scopes():
  text = HEAD + "wide/loop.Model.width = 3\nloop.train.model = @wide/loop.Model()\n"
  with open("x.gin", "w", encoding="utf-8") as file:
    file.write(text)
  gin_files.check(["x.gin"])
  assert "nothing uses the scope wied/; did you mean wide?" in message(text + "wied/loop.Model.width = 4\n")


def test_overrides():
  files = ["runs/train.gin"]
  assert "has no value" in message(files=files, overrides=["TRAIN_STEPS"])
  assert "'--gin.loop.train.name=\"runs/a\"'" in message(files=files, overrides=["loop.train.name=runs/a"])
  assert "did you mean rate?" in message(files=files, overrides=["loop.train.raet=1"])
  assert "no import provides train; did you mean loop.train?" in message(files=files, overrides=["train.rate=1"])
  assert message(files=files, overrides=["=3"]).startswith("--gin.")
  assert message(files=files, overrides=["import fakelib=3"]).startswith("--gin.")
  gin_files.check(files, ["glmjax.tokens.SpecialTokens.mask=1"])  # a full name needs no import in a file


def test_types_of_our_own_parameters(monkeypatch, library):
  """The fake library counts as ours."""
  monkeypatch.setattr(gin_checker, "OURS", "fakelib")
  assert message(files=["runs/train.gin"], overrides=["TRAIN_STEPS='3'"]) == (
    "--gin.TRAIN_STEPS: loop.train.num_steps takes int, not '3' (a str); write 3 without quotes"
  )
  assert "takes int, not 1000000.0" in message(files=["runs/train.gin"], overrides=["TRAIN_STEPS=1e6"])
  assert "takes str | None, not 3" in message(files=["runs/train.gin"], overrides=["loop.train.name=3"])
  gin_files.check(["runs/train.gin"], ["loop.train.rate=1", "loop.train.name=None"])


def test_one_file_serves_every_command():
  """A command needs, and imports, only what its own function depends on."""
  with open("all.gin", "w", encoding="utf-8") as file:
    file.write(
      RUN
      + """
OUT = %gin.REQUIRED
fakelib.parts.export.out = %OUT
fakelib.parts.export.model = @wide/loop.Model()
wide/loop.Model.num_layers = 7
"""
    )
  commands = ["fakelib.loop.train", "fakelib.parts.export"]
  lines = gin_files.check(["all.gin"], (), "fakelib.loop.train", commands=commands).lines
  assert not any("OUT" in line or "Model.num_layers = 7" in line for line in lines)
  assert "num_steps = %TRAIN_STEPS" in "\n".join(lines)
  assert "--gin.OUT=VALUE" in message(files=["all.gin"], entry="fakelib.parts.export", commands=commands)
  lines = gin_files.check(["all.gin"], ["OUT='o'"], "fakelib.parts.export", commands=commands).lines
  assert not any("TRAIN_STEPS" in line for line in lines)
  unused = message(HEAD + "loop.Plain.size = 3\n", files=["all.gin"], entry=commands[0], commands=commands)
  assert unused.startswith("x.gin:3: nothing uses loop.Plain; did you mean loop.train?")
  gin_files.check(["all.gin", "x.gin"], ["loop.train.name=@loop.Plain()"], commands[0], commands=commands)


def test_module_imported_for_its_effect(library):
  (library / "fakelib" / "effect.py").write_text("import os\nos.environ['FAKELIB_EFFECT'] = '1'\n")
  with open("x.gin", "w", encoding="utf-8") as file:
    file.write("from __gin__ import dynamic_registration\nimport fakelib.effect\n")
  os.environ.pop("FAKELIB_EFFECT", None)
  gin_files.parse(["x.gin"], entry="fakelib.parts.constant")
  assert os.environ.pop("FAKELIB_EFFECT") == "1"


@pytest.mark.parametrize(
  "source, words",
  [
    (b"def grow(:\n", r"fakelib/own.py, line 1: no Python source \(.*\): mend it"),
    (b"size = 1\n\0\n", r"fakelib/own.py.*: no Python source"),
    (b"import fakelib.no_such\ndef grow(size=1): pass\n", r"x.gin:5: fakelib.own cannot .*No module named 'fakelib.no"),
    (b"1 / 0\ndef grow(size=1): pass\n", r"x.gin:5: fakelib.own cannot be imported \(ZeroDivisionError: division"),
    (
      b"raise ValueError('a\\nb')\ndef grow(size=1): pass\n",
      r"x.gin:5: fakelib.own cannot be imported .ValueError: a b.:",
    ),
  ],
)
def test_a_module_of_the_users_that_cannot_be_imported(library, source, words):
  (library / "fakelib" / "own.py").write_bytes(source)
  with open("x.gin", "w", encoding="utf-8") as file:
    file.write(HEAD + "import fakelib.own\nloop.train.model = 1\nfakelib.own.grow.size = 2\n")
  with pytest.raises(errors.InputError, match=words):
    gin_files.parse(["x.gin"])


def test_a_module_of_the_users_that_needs_an_extra(library):
  (library / "fakelib" / "own.py").write_text("raise ModuleNotFoundError('none', name='seqio.x')\ngrow = 1\n")
  with open("x.gin", "w", encoding="utf-8") as file:
    file.write(HEAD + "import fakelib.own\nloop.train.model = 1\nfakelib.own.grow.size = 2\n")
  with pytest.raises(ModuleNotFoundError):  # the command line says what to install
    gin_files.parse(["x.gin"])


def test_modules_of_one_name(library):
  (library / "fakelib" / "more").mkdir()
  (library / "fakelib" / "more" / "__init__.py").write_text("")
  (library / "fakelib" / "more" / "parts.py").write_text("def grow(size=1):\n  return size\n")
  with open("x.gin", "w", encoding="utf-8") as file:
    file.write(
      HEAD + "from fakelib import parts\nfrom fakelib.more import parts as others\n"
      "loop.train.model = {'a': @parts.constant(), 'b': [(@others.grow(), 'x')]}\n"
      "parts.constant.value = 5\nothers.grow.size = 6\n"
    )
  gin_files.parse(["x.gin"], entry="fakelib.loop.train")
  assert gin_files.configured("fakelib.loop.train")()["model"] == {"a": 5, "b": [(6, "x")]}
  assert "more_parts" in gin_files.operative_config()


def test_macros_in_a_circle():
  assert "defined by itself" in message(HEAD + "A = [%B]\nB = %A\nloop.train.name = %A\n")


def test_error_that_only_gin_finds_has_its_place():
  with open("x.gin", "w", encoding="utf-8") as file:
    file.write(HEAD + "import math\nloop.train.model = 1\nloop.train.name = @math.sqroot()\n")
  with pytest.raises(errors.InputError, match="x.gin:5: .*sqroot"):
    gin_files.parse(["x.gin"], entry="fakelib.loop.train")


def test_entry_needs_its_parameters():
  assert message(entry="fakelib.loop.train").startswith("no value for model of fakelib.loop.train: add the --gin_file")
  gin_files.check([], [], entry="fakelib.loop.train", given=["model"])
  gin_files.check(["runs/train.gin"], [], entry="fakelib.loop.train")


def test_what_is_called_gets_its_parameters():
  command = dict(entry="fakelib.loop.train", commands=["fakelib.loop.train"])
  text = HEAD + "loop.train.model = @loop.WideModel()\n"
  assert message(text, **command) == (
    "x.gin:3: no value for num_layers of loop.WideModel: bind loop.WideModel.num_layers in the file, or add "
    "--gin.loop.WideModel.num_layers=VALUE"
  )
  gin_files.check(["x.gin"], ["loop.WideModel.num_layers=2"], **command)
  gin_files.check(["x.gin"], given=["model"], **command)  # what is bound is never called
  gin_files.check(["x.gin"], ["loop.train.model=1"], **command)
  macro = HEAD + "MODEL = {'a': [@wide/loop.Model()]}\nloop.train.model = %MODEL\n"
  assert message(macro, **command).startswith("x.gin:3: no value for num_layers of wide/loop.Model: bind wide/loop.Mo")
  gin_files.check(["x.gin"], ["wide/loop.Model.num_layers=2"], **command)
  gin_files.check(["x.gin"], ["loop.Model.num_layers=2"], **command)
  other = macro + "loop.train.name = @flat/loop.Model()\nflat/loop.Model.num_layers = 2\n"
  assert message(other, **command).startswith("x.gin:3: no value for num_layers of wide/loop.Model")
  with open("x.gin", "w", encoding="utf-8") as file:  # a scope is entered for all that is called within
    file.write(
      HEAD + "loop.train.model = @wide/loop.Plain()\nloop.Plain.size = @loop.Model()\nwide/loop.Model.num_layers = 2\n"
    )
  gin_files.check(["x.gin"], **command)


def test_what_is_passed_uncalled_gets_its_parameters_later(library):
  (library / "fakelib" / "own.py").write_text("import fakelib\n@fakelib.fills\ndef grow(size):\n  return size\n")
  for value in ("@loop.WideModel", "@fakelib.own.grow()"):
    with open("x.gin", "w", encoding="utf-8") as file:
      file.write(HEAD + f"import fakelib.own\nloop.train.model = {value}\n")
    gin_files.check(["x.gin"], entry="fakelib.loop.train", commands=["fakelib.loop.train"])


def test_not_utf8(library):
  (library / "bad.gin").write_bytes(b"A = '\xff'\n")
  assert message(files=["bad.gin"]) == ("bad.gin: not UTF-8 at byte 5 (line 1); convert it, say with iconv -t UTF-8")


def test_what_editors_write(library):
  """A byte order mark, any line ends, Chinese names; UTF-16 is named."""
  text = RUN.replace("TRAIN_STEPS = 20", "TRAIN_STEPS = 20\nloop.train.name = '数据'")
  for written in (text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode(), text.replace("\n", "\r").encode()):
    (library / "数.gin").write_bytes(written)
    assert "'数据'" in "\n".join(gin_files.check(["数.gin"], entry="fakelib.loop.train").lines)
  for encoding, expected in (("utf-16", "UTF-16, not UTF-8"), ("utf-16-le", "NUL"), ("utf-16-be", "NUL")):
    (library / "数.gin").write_bytes(text.encode(encoding))
    assert expected in message(files=["数.gin"])


def test_paths_of_files(library, monkeypatch):
  monkeypatch.setenv("HOME", str(library))
  gin_files.check(["~/runs/train.gin"], entry="fakelib.loop.train")
  (library / "folder.gin").mkdir()
  os.mkfifo(library / "pipe.gin")  # would wait for ever
  for name, expected in (
    ("folder.gin", "no regular file"),
    ("pipe.gin", "no regular file"),
    ("", "is empty"),
    ("gs://b/x.gin", "a bucket is named as"),
    ("hdfs://b/x.gin", "glmjax knows"),
    ("a\0b", "NUL"),
  ):
    assert expected in message(files=[name])
    assert expected in message(f"include {name!r}\n")


@pytest.mark.parametrize(
  "value, expected",
  [
    ("[" * 500 + "]" * 500, "nested too deep"),
    ("[" * 100_000, "nested too deep"),
    ("{[]: 1}", "as a key"),
    ("9" * 5000, "more than 4,300 digits"),
    ("float('inf')", "not a gin value"),
    ("f'{1}'", "not a gin value"),
    ("'\\x'", "truncated"),
  ],
)
def test_values_that_no_parser_likes(value, expected):
  found = message(HEAD + f"loop.train.name = {value}\n")
  assert found.startswith("x.gin") and expected in found and len(found) < 300


def test_packaged_files_are_in_order():
  """Each model file, and each run file with what its header says to add, is checked by the command tests."""
  assert gin_files.packaged_folder().is_dir()


def test_error_comes_without_jax():
  """Measured from process start, on a mistake in a parameter of the library itself."""
  code = (
    "import sys; from glmjax import errors; from glmjax.config import gin_files\n"
    "try: gin_files.check([], ['glmjax.tokens.SpecialTokens.maks=1'])\n"
    "except errors.InputError as e: print(e)\n"
    "sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'tensorflow', 'glmjax.tokens')))"
  )
  start = time.monotonic()
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0 and "did you mean mask?" in done.stdout, done
  assert time.monotonic() - start < 5


REQUIRED = [
  'CACHE="cache"',
  "BATCH_SIZE=8",
  "TOTAL_SAMPLES=80",
  "PEAK_LEARNING_RATE=1e-3",
  "MIN_LEARNING_RATE=1e-4",
  "WARMUP_SAMPLES=8",
]


def packaged(pattern):
  return sorted(
    str(path.relative_to(gin_files.packaged_folder())) for path in gin_files.packaged_folder().glob(pattern)
  )


# What a run's header says to add; for the others, the cache.
MODELS = {"runs/pretrain.gin": ["models/tiny.gin"], "runs/pretrain_glm10b.gin": ["models/glm_110m.gin"]}
SETTINGS = {run: REQUIRED for run in MODELS} | {
  "runs/quickstart.gin": [],
  "runs/quickstart_causal.gin": [],
  "runs/uncached.gin": [],
  "runs/chatglm_6b.gin": ['CACHE="cache"', 'WEIGHTS="imported"'],
}
SETTINGS["runs/continue.gin"] = ['BASE="model"', 'CACHE="cache"', 'TEXT_FILES={"zh": "zh/"}']
SETTINGS |= {run: ['BASE="model"', 'DATA=["pairs.jsonl"]'] for run in packaged("runs/finetune*.gin")}


@pytest.mark.parametrize("mesh", packaged("meshes/*.gin"))
@pytest.mark.parametrize("run", packaged("runs/*.gin"))
def test_every_run_trains_on_every_mesh(run, mesh):
  from glmjax.cli import commands  # the command line's own list

  reads = "finetune" in run or "continue" in run
  refused = reads and "130b" in mesh  # GLM-130B's mesh says how its model computes, and these read theirs
  with pytest.raises(errors.InputError, match="nothing uses config.GLMConfig") if refused else contextlib.nullcontext():
    gin_files.check(
      [run, *MODELS.get(run, []), mesh],
      SETTINGS.get(run, ['CACHE="cache"']),
      entry="glmjax.train.loop.train",
      commands=commands.targets(),
      given=["workdir"],
    )


RISING = [run for run in SETTINGS if "warmup_samples" in (gin_files.packaged_folder() / run).read_text()]


@pytest.mark.parametrize("run", [*RISING, "runs/continue.gin"])
def test_a_run_is_made_short_by_two_names(run):
  """However short: TOTAL_SAMPLES and WARMUP_SAMPLES say how long the rate rises and falls."""
  gin_files.parse(
    [run, *MODELS.get(run, []), "meshes/cpu.gin"],
    [*SETTINGS[run], "TOTAL_SAMPLES=96", "WARMUP_SAMPLES=16"],
    entry="glmjax.train.loop.train",
    given=["workdir"],
  )
  try:
    rate = gin.query_parameter("glmjax.train.loop.train.learning_rate").scoped_configurable_fn()
  finally:
    gin.clear_config()
  assert (rate.decay_samples, rate.warmup_samples) == (96, 16)


@pytest.mark.parametrize("files", [["data/pairs.gin"], ["data/pairs.gin", "data/replay.gin"]])
def test_data_takes_the_place_of_a_runs(files):
  from glmjax.cli import commands

  given = [*REQUIRED, 'DATA=["pairs.jsonl"]', 'TOKENIZER="model"']
  files = ["runs/pretrain.gin", "models/tiny.gin", "meshes/cpu.gin", *files]
  common = dict(entry="glmjax.train.loop.train", commands=commands.targets(), given=["workdir"])
  if "data/replay.gin" in files:
    with pytest.raises(errors.InputError, match="REPLAY"):
      gin_files.check(files, given, **common)
    given.append('REPLAY={"en": "en.txt"}')
  gin_files.check(files, given, **common)


def test_files_in_buckets(library, server):
  text = b"from __gin__ import dynamic_registration\nfrom glmjax.plan import fits\n"
  server.put("conf/inner.gin", text + b"fits.smallest.layers = 4\n")
  server.put("conf/outer.gin", text + b"include 'gs://bucket/conf/inner.gin'\nfits.smallest.layers = -\n")
  gin_files.check(["s3://bucket/conf/inner.gin"], given=["models"], entry="glmjax.plan.fits.smallest")
  assert "gs://bucket/conf/outer.gin:4" in message(files=["gs://bucket/conf/outer.gin"])
  assert "gs://bucket/none.gin: it does not exist" in message(files=["gs://bucket/none.gin"])
