"""ChatGLM-6B's two matrices, head and table: which of them is the model's head, and what the files get back."""

import json
import pathlib

import chex
import numpy as np
import pytest

from glmjax import errors
from glmjax.checkpoint import export
from glmjax.checkpoint import load as ours
from glmjax.models import params as params_lib
from glmjax.thudm import inspection
from glmjax.thudm import load
from glmjax.thudm import shards
from glmjax.thudm import source
from glmjax.thudm import write

HEAD, TABLE = "lm_head.weight", "transformer.word_embeddings.weight"


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
  return {key: tensor.whole() for key, tensor in shards.open_hub(folder).ranks[0].items()}


def rewrite(folder: pathlib.Path, said: bool | None, change=lambda found: None) -> pathlib.Path:
  """Changes the folder's tensors, and what its config.json says of tying (None: nothing, as the Hub's)."""
  found = arrays(folder)
  change(found)
  for path in folder.glob("model*"):
    path.unlink()
  write.write_safetensors(
    folder, [write.Item(key, x.dtype, x.shape, lambda x=x: iter([x])) for key, x in found.items()]
  )
  config = json.loads((folder / "config.json").read_text())
  config.pop("tie_word_embeddings", None)
  (folder / "config.json").write_text(json.dumps(config if said is None else config | {"tie_word_embeddings": said}))
  return folder


def table_as_head(found: dict[str, np.ndarray]) -> None:
  found[HEAD] = found[TABLE].copy()


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("said", [None, True])
def test_two_matrices_of_a_tied_model(make, tmp_path, caplog, said, bits):
  """As transformers has it: the head is the table, whatever lm_head.weight is."""
  hub = rewrite(make(tmp_path / "hub", "chatglm-6b", bits=bits), said)
  result = load.import_model("chatglm-6b", hub, tmp_path / "ours")
  loaded = ours.load(tmp_path / "ours")
  assert loaded.config.tie_embeddings and "head" not in loaded.params
  assert params_lib.count(loaded.config) == result["parameters"]
  why = "does not name tie_word_embeddings, which is true by default" if said is None else "says tie_word_embeddings"
  line = f"{HEAD} is not {TABLE}, and config.json {why}: the head is the table"
  assert line in result["note"] and caplog.text.count(line) == 1
  export.export(tmp_path / "ours", tmp_path / "back", write_format=write.write_format("chatglm-hf"))
  back, there = arrays(tmp_path / "back"), arrays(hub)
  np.testing.assert_array_equal(back[HEAD], there[TABLE])
  assert back.keys() == there.keys()
  for key in back.keys() - {HEAD}:
    np.testing.assert_array_equal(back[key], there[key])
  assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is True


def test_two_matrices_of_a_model_that_is_not_tied(make, tmp_path, caplog):
  hub = make(tmp_path / "hub", "chatglm-6b")  # says so
  load.import_model("chatglm-6b", hub, tmp_path / "ours")
  assert "the two are not tied: both are taken" in caplog.text
  loaded = ours.load(tmp_path / "ours")
  assert not loaded.config.tie_embeddings
  np.testing.assert_array_equal(loaded.params["head"]["kernel"].T, arrays(hub)[HEAD])
  export.export(tmp_path / "ours", tmp_path / "back", write_format=write.write_format("chatglm-hf"))
  assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is False
  load.import_model("chatglm-6b", tmp_path / "back", tmp_path / "again")
  chex.assert_trees_all_equal(ours.load(tmp_path / "again").params, loaded.params)


@pytest.mark.parametrize("said", [None, True, False])
def test_equal_matrices_are_one(make, tmp_path, monkeypatch, caplog, said):
  """Bit for bit, NaN included; compared a few rows at a time."""
  monkeypatch.setattr(source, "_COMPARED", 1000)

  def with_nan(found):
    found[TABLE][3, 5] = np.nan
    table_as_head(found)

  hub = make(tmp_path / "hub", "chatglm-6b")
  for change in (with_nan, table_as_head):
    opened = source.open_source("chatglm-6b", rewrite(hub, said, change))
    assert opened.config.tie_embeddings and opened.note is None
    if change is with_nan:
      rewrite(hub, said, lambda found: found[TABLE].__setitem__((3, 5), 1))
  load.import_model("chatglm-6b", hub, tmp_path / "ours")
  assert HEAD not in caplog.text

  def size(name):
    return sum(path.stat().st_size for path in (tmp_path / name / "params").rglob("*"))

  rewrite(hub, False, lambda found: found[HEAD].__setitem__((-1, -1), 7))
  load.import_model("chatglm-6b", hub, tmp_path / "both")
  assert size("both") - size("ours") > 480 * 64 * 2


@pytest.mark.parametrize("kept", [HEAD, TABLE])
def test_one_matrix_in_the_files(make, tmp_path, kept):
  """transformers saves tied matrices once, under either name."""

  def change(found):
    table_as_head(found)
    found.pop(TABLE if kept == HEAD else HEAD)

  hub = make(tmp_path / "hub", "chatglm-6b")
  table = arrays(hub)[TABLE]
  load.import_model("chatglm-6b", rewrite(hub, None, change), tmp_path / "ours")
  np.testing.assert_array_equal(ours.load(tmp_path / "ours").params["embedding"]["table"], table)
  (tmp_path / "hub/config.json").write_text(
    json.dumps(json.loads((hub / "config.json").read_text()) | {"tie_word_embeddings": False})
  )
  with pytest.raises(errors.InputError, match=f"{TABLE if kept == HEAD else HEAD} is missing"):
    source.open_source("chatglm-6b", hub)


def test_quantized_embeddings_are_refused(make, tmp_path):
  """chatglm-6b-int4-qe."""

  def change(found):
    for key in (HEAD, TABLE):
      found[key] = found[key].view("i1")
      found[key + "_scale"] = np.ones(480, "f2")

  hub = rewrite(make(tmp_path / "hub", "chatglm-6b", bits=4), None, change)
  with pytest.raises(errors.InputError, match="is quantized, as in chatglm-6b-int4-qe, which is not read: take"):
    source.open_source("chatglm-6b", hub)


def test_inspect_tells(make, tmp_path, capsys):
  hub = make(tmp_path / "hub", "chatglm-6b")
  for said, words in ((False, "a head of its own"), (None, "head tied"), (True, "head tied")):
    report = inspection.inspect(rewrite(hub, said))
    assert report["problem"] is None and report["model"]["tie_embeddings"] == (words == "head tied")
    inspection.show(report)
    shown = capsys.readouterr().out
    assert words in shown and f"note: {HEAD} is not {TABLE}" in shown
