"""docs/tutorial.md: each of its gin files is whole, and what it grows is trained, small, in the order of the page."""

import pathlib
import re
import shlex
import shutil

import forked
import gin
import pytest
import tiny_world

import glmjax
from glmjax.cli import commands
from glmjax.config import gin_files
from glmjax.models import params

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
FILES = {
  block.split()[1]: block for block in re.findall(r"^```\n(# \S+\.gin\n.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
}
# What makes a step small enough for a test; batches, ramps, micro-batches, intervals and dtypes stay as they are.
SMALL = ["SEQ_LENGTH=64"] + [
  f"glmjax.models.config.GLMConfig.{name}={size}"
  for name, size in (("num_layers", 2), ("embed_dim", 64), ("num_heads", 2), ("mlp_dim", 96))
]
ONE_DEVICE = ["tiny.gin", "text.gin", "model.gin", "schedule.gin", "intervals.gin", "gpu.gin"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  """Commands on one device, in processes of their own."""
  compiled = forked.compiled_once(tmp_path_factory.mktemp("compiled"))
  with forked.Server(tmp_path_factory.mktemp("server"), forked.COMMANDS, **compiled) as server:
    yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory, server):
  """A folder with the page's files, texts where it wants them, and a cache of these for the quickstart's."""
  folder = tmp_path_factory.mktemp("tutorial")
  for name, text in FILES.items():
    (folder / name).write_text(text, encoding="utf-8")
  tiny_world.write_text(folder)
  (folder / "my" / "english").mkdir(parents=True)
  shutil.move(folder / "text" / "en.txt", folder / "my" / "english")
  shutil.move(folder / "text" / "zh.jsonl", folder / "my" / "chinese.jsonl")
  for argv in (["tokenizer", "--gin.VOCAB_SIZE=512"], ["cache", "--num_shards=2", "--num_workers=0"]):
    ended = server.command(*argv, "--gin_file=text.gin", cwd=folder)
    assert ended.status == 0, ended
  shutil.copytree(folder / "runs" / "mine" / "cache", folder / "runs" / "quickstart" / "cache")
  return folder


def grown(name: str) -> list[str]:
  """The file as it is given to a command: plan.gin stands behind a step's."""
  return ["pod.gin", name] if name == "plan.gin" else [name]


@pytest.mark.parametrize("name", FILES)
def test_files_are_whole(name, tmp_path, monkeypatch):
  """Names, types, references; nothing that a command requires is left open."""
  for each, text in FILES.items():
    (tmp_path / each).write_text(text, encoding="utf-8")
  monkeypatch.chdir(tmp_path)
  gin_files.check(grown(name), [], commands=commands.targets())
  target = "glmjax.plan.planner.plan" if name == "plan.gin" else "glmjax.train.loop.train"
  gin_files.check(grown(name), [], target, commands=commands.targets())


def test_each_file_grows_out_of_the_one_before():
  names = list(FILES)
  assert names == [*ONE_DEVICE, "eight.gin", "pod.gin", "plan.gin"]
  for before, name in zip(names, names[1:-1]):
    assert FILES[name].splitlines()[1] == f'include "{before}"'


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.slow] if i > 1 else []) for i, n in enumerate(ONE_DEVICE)]
)
def test_steps_on_one_device_train(name, folder, server):
  """Two steps of each."""
  overrides = [f"--gin.{binding}" for binding in SMALL]
  ended = server.command("train", f"--gin_file={name}", *overrides, "--stop_at_step=2", cwd=folder)
  assert ended.status == 0, ended
  workdir = re.search(r'^WORKDIR = "(.*)"$', FILES[name], re.MULTILINE)[1]
  assert len((folder / workdir / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_what_was_trained_is_exported_and_answers(folder, server):
  """The commands of the last step, behind those of the GPU's."""
  last = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[-1]
  (folder / "prompts.jsonl").write_text('{"prompt": "On day [MASK]"}\n', encoding="utf-8")
  train = ["train", "--gin_file=gpu.gin", *(f"--gin.{binding}" for binding in SMALL), "--stop_at_step=2"]
  for argv in [train, *(shlex.split(line)[1:] for line in last.splitlines())]:
    ended = server.command(*argv, cwd=folder)
    assert ended.status == 0, ended
  assert len((folder / "answers.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "places", "samples"),
  [
    ("eight.gin", [], 32),
    # XLA's compiler for CPUs ends the process at this mesh's bfloat16.
    (
      "pod.gin",
      ['CACHE = "runs/mine/cache"', 'WORKDIR = "runs/mine/pod"', "VOCAB_SIZE = 8_192", "MICRO_BATCH = 256"]
      + ["glmjax.parallel.mesh.MeshConfig.tensor = 2", 'glmjax.models.config.GLMConfig.dtype = "float32"'],
      256,
    ),
  ],
)
def test_steps_on_many_devices_train(name, places, samples, folder, monkeypatch):
  """One step on eight virtual ones, over which the files' meshes are laid."""
  monkeypatch.chdir(folder)
  run = glmjax.train(name, bindings=[*SMALL, *places], stop_at_step=1)
  assert run.figures["samples_seen"] == samples


@pytest.mark.parametrize(
  ("name", "told"),
  [
    ("tiny.gin", "has 0.6 million parameters"),
    ("model.gin", "17.3 million parameters"),
    ("gpu.gin", "317 million parameters"),
    ("pod.gin", "6.7 billion parameters"),
  ],
)
def test_sizes_are_as_told(name, told, tmp_path, monkeypatch):
  for each, text in FILES.items():
    (tmp_path / each).write_text(text, encoding="utf-8")
  monkeypatch.chdir(tmp_path)
  gin_files.parse([name], [], "glmjax.train.loop.train", [], commands.targets())
  number, unit = re.search(r"([\d.]+) (million|billion)", told).groups()
  count = params.count(gin.get_configurable("glmjax.models.config.GLMConfig")())
  digits = len(number.partition(".")[2])
  assert told in PAGE and f"{count / {'million': 1e6, 'billion': 1e9}[unit]:.{digits}f}" == number
