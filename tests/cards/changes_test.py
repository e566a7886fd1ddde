"""What is other in one model than in another."""

import dataclasses
import pathlib

import pytest
import untrained_run

from glmjax import errors
from glmjax.cards import changes
from glmjax.checkpoint import export
from glmjax.checkpoint import folder as folder_lib


def test_a_model_and_its_copy_are_the_same(world) -> None:
  found = changes.compare([world.run, world.export])
  assert found["raises"] == changes.NOTHING and not found["model"] and not found["form"]
  assert all(part["distance"] == 0 and part["changed"] == 0 for part in found["parts"].values())
  assert "The same." in changes.table(found)


@pytest.mark.parametrize("bits,least", [(8, 1e-3), (4, 1e-2)])
def test_quantizing_is_a_change_of_form(world, tmp_path: pathlib.Path, bits: int, least: float) -> None:
  export.export(world.run, tmp_path / "out", bits=bits)
  found = changes.compare([world.export, tmp_path / "out"])
  assert found["raises"] == changes.PATCH and found["form"]["bits"] == [None, bits]
  assert least < found["parts"]["mlp"]["distance"] < 20 * least
  assert found["parts"]["embedding"]["distance"] < 1e-3  # float16 alone


def test_other_weights_raise_the_minor_part(world, tmp_path: pathlib.Path) -> None:
  other = untrained_run.write(tmp_path / "other", seed=2)
  folder_lib.write_config(other, folder_lib.read_config(world.run))
  found = changes.compare([world.run, other])
  assert found["raises"] == changes.MINOR
  assert found["parts"]["mlp"]["distance"] == pytest.approx(2**0.5, rel=0.1)  # of independent draws of one spread


def test_another_architecture_raises_the_major_part(world, tmp_path: pathlib.Path) -> None:
  other = untrained_run.write(tmp_path / "other")
  config = folder_lib.read_config(other)
  model = dataclasses.replace(config.model, max_length=128)
  folder_lib.write_config(other, dataclasses.replace(config, model=model))
  found = changes.compare([world.run, other])
  assert found["raises"] == changes.MAJOR and found["model"] == {"max_length": [256, 128]}
  assert "- model: max_length: 256 -> 128" in changes.table(found)


def test_two_folders_are_compared(world) -> None:
  with pytest.raises(errors.InputError, match="name the model before, and the one after"):
    changes.compare([world.run])
