"""The quickstart's path, tiny, with every folder in a bucket: the same bytes, losses and answers as on a disk."""

import json
import pathlib
import re

import bucket_server
import forked
import pytest
import tiny_world

_FOLDERS = ("tokenizer", "cache", "run", "float", "int4")
# What tells of the time or of the place; and what Orbax notes of steps: the mesh that saved, that it was jax's arrays.
_OWN = re.compile(
  r".*(config\.gin|(metrics|compute)\.jsonl|_CHECKPOINT_METADATA|commit_success\.txt|\.lock)|.*tensorboard/.*"
  r"|.*/state/(_METADATA|_sharding|array_metadatas/.*)"
)
_RECORD = "metadata/checksums.json"  # of a step; its seconds are its own


def commands(root: str) -> list[list[str]]:
  """The commands, with all that they name below `root`."""
  texts = {language: f"{root}text/{name}" for language, name in (("en", "en.txt"), ("zh", "zh.jsonl"))}
  gin = ["--gin_file=world.gin", f"--gin.TEXT_FILES={texts}", f"--gin.INSTRUCTIONS={{'qa': '{root}text/qa.jsonl'}}"]
  gin += [f"--gin.{name}='{root}{name.lower()}'" for name in ("TOKENIZER", "CACHE")] + [f"--gin.WORKDIR='{root}run'"]
  prompts = ["--prompt=On day 3 the quick", "--prompt=第5天，小河边的[MASK]发芽了"]
  return [
    ["tokenizer", *gin],
    ["cache", *gin],
    ["train", *gin, "--stop_at_step=4"],
    ["train", *gin],
    ["export", *gin, f"--out={root}float"],
    ["export", *gin, f"--out={root}int4", "--bits=4"],
    ["evaluate", *gin, f"--checkpoint={root}float", f"--out={root}heldout.json"],
    ["generate", *gin, f"--checkpoint={root}int4", f"--out={root}answers.jsonl", f"--file={root}prompts.jsonl"],
    ["generate", *gin, f"--checkpoint={root}run", f"--samples={root}samples.jsonl", *prompts],
    ["score", f"--checkpoint={root}float", "--text=the quick brown fox"],
    ["inspect", f"{root}float"],
  ]


def write_text(folder: pathlib.Path) -> None:
  """The world's text, and prompts."""
  tiny_world.write_text(folder)
  lines = [json.dumps({"prompt": f"On day {i} the [MASK] fox"}) + "\n" for i in range(5)]
  (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
  """The folder of all commands' programs: those on a disk and those in a bucket run the same."""
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory, compiled):
  """The folder of all commands' results on a disk, and what they printed."""
  folder = tmp_path_factory.mktemp("disk")
  write_text(folder)
  scratch = tmp_path_factory.mktemp("scratch")
  with forked.Server(scratch, forked.COMMANDS, **forked.compiled_once(compiled)) as server:
    return folder, [run(server, argv, folder) for argv in commands("")]


def run(server: forked.Server, argv: list[str], cwd: pathlib.Path) -> str:
  """What a command prints, once it has ended well."""
  ended = server.command(*argv, cwd=cwd)
  assert ended.status == 0, (argv[0], ended)
  return ended.out


def losses(metrics: bytes) -> list[tuple[int, float]]:
  return [(line["step"], line["loss"]) for line in map(json.loads, metrics.splitlines())]


def plain(key: str, data: bytes) -> bytes | dict:
  """What a file holds, but for which of two equal runs an export is of: its id, in config.json, and sums of that."""
  if key in ("float/config.json", "int4/config.json"):
    content = json.loads(data)
    assert len(content["export"].pop("run")) == 32
    return content
  if key in ("float/checksums.json", "int4/checksums.json"):
    content = json.loads(data)
    del content["files"]["config.json"], content["crc32"]
    return content
  return data


@pytest.mark.parametrize("scheme", ["gs", pytest.param("s3", marks=pytest.mark.slow)])
def test_all_of_it_in_a_bucket(on_disk, compiled, server: bucket_server.Server, scheme, tmp_path):
  disk, printed = on_disk
  for path in [*(disk / "text").iterdir(), disk / "prompts.jsonl"]:
    server.put(path.relative_to(disk).as_posix(), path.read_bytes())
  (tmp_path / "here").mkdir()
  (tmp_path / "here" / "world.gin").write_text(tiny_world.GIN, encoding="utf-8")
  environment = server.environment() | {"GLMJAX_CACHE_DIR": str(tmp_path / "nearby")} | forked.compiled_once(compiled)
  (tmp_path / "scratch").mkdir()
  with forked.Server(tmp_path / "scratch", forked.COMMANDS, **environment) as commands_server:
    said = [run(commands_server, argv, tmp_path / "here") for argv in commands(f"{scheme}://bucket/")]
  for name in _FOLDERS:
    there = {path.relative_to(disk).as_posix() for path in (disk / name).rglob("*") if path.is_file()}
    assert {key for key in server.keys(prefix=f"{name}/") if not _OWN.fullmatch(key)} == {
      key for key in there if not _OWN.fullmatch(key)
    }
    records = {key for key in there if key.endswith(_RECORD)}
    assert len(records) == (3 if name == "run" else 0)
    for key in records:
      assert json.loads(server.data(key))["arrays"] == json.loads((disk / key).read_bytes())["arrays"]
    own = {key for key in there if _OWN.fullmatch(key)}
    other = [(key, server.data(key), (disk / key).read_bytes()) for key in there - own - records]
    assert not [key for key, mine, theirs in other if plain(key, mine) != plain(key, theirs)]
  assert losses(server.data("run/metrics.jsonl")) == losses((disk / "run" / "metrics.jsonl").read_bytes())
  assert server.data("answers.jsonl") == (disk / "answers.jsonl").read_bytes()
  answers = [json.loads(line)["output"] for line in server.data("samples.jsonl").splitlines()]
  assert answers == [json.loads(line)["output"] for line in (disk / "samples.jsonl").read_bytes().splitlines()]
  assert [text.replace(f"{scheme}://bucket/", "") for text in said[-2:]] == printed[-2:]  # score and inspect
  assert any("tensorboard" in key for key in server.keys()) and not server.uploads()
  assert not [path for path in (tmp_path / "here").rglob("*") if path.name != "world.gin"]  # nothing was left here
