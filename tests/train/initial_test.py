"""A run that begins with the weights of another."""

import dataclasses
import json

import chex
import pytest

from glmjax import errors
from glmjax.checkpoint import export
from glmjax.checkpoint import load
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import base
from glmjax.train import loop
from glmjax.train import schedules

MESH = mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)


def train(workdir, config, source, rate: float = 1e-2, **changes) -> dict:
  constant = schedules.Constant(rate)
  return loop.train(config, source, workdir, schedules.Batches(16), 10**6, constant, mesh=MESH, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny, source):
  folder = tmp_path_factory.mktemp("trained")
  train(folder, tiny, source, stop_at_step=4)
  return folder


def test_begins_where_the_other_ended(trained, tmp_path, tiny, source):
  export.export(trained, tmp_path / "export")
  for name, weights in (("a", trained), ("b", tmp_path / "export")):
    train(tmp_path / name, tiny, source, rate=0.0, weights=weights, stop_at_step=1)
    begun, ended = load.load(tmp_path / name), load.load(trained)
    chex.assert_trees_all_equal(begun.params, ended.params)
  first = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])
  assert (first["step"], first["samples_seen"]) == (1, 16)
  resumed = train(tmp_path / "a", tiny, source, rate=0.0, weights=tmp_path / "gone", stop_at_step=1)
  assert resumed["step"] == 1  # its own checkpoint counts


def test_other_models_and_tokenizers_are_refused(trained, tmp_path, tiny):
  export.export(trained, tmp_path / "int8", bits=8)
  base.check(trained, dataclasses.replace(tiny, dtype="float16", hidden_dropout=0.1, max_length=64), {})
  for folder, config, message in (
    (tmp_path / "int8", tiny, "quantized to 8 bits"),
    (trained, dataclasses.replace(tiny, num_layers=3), "num_layers is 2 there and 3 here"),
    (trained, dataclasses.replace(tiny, mlp="gelu"), "mlp is geglu there and gelu here"),
    (tmp_path, tiny, str(tmp_path)),
  ):
    with pytest.raises(errors.InputError, match=message) as caught:
      base.check(folder, config, {})
    assert "\n" not in str(caught.value)
  copied = tmp_path / "copied"
  copied.mkdir()
  config = json.loads((trained / "config.json").read_text())
  (copied / "config.json").write_text(json.dumps(config | {"tokenizer": {"fingerprint": "a" * 64}}))
  base.check(copied, tiny, {"tokenizer": "a" * 64})
  with pytest.raises(errors.InputError, match="another tokenizer than the data .aaaaaaaa, not bbbbbbbb."):
    base.check(copied, tiny, {"tokenizer": "b" * 64})


def test_nothing_is_deleted_for_weights_that_do_not_fit(trained, tmp_path, tiny, source):
  train(tmp_path / "run", tiny, source, stop_at_step=1)
  with pytest.raises(errors.InputError, match="num_layers is 2 there and 3 here"):
    train(tmp_path / "run", dataclasses.replace(tiny, num_layers=3), source, weights=trained, overwrite=True)
  assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
