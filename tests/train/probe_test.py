"""What a run forgets: both losses are the base's own objective on any mesh, measured once, and compared row by row."""

import dataclasses
import errno
import json
import types
from typing import Any

import chex
import jax
import numpy as np
from answer_pairs import Pairs
import patterns
import pytest

from glmjax import errors
from glmjax.checkpoint import export
from glmjax.models import glm
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.train import loop
from glmjax.train import objective as objective_lib
from glmjax.train import preference
from glmjax.train import probe
from glmjax.train import schedules
from glmjax.train import trainable

MESH = mesh_lib.MeshConfig(data=8)
INTERVALS = loop.Intervals(log=1, save=1, evaluate=2, eval_samples=20)
LORA = trainable.LoRA(rank=2)


@dataclasses.dataclass(frozen=True)
class Text:
  """A DataSource of rows that are none of the tests' other ones, of different numbers of tokens."""

  seq_length: int = 16
  first: int = 5000

  def describe(self) -> dict:
    return {"name": "text", "first": self.first}

  def batches(self, plan, process_index=0, process_count=1):
    for first, size in plan:
      count = size // process_count
      made = [patterns.row(self.first + first + process_index * count + i) for i in range(count)]
      yield {name: np.stack([row[name] for row in made]) for name in made[0]}


@dataclasses.dataclass(frozen=True)
class Few(Text):
  """The first rows of it again and again."""

  count: int = 11  # of which a mesh of 8 reads some more

  def samples_once(self) -> int:
    return self.count

  def batches(self, plan, process_index=0, process_count=1):
    assert process_count == 1
    for first, size in plan:
      made = [patterns.row(self.first + (first + i) % self.count) for i in range(size)]
      yield {name: np.stack([row[name] for row in made]) for name in made[0]}


def train(workdir, config, data, weights, adapter: Any = LORA, samples: int = 32, **changes) -> dict:
  settings = {"mesh": MESH, "probe": Text(), "intervals": INTERVALS, "weights": weights, "trainable": adapter} | changes
  rate = schedules.Constant(settings.pop("rate", 1e-2))
  return loop.train(config, data, workdir, schedules.Batches(16), samples, rate, **settings)


def found(workdir) -> dict:
  return json.loads((workdir / "probe.json").read_text())


def losses(workdir) -> list[float]:
  return [found(workdir)[name]["loss"] for name in ("before", "after")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny, source):
  """A run of a few steps, whose own probe is the validation source, and its INT4 export."""
  folder = tmp_path_factory.mktemp("bases")
  result = train(folder / "float", tiny, source, None, None, validation=Text())
  export.export(folder / "float", folder / "int4", bits=4)
  return folder, result


def test_both_losses_are_those_of_the_validation_source(bases):
  folder, result = bases
  before, after = losses(folder / "float")
  assert after == pytest.approx(result["eval_loss"], rel=1e-5) and after < before
  first = json.loads((folder / "float" / "metrics.jsonl").read_text().splitlines()[0])
  assert before == pytest.approx(first["loss"], rel=0.05)  # of other rows
  told = found(folder / "float")
  assert (told["samples"], told["before"]["step"], told["after"]["step"]) == (20, 0, 2)
  assert told["difference"]["loss"] == pytest.approx(after - before)
  assert told["difference"]["low"] < after - before < told["difference"]["high"]


MESHES = {
  "tensor": {"mesh": mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)},
  "context": {"mesh": mesh_lib.MeshConfig(data=2, tensor=2, context=2), "micro_batch": 4},
  "stages": {"mesh": mesh_lib.MeshConfig(data=2, fsdp=2, stage=2), "loss_mean_of": "rows"},
}


@pytest.mark.parametrize("sizes", [{}, dict(data=2, fsdp=2, tensor=2), dict(data=4, context=2)])
def test_rows_add_up_to_the_sums(sizes, tiny):
  config = dataclasses.replace(tiny, scan_layers=True)
  params = partitioning.unbox(glm.init(config, jax.random.key(0)))
  batch = next(Text().batches(iter([(0, 8)]))) | {"rows": np.arange(8, dtype=np.int32)}
  objective = objective_lib.Objective(config, chunk=5)
  with partitioning.use(mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes or {"data": 8}))):
    rows, losses, tokens = jax.jit(objective.rows)(params, batch)
    sums = jax.jit(objective.sums)(params, batch)
  assert [*rows] == [*range(8)]
  np.testing.assert_allclose(losses.sum(), sums.loss.sum(), rtol=1e-5)
  np.testing.assert_array_equal(tokens, batch["loss_weights"].sum(-1))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, trainable.PTuning(length=3)])
def test_every_mesh_measures_the_same(adapter, bases, tmp_path, tiny, source):
  """And "before" is the base alone, whatever a new adapter does to it."""
  for name, changes in ({"whole": {}} | MESHES).items():
    train(tmp_path / name, tiny, source, bases[0] / "float", adapter, samples=16, rate=0.0, **changes)
    told, want = found(tmp_path / name), found(tmp_path / "whole")
    for when in ("before", "after"):
      chex.assert_trees_all_close(told[when]["rows"], want[when]["rows"], rtol=2e-4)
    assert told["tokens"] == want["tokens"]
    chex.assert_trees_all_close(told["before"]["rows"], found(bases[0] / "float")["after"]["rows"], rtol=2e-4)
  changed = abs(want["difference"]["loss"])
  assert changed < 1e-5 if adapter == LORA else changed > 1e-3


@pytest.mark.slow
def test_preferences_are_probed_by_the_base_objective(bases, tmp_path, tiny):
  train(tmp_path, tiny, Pairs(), bases[0] / "float", preference=preference.DPO(), rate=0.1)
  before, after = losses(tmp_path)
  assert before == pytest.approx(losses(bases[0] / "float")[1], rel=1e-5) and abs(after - before) > 1e-4


def test_a_run_that_goes_on_keeps_what_was_measured(bases, tmp_path, tiny, source, capfd):
  weights = bases[0] / "int4"
  train(tmp_path / "whole", tiny, source, weights)
  assert "before" in (said := capfd.readouterr().err) and str(tmp_path / "whole" / "probe.json") in said
  path = tmp_path / "parts" / "probe.json"
  train(tmp_path / "parts", tiny, source, weights, stop_at_step=1)
  assert found(tmp_path / "parts").keys() & {"before", "after", "difference"} == {"before"}
  begun = path.read_bytes()
  train(tmp_path / "parts", tiny, source, weights)
  whole = found(tmp_path / "parts")
  assert whole == found(tmp_path / "whole")
  path.write_bytes(begun)
  train(tmp_path / "parts", tiny, source, weights)  # as killed behind its last checkpoint
  assert found(tmp_path / "parts") == whole
  path.unlink()
  train(tmp_path / "parts", tiny, source, weights)  # the base is still there
  assert found(tmp_path / "parts")["before"]["rows"] == whole["before"]["rows"]


def test_a_row_that_comes_again_is_not_counted_again(bases, tmp_path, tiny, source, caplog):
  weights = bases[0] / "float"
  train(tmp_path / "many", tiny, source, weights)
  many = found(tmp_path / "many")
  train(tmp_path / "few", tiny, source, weights, stop_at_step=1, probe=Few())
  assert "has 11 rows before one comes again" in caplog.text
  larger = dataclasses.replace(INTERVALS, eval_samples=24)
  train(tmp_path / "few", tiny, source, weights, probe=Few(), intervals=larger)  # is compared with the same rows
  few = found(tmp_path / "few")
  assert few["samples"] == len(few["tokens"]) == 11 and few["tokens"] == many["tokens"][:11]
  rows = {name: np.array(few[name]["rows"]) for name in ("before", "after")}
  for name, losses in rows.items():
    np.testing.assert_allclose(losses, many[name]["rows"][:11], rtol=2e-4)
  assert few["difference"] == probe.difference(*rows.values(), np.array(few["tokens"]))
  with pytest.raises(errors.InputError, match="loop.train.probe has one row, and no others to compare"):
    train(tmp_path / "one", tiny, source, weights, probe=Few(count=1))
  assert not (tmp_path / "one").exists()


def test_an_end_that_is_not_finite_leaves_none_of_an_end_before(tmp_path, monkeypatch):
  text = probe.Text({"name": "text"}, 2, [])
  runtime = types.SimpleNamespace(objective=types.SimpleNamespace(config=None))
  own = probe.Probe(runtime, None, text, tmp_path / "probe.json", adapts=True)
  sums = iter([3.0, 2.0, np.nan])
  monkeypatch.setattr(probe.Probe, "_rows", lambda *_: (np.full(2, next(sums)), np.ones(2)))
  own.begin(types.SimpleNamespace(step=0), resumed=False)
  assert "2.0000 now" in own.end(types.SimpleNamespace(step=1))
  assert found(tmp_path).keys() >= {"before", "after", "difference"}
  assert own.end(types.SimpleNamespace(step=2)) == "the text of the probe has no finite loss"
  assert found(tmp_path).keys() == {"text", "samples", "tokens", "before"}
  again = probe.Probe(runtime, None, text, tmp_path / "probe.json", adapts=True)
  again.begin(types.SimpleNamespace(step=2), resumed=True)  # is no damaged record


def test_a_whole_model_without_its_beginning(bases, tmp_path, tiny, source, caplog):
  train(tmp_path, tiny, source, bases[0] / "float", None, stop_at_step=1, probe=None)
  train(tmp_path, tiny, source, bases[0] / "float", None)
  assert "cannot be told" in caplog.text
  assert "after" in found(tmp_path) and not {"before", "difference"} & found(tmp_path).keys()


def test_mistakes(bases, tmp_path, tiny, source, caplog):
  weights, run = bases[0] / "float", tmp_path / "run"
  for changes, message in (
    ({"probe": Pairs()}, "loop.train.probe is of pairs of answers"),
    ({"probe": dataclasses.replace(source, last=10)}, "the probe source gives .* or set loop.train.probe = None"),
    ({"intervals": loop.Intervals(eval_samples=1), "mesh": mesh_lib.MeshConfig(tensor=8)}, "give 2 or more"),
  ):
    with pytest.raises(errors.InputError, match=message):
      train(run, tiny, source, weights, **changes)
    assert not run.exists()
  train(run, tiny, source, weights, stop_at_step=1)
  before = (run / "probe.json").read_bytes()
  with pytest.raises(errors.InputError, match="is of another text"):
    train(run, tiny, source, weights, probe=Text(first=7))
  with pytest.raises(errors.InputError, match="or of other samples of it"):
    train(run, tiny, source, weights, intervals=dataclasses.replace(INTERVALS, eval_samples=24))
  assert (run / "probe.json").read_bytes() == before
  for content in ('{"mine": 1}', "[]", '{"text": {}, "samples": 3, "tokens": [1, 2]}', "no json"):
    (run / "probe.json").write_text(content)
    with pytest.raises(errors.InputError, match="probe.json.*move it away") as caught:
      train(run, tiny, source, weights)
    assert "\n" not in str(caught.value) and (run / "probe.json").read_text() == content


def test_what_cannot_be_written_is_told_and_training_goes_on(bases, tmp_path, tiny, source, caplog, monkeypatch, capfd):
  def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(probe.lease, "check", full)
  assert train(tmp_path, tiny, source, bases[0] / "float")["step"] == 2
  assert "probe.json: cannot be written" in caplog.text and "95 %" in capfd.readouterr().err


def test_the_error_of_a_difference():
  r = np.random.default_rng(0)
  before, change = r.normal(size=400), r.normal(0.1, 0.5, size=400)
  same = probe.difference(before, before + change, np.full(400, 7.0))
  assert same["loss"] == pytest.approx(change.mean() / 7)
  assert same["standard_error"] == pytest.approx(change.std(ddof=1) / 400**0.5 / 7)
  assert probe.difference(before, before, np.ones(400)) == {"loss": 0, "standard_error": 0, "low": 0, "high": 0}
  caught = 0
  for _ in range(300):
    tokens = r.integers(1, 60, size=200).astype(float)
    rows = tokens * (0.3 + r.normal(0, 0.2, size=200))
    told = probe.difference(np.zeros(200), rows, tokens)
    caught += told["low"] < 0.3 < told["high"]
  assert 0.90 < caught / 300 < 0.99
