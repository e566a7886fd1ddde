"""Which data a resumed run may have: the same up to the samples it has seen."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from glmjax import errors
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager as manager_lib
from glmjax.checkpoint import recorded
from glmjax.io import folders
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


def test_a_run_by_another_loss_is_refused(save, tiny):
  folder = save(64)  # of a version that did not say by which
  folder.open(tiny, Source(), overwrite=False, preference="DPO")
  assert folder_lib.read_config(folder.root).preference == "DPO"
  with pytest.raises(errors.InputError, match='holds another run: preference is "DPO" there and "ORPO" here; choose'):
    folder.open(tiny, Source(), overwrite=False, preference="ORPO")
  folder.open(tiny, Source(), overwrite=False, preference="DPO")
  config = json.loads(folder.config.read_text())
  folder.config.write_text(json.dumps(config | {"preference": 3}))
  with pytest.raises(errors.InputError, match="config.json is damaged .*preference is 3"):
    folder.open(tiny, Source(), overwrite=False, preference="DPO")


def test_a_gin_file_of_the_users_stays(save, tiny):
  """Though it has the name of the run's own."""
  folder = save(64)
  assert folder.owns_replay()
  folder.replay.write_text("# mine\n")
  assert not folder.owns_replay()
  folder.open(tiny, Source(), overwrite=True)
  assert folder.replay.read_text() == "# mine\n"


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
  folder_lib.write_config(
    recorded_run.root, dataclasses.replace(config, model=dataclasses.replace(tiny, layer_norm_epsilon=0.1))
  )
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


def _files(folder):
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_takes_over_no_other_folder(tmp_path, tiny):
  """A cache, say; neither directly, nor inside, nor through a link, nor with --overwrite."""
  (tmp_path / "cache").mkdir()
  (tmp_path / "cache" / "manifest.json").write_text('{"tasks": {}, "mixture": "m"}')
  (tmp_path / "link").symlink_to(tmp_path / "cache")
  (tmp_path / "mine" / "tokenizer").mkdir(parents=True)  # somebody's only one
  before = _files(tmp_path)
  for name, message in (
    ("cache", "cache is a token cache: choose another"),
    ("link", "cache is a token cache"),
    ("cache/run", "lies in a token cache"),
    ("mine", r"holds other things \(tokenizer\)"),
    ("", "workdir is empty"),
    ("ftp://bucket/run", "knows local paths, gs://BUCKET"),
  ):
    with pytest.raises(errors.InputError, match=message):
      workdir_lib.Workdir.named(tmp_path / name if name and ":" not in name else name)
  assert _files(tmp_path) == before
  with pytest.raises(errors.InputError, match="is the source itself"):
    workdir_lib.Workdir.named(tmp_path / "run", weights=tmp_path / "run")


def test_overwriting_deletes_only_what_a_run_writes(save, tiny, tmp_path):
  """checkpoints/ may be a link to a larger disk; it stays one."""
  folder = save(64)
  (tmp_path / "disk").mkdir()
  folder.checkpoints.rename(tmp_path / "disk" / "large")
  folder.checkpoints.symlink_to(tmp_path / "disk" / "large")
  for name in ("notes.txt", "export/config.json", "checkpoints/notes.txt", "compute-mine.jsonl"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
  interventions = "interventions.jsonl", "interventions.gin"
  for name in (
    "metrics.jsonl",
    "layers.jsonl",
    "probe.json",
    "compute.jsonl",
    "compute-3.jsonl",
    *interventions,
    "tensorboard/events",
    "profile/trace",
    "checkpoints/5.aside/x",
  ):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f"{workdir_lib.REPLAY_MARK} the run's")
  with folder.locked():
    folder.open(tiny, Source(), overwrite=True)
  assert set(_files(tmp_path)) == {
    "config.json",
    "notes.txt",
    "compute-mine.jsonl",
    "export/config.json",
    "disk/large/notes.txt",
  }
  assert folder.checkpoints.is_symlink() and manager_lib.steps(folder.checkpoints) == []


def test_one_run_a_folder(tmp_path, tiny):
  """Told by the lock file, which names the holder and does not stay."""
  folder = workdir_lib.Workdir(tmp_path / "deep" / "run")
  with folder.locked():
    with pytest.raises(errors.InputError, match=r"is in use: another process is training there \(process \d+ on "):
      with folder.locked():
        pass
    folder.open(tiny, Source(), overwrite=False)
  assert [path.name for path in folder.root.iterdir()] == ["config.json"]
  with pytest.raises(ZeroDivisionError):
    with workdir_lib.Workdir(tmp_path / "other" / "run").locked():
      raise ZeroDivisionError
  assert not (tmp_path / "other").exists()


def test_the_card_goes_with_the_model_and_what_the_user_wrote_stays(save, tiny):
  folder = save(64)
  readme, page, picture = (folder.root / name for name in ("README.md", "card.html", "card-loss.png"))
  for text, kept in (("mine\n", True), (f"---\na: 1\n---\n{folders.CARD_MARK}\n\n# Model\n", False)):
    readme.write_text(text, encoding="utf-8")
    for path in (page, picture):
      path.write_text("a page", encoding="utf-8")
    (folder.root / "about.yaml").write_text("name: Mine\n", encoding="utf-8")
    folder.open(tiny, Source(), overwrite=True)
    assert [path.exists() for path in (readme, page, picture)] == [kept] * 3
    assert (folder.root / "about.yaml").exists()
