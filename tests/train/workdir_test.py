"""Which data a resumed run may have: the same up to the samples it has seen."""

import dataclasses

import jax.numpy as jnp
import pytest

from glmjax import errors
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager as manager_lib
from glmjax.checkpoint import recorded
from glmjax.train import workdir as workdir_lib

CHANGE = {"first_sample": 64, "ramp_samples": 32, "weights": {"en": 1}}


@dataclasses.dataclass(frozen=True)
class Source:
  """What Workdir asks of a source."""

  changes: tuple[dict, ...] = ()

  def describe(self) -> dict:
    return {"seed": 1, "weights": {"en": 3}} | ({"changes": list(self.changes)} if self.changes else {})


@pytest.fixture
def save(tmp_path, tiny):
  """Begins a run and saves it at some samples; returns its folder."""
  def begin(samples: int, source: Source = Source()) -> workdir_lib.Workdir:
    folder = workdir_lib.Workdir(tmp_path)
    folder.open(tiny, source, overwrite=False)
    manager = manager_lib.Manager(folder.checkpoints)
    manager.save(1, {"w": jnp.ones(3)}, {"samples_seen": samples})
    manager.close()
    return folder
  return begin


def test_rates_may_change_from_the_next_sample_on(save, tiny):
  folder = save(64)
  folder.open(tiny, Source((CHANGE,)), overwrite=False)
  folder.open(tiny, Source((CHANGE | {"ramp_samples": 5}, CHANGE)), overwrite=False)  # another plan for the future
  folder.open(tiny, Source(), overwrite=False)


@pytest.mark.parametrize("other", [(), (CHANGE | {"ramp_samples": 5},), (CHANGE | {"weights": {"zh": 1}},)])
def test_rates_of_samples_seen_may_not(save, tiny, other):
  folder = save(65, Source((CHANGE,)))
  folder.open(tiny, Source((CHANGE, CHANGE | {"first_sample": 99})), overwrite=False)
  with pytest.raises(errors.InputError, match="holds another run: data.changes is .* there and .* here"):
    folder.open(tiny, Source(other), overwrite=False)


@pytest.fixture
def recorded_run(tmp_path, tiny) -> workdir_lib.Workdir:
  """A run whose step says what its model and its data are."""
  folder = workdir_lib.Workdir(tmp_path)
  folder.open(tiny, Source(), overwrite=False)
  manager = manager_lib.Manager(folder.checkpoints)
  manager.save(1, {"w": jnp.ones(3)}, {"samples_seen": 9, "data": Source().describe(), **recorded.of(tiny)})
  manager.close()
  return folder


def test_a_changed_config_is_refused(recorded_run, tiny):
  config = folder_lib.read_config(recorded_run.root)
  folder_lib.write_config(recorded_run.root, dataclasses.replace(
      config, model=dataclasses.replace(tiny, layer_norm_epsilon=0.1)))
  before = recorded_run.config.read_bytes()
  message = "is not the one of this run: layer_norm_epsilon is 0.1 there and 1e-05 in the checkpoints: set it back"
  with pytest.raises(errors.InputError, match=message):
    recorded_run.open(tiny, Source(), overwrite=False)
  assert recorded_run.config.read_bytes() == before
  with pytest.raises(errors.InputError, match="config.json is not the one"):  # not even by changing both
    recorded_run.open(dataclasses.replace(tiny, layer_norm_epsilon=0.1), Source(), overwrite=False)


def test_a_run_is_told_without_its_config(recorded_run, tiny):
  before = recorded_run.config.read_bytes()
  recorded_run.config.write_bytes(before[:50])
  with pytest.raises(errors.InputError, match="config.json: not JSON .*; remove it, and it is written anew"):
    recorded_run.open(tiny, Source(), overwrite=False)
  recorded_run.config.unlink()
  with pytest.raises(errors.InputError, match="holds another run: model.num_layers is 2 there and 3 here"):
    recorded_run.open(dataclasses.replace(tiny, num_layers=3), Source(), overwrite=False)
  recorded_run.open(tiny, Source(), overwrite=False)
  assert recorded_run.config.read_bytes() == before


def test_how_it_is_computed_may_change(recorded_run, tiny):
  for change in ({"dtype": "bfloat16"}, {"remat": "full"}, {"hidden_dropout": 0.1}, {"scan_layers": False}):
    recorded_run.open(dataclasses.replace(tiny, **change), Source(), overwrite=False)
