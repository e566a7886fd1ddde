"""Which data a resumed run may have: the same up to the samples it has seen."""

import dataclasses

import jax.numpy as jnp
import pytest

from glmjax import errors
from glmjax.checkpoint import manager as manager_lib
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
