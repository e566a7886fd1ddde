"""The kill and damage drill of `make test-all`; its counts are printed at the end of the test run.

    GLMJAX_DRILL_KILLS=1000 GLMJAX_DRILL_DAMAGES=1000 GLMJAX_DRILL_SEED=7 pytest tests/drill -m slow

docs/reliability.md says what is promised; `python tests/drill` does parts of it by hand.
"""

import os
import pathlib
import random

import pytest
import tiny_world

from drill import damages
from drill import ground
from drill import kills

KILLS = int(os.environ.get("GLMJAX_DRILL_KILLS", "160"))
DAMAGES = int(os.environ.get("GLMJAX_DRILL_DAMAGES", "300"))
SEED = int(os.environ.get("GLMJAX_DRILL_SEED", "0"))


@pytest.fixture(name="folder", scope="session")
def _folder(tmp_path_factory) -> pathlib.Path:
  """Of the world; made once for all processes of a test run."""
  with tiny_world.shared(tmp_path_factory, "drill") as folder:
    ground.make(folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", kills.COMMANDS)
def test_kills(name, folder, tmp_path, record_property):
  count = -(-KILLS * kills.COMMANDS[name].share // 160)
  table, wrong = kills.run(name, count, SEED, folder, tmp_path)
  record_property("table", table)
  assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", damages.PLACES)
def test_damages(name, folder, tmp_path, record_property):
  count = -(-DAMAGES * damages.PLACES[name].share // 300)
  table, wrong = damages.run(name, count, SEED, folder, tmp_path)
  record_property("table", table)
  assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", damages.KINDS)
def test_every_kind_of_damage_changes_the_file(kind, tmp_path):
  """Those of the drill itself: what damages nothing would prove nothing."""
  for place in ("here", "other"):
    (tmp_path / place).mkdir()
    for name in ("a", "b"):
      (tmp_path / place / name).write_text(f"{place} {name}", encoding="utf-8")
  before = ground.contents(tmp_path / "here")
  shown = damages.damage(random.Random(0), kind, tmp_path / "here" / "a", tmp_path / "here", tmp_path / "other")
  assert kind in shown and ground.contents(tmp_path / "here") != before
