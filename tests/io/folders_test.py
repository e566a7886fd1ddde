"""What folders are, and who may write there."""

import json
import os
import pathlib

import pytest

from glmjax import errors
from glmjax.io import folders
from glmjax.io import owner

Kind = folders.Kind
MODEL = {"vocab_size": 8, "num_layers": 1, "embed_dim": 4}


def write(folder: pathlib.Path, files: dict[str, object]) -> None:
  for name, content in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


FILES = {
  Kind.RUN: {
    "config.json": {"model": MODEL},
    "checkpoints/5/metadata/checksums.json": {},
    "metrics.jsonl": "",
    "layers.jsonl": "",
    "compute.jsonl": "",
    "compute-12.jsonl": "",
    "interventions.jsonl": "",
    "interventions.gin": "",
    "tokenizer/tokenizer.model": "",
  },
  Kind.EXPORT: {
    "config.json": {"model": MODEL, "export": {"bits": 4}},
    "checksums.json": {},
    "params/_METADATA": "",
    "params/embedding.table/0.0": "",
    "params/embedding.table/.zarray": "",
    "tokenizer/tokenizer.json": "",
  },
  Kind.CACHE: {
    "manifest.json": {"tasks": {}, "mixture": "m"},
    "config.gin": "",
    "tokenizer/tokenizer.model": "",
    "en/train-00000-of-00001.tokens": "",
    "en/train-00000-of-00001.documents": "",
  },
  Kind.TOKENIZER: {"tokenizer.model": "", "tokenizer.json": {}, "config.gin": ""},
  Kind.TEXT: {"en.jsonl": "", "zh.jsonl": ""},
  Kind.WEIGHTS: {"config.json": {"model_type": "chatglm"}, "model.safetensors": ""},
}
WHOLE = (Kind.EXPORT, Kind.CACHE, Kind.TOKENIZER)


@pytest.fixture(name="made")
def _made(tmp_path):
  """A folder of each kind, named after it."""
  for kind, files in FILES.items():
    write(tmp_path / kind.name, files)
  return tmp_path


def state(folder: pathlib.Path) -> dict[str, int]:
  return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", FILES)
def test_each_kind_is_told_by_its_marks(made, kind):
  assert folders.kinds(made / kind.name) == [kind]


@pytest.mark.parametrize("damage", ['{"mod', "[]", "", "[" * 100_000])
def test_damaged_marks(made, damage):
  """What cannot be read is still no free place."""
  write(made, {"RUN/config.json": damage, "CACHE/manifest.json": damage, "EXPORT/config.json": damage})
  for kind in (Kind.RUN, Kind.CACHE, Kind.EXPORT):
    assert folders.kinds(made / kind.name) == [kind]


def test_unfinished_caches_and_runs(tmp_path):
  write(tmp_path / "a.partial", {"progress/plan.json": {}})
  write(tmp_path / "b", {"config.json": {"model": MODEL}})
  assert folders.kinds(tmp_path / "a.partial") == [Kind.CACHE] and folders.kinds(tmp_path / "b") == [Kind.RUN]
  assert folders.kinds(tmp_path) == folders.kinds(tmp_path / "none") == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", [Kind.RUN, *WHOLE])
def test_no_kind_takes_over_another(made, kind, overwrite):
  before = state(made)
  for other in FILES:
    if other is kind:
      assert folders.claim(made / kind.name, kind, "x", overwrite=overwrite) == made / kind.name
      continue
    (made / "link").unlink(missing_ok=True)
    (made / "link").symlink_to(made / other.name)
    for path in (made / other.name, made / "link", f"{made}/./{kind.name}/../{other.name}/"):
      with pytest.raises(errors.InputError, match=f"{other.name} is {other.value}: choose another folder") as caught:
        folders.claim(path, kind, "x", overwrite=overwrite)
      assert "\n" not in str(caught.value)
  (made / "link").unlink()
  assert {k: v for k, v in state(made).items()} == before


@pytest.mark.parametrize("kind", [Kind.RUN, *WHOLE])
def test_free_places(made, kind):
  """What is missing or empty is; a folder of other things only for a run, which owns names of its own."""
  (made / "empty").mkdir()
  for path in (made / "empty", made / "new" / "deep", made / "RUN" / "beside", made / "TEXT" / "beside"):
    assert folders.claim(path, kind, "x") == path
  write(made, {"thesis/thesis.tex": "", "mine/config.gin": "", "mine/notes": "", "file": ""})
  if kind is Kind.RUN:
    assert folders.claim(made / "thesis", kind, "x", overwrite=True)
  else:
    with pytest.raises(errors.InputError, match=r"holds other things \(thesis.tex\) and is not"):
      folders.claim(made / "thesis", kind, "x", overwrite=True)
  with pytest.raises(errors.InputError, match=r"holds other things \(config.gin"):
    folders.claim(made / "mine", kind, "x")
  with pytest.raises(errors.InputError, match="can be no folder: a part of the path is a file"):
    folders.claim(made / "file", kind, "x")
  for path, message in (
    ("", "x is empty"),
    ("gs://b/run", "a bucket is named as"),
    ("file:///x", "glmjax knows local paths"),
  ):
    with pytest.raises(errors.InputError, match=message):
      folders.claim(path, kind, "x")
  with pytest.raises(errors.InputError, match="holds other things"):
    folders.claim("/", Kind.EXPORT, "x")


@pytest.mark.parametrize("kind", WHOLE)
def test_only_what_is_wholly_of_the_kind_is_replaced(made, kind):
  """A note or a run in it is not lost with it; what a killed process left there is."""
  folder = made / kind.name
  write(folder, {f".x.{owner.host()}.99999999.tmp": ""})
  folders.claim(folder, kind, "x", overwrite=True)
  for stranger in ("notes.txt", "run/config.json", "tokenizer/deep/x", "params/notes.txt", "en/notes"):
    write(folder, {stranger: ""})
    assert folders.claim(folder, kind, "x") == folder
    with pytest.raises(errors.InputError, match=rf"more than {kind.value} \({stranger}\), which would be deleted"):
      folders.claim(folder, kind, "x", overwrite=True)
    (folder / stranger).unlink()


def test_nothing_is_made_inside_what_is_replaced_whole(made):
  for parent in WHOLE:
    for kind in (Kind.RUN, *WHOLE, Kind.TEXT):
      with pytest.raises(errors.InputError, match=f"lies in {parent.value}, .* would be deleted with it"):
        folders.claim(made / parent.name / "deep" / "x", kind, "x")
  for name in ("checkpoints/x", "tokenizer", "tokenizer/x", "tensorboard"):
    with pytest.raises(errors.InputError, match="lies in a training run"):
      folders.claim(made / "RUN" / name, Kind.EXPORT, "x")


def test_sources_are_safe(made):
  for kind, out, source in (
    (Kind.EXPORT, "EXPORT", "EXPORT"),
    (Kind.EXPORT, "EXPORT", "EXPORT/params"),
    (Kind.RUN, "RUN", "RUN"),
    (Kind.RUN, "RUN", "RUN/checkpoints/export"),
  ):
    (made / "link").unlink(missing_ok=True)
    (made / "link").symlink_to(made / source)
    for path in (made / source, made / "link"):
      with pytest.raises(errors.InputError, match="is the source itself|holds the source"):
        folders.claim(made / out, kind, "x", overwrite=True, sources=[path])
  folders.claim(made / "RUN", Kind.RUN, "x", sources=[made / "RUN" / "beside", made / "EXPORT"])
  folders.claim(made / "RUN" / "int4", Kind.EXPORT, "x", sources=[made / "RUN"])


def test_files(made):
  for name in (
    "RUN/config.json",
    "RUN/metrics.jsonl",
    "RUN/layers.jsonl",
    "RUN/compute.jsonl",
    "RUN/compute-12.jsonl",
    "RUN/interventions.gin",
    "RUN/checkpoints/5/x",
    "EXPORT/checksums.json",
    "CACHE/manifest.json",
    "CACHE/en/train-00000-of-00001.tokens",
    "TOKENIZER/tokenizer.model",
    "TEXT/en.jsonl",
    "WEIGHTS/config.json",
    "WEIGHTS/model.safetensors",
    "WEIGHTS/ice_text.model",
  ):
    with pytest.raises(errors.InputError, match=r"--out: .* belongs to"):
      folders.claim_file(made / name, "--out")
  for name in ("RUN/heldout.json", "EXPORT/heldout.json", "WEIGHTS/answers.jsonl", "new/x", "x.json"):
    assert folders.claim_file(made / name, "--out") == made / name
  with pytest.raises(errors.InputError, match="--out: .* is a folder; name a file"):
    folders.claim_file(made, "--out")
  os.mkfifo(made / "fifo")
  for special in (made / "fifo", pathlib.Path("/dev/null")):
    with pytest.raises(errors.InputError, match="no regular file"):
      folders.claim_file(special, "--out")
    assert folders.claim_file(special, "--out", stream=True) == special
  (made / "link").symlink_to(made / "RUN" / "config.json")
  with pytest.raises(errors.InputError, match="belongs to a training run"):
    folders.claim_file(made / "link", "--out")


def test_what_is_unfinished_in_a_bucket_is_the_next_writer_s_of_its_kind(server):
  server.put("out/.unfinished", b'{"last": "checksums.json"}')
  server.put("out/config.json", b"{}")
  assert folders.claim("gs://bucket/out", folders.Kind.EXPORT, "--out")
  for kind in (folders.Kind.RUN, folders.Kind.CACHE, folders.Kind.TEXT):
    with pytest.raises(errors.InputError, match="holds what a writer has not finished: choose another folder"):
      folders.claim("gs://bucket/out", kind, "--out")
  server.put("out/notes.txt", b"")
  with pytest.raises(errors.InputError, match="and notes.txt, which would be deleted with it"):
    folders.claim("gs://bucket/out", folders.Kind.EXPORT, "--out")
