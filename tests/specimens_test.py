"""Runs, exports and token caches that older commits wrote are read as those commits read them."""

import functools
import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from glmjax import cli
from glmjax.data import loader
from glmjax.data import rows

SPECIMENS = pathlib.Path(__file__).parent / "fixtures" / "old"
COMMITS = sorted(path.name for path in SPECIMENS.iterdir() if path.is_dir())
PROMPT = "On day 7 the quick brown"
TEXT = "On day 0 the quick brown fox jumps over 0 lazy dogs, then sleeps."


@pytest.fixture(params=COMMITS)
def expected(request, tmp_path: pathlib.Path, monkeypatch) -> dict:
  """What is expected of a commit's specimens, which are unpacked in the working folder."""
  for archive in (SPECIMENS / request.param).glob("*.tar.xz"):
    shutil.unpack_archive(archive, tmp_path, filter="data")
  shutil.copy(SPECIMENS / "train.gin", tmp_path)
  monkeypatch.chdir(tmp_path)
  return json.loads((SPECIMENS / request.param / "expected.json").read_text(encoding="utf-8"))


def test_a_run_goes_on_as_it_would_have(expected):
  before = pathlib.Path("run/metrics.jsonl").read_text(encoding="utf-8")
  assert cli.main(["train", "--gin_file=train.gin", "--gin.mesh.MeshConfig.data=8"]) == 0  # the tests have eight
  after = pathlib.Path("run/metrics.jsonl").read_text(encoding="utf-8")
  assert after.startswith(before)
  found = [json.loads(line) for line in after.removeprefix(before).splitlines()]
  assert [record["step"] for record in found] == [record["step"] for record in expected["records"]]
  for ours, theirs in zip(found, expected["records"]):
    for name in ("samples_seen", "loss_tokens", "tokens"):
      assert ours[name] == theirs[name]
    for name in ("loss", "loss_gmask", "grad_norm", "learning_rate"):
      assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
  assert found[-1]["eval_loss"] == pytest.approx(expected["records"][-1]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("export", ("int8", "int4"))
def test_an_export_answers_as_it_did(expected, export: str, capsys):
  assert cli.main(["generate", f"--checkpoint={export}", f"--prompt={PROMPT}", "--max_tokens=16", "--out=-"]) == 0
  assert json.loads(capsys.readouterr().out)["output"] == expected[export]["output"]
  assert cli.main(["score", f"--checkpoint={export}", f"--text={TEXT}"]) == 0
  (found,), (then,) = json.loads(capsys.readouterr().out), expected[export]["score"]
  assert found["tokens"] == then["tokens"]
  assert found["log_likelihood"] == pytest.approx(then["log_likelihood"], rel=1e-5)


def test_a_cache_gives_the_same_rows(expected):
  source = loader.CachedMixture("cache", functools.partial(rows.BlankInfilling, seq_length=64), num_workers=0)
  batches = list(source.batches(iter([(0, 8), (8, 16)])))
  for name, digest in expected["rows"].items():
    found = np.concatenate([batch[name] for batch in batches])
    assert hashlib.sha256(found.tobytes()).hexdigest() == digest, name
