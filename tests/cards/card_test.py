"""Cards: only what is evidenced, only of the model that it is beside, and nothing of the user's lost."""

import html
import json
import pathlib
import shutil

import huggingface_hub
import pytest
import their_files
import untrained_run
import yaml

from glmjax import errors
from glmjax.cards import card
from glmjax.cards import files
from glmjax.cards import integrity
from glmjax.cards import sections
from glmjax.checkpoint import export
from glmjax.checkpoint import load
from glmjax.models import config as config_lib
from glmjax.thudm import load as thudm_load
from glmjax.thudm import write
from glmjax.train import compute

ABOUT = """\
name: 'Test | <b>model</b>'
version: 1.2.0
license: apache-2.0
owner: nobody
contact: nobody@example.org
languages: [en, zh]
architecture: arXiv 2210.02414
tokenizer: trained here
grid: {kg_co2_per_kwh: 0.5, source: "test", year: 2026}
changes: all of it
data: {pretrain_en: {source: "made up", license: cc0-1.0}}
"""


@pytest.fixture
def model(world, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of the export, with statements."""
  folder = tmp_path / "model"
  shutil.copytree(world.export, folder)
  (folder / "about.yaml").write_text(ABOUT, encoding="utf-8")
  (folder / "LICENSE").write_text("Apache License", encoding="utf-8")
  return folder


def held_out(path: pathlib.Path, model: pathlib.Path | None) -> pathlib.Path:
  """Writes an evaluation of a model; None: of another."""
  weights = "0" * 64 if model is None else load.fingerprint(model)
  figures = {
    "tokens": 10,
    "split_tokens": 10,
    "bytes": 30,
    "bits_per_byte": 2.5,
    "infill_accuracy": 0.25,
    "infill_accuracy_se": 0.1,
  }
  path.write_text(json.dumps({"en": figures, "model": {"weights": weights}}), encoding="utf-8")
  return path


def made(folder: pathlib.Path, world=None, **given) -> dict:
  if world is not None:
    given = {"run": world.run, "cache": world.cache} | given
  return card.make(folder, **given)


def verdicts(content: dict) -> dict[str, str]:
  return {each["name"]: each["verdict"] for each in content["integrity"]}


def test_a_bare_folder_has_a_card_that_says_what_is_not_known(world, tmp_path: pathlib.Path) -> None:
  content = made(world.export, out=tmp_path / "card")
  assert content["model"]["kind"] == "an export" and len(content["integrity"]) == 10
  assert verdicts(content)["benchmark reproducibility"] == integrity.NONE
  page = (tmp_path / "card" / "card.html").read_text(encoding="utf-8")
  for each in content["integrity"]:
    for missing in each["missing"]:
      assert missing.split(":")[0] in page
  assert sorted(path.name for path in world.export.iterdir()) == [
    "checksums.json",
    "config.json",
    "params",
    "tokenizer",
  ]


def test_what_is_given_is_evidence(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  content = made(model, world, evaluation=[held_out(tmp_path / "held.json", model)])
  found = verdicts(content)
  for name in (
    "architecture provenance",
    "tokenizer integrity",
    "parameter density",
    "benchmark reproducibility",
    "identity consistency",
    "licence clarity",
  ):
    assert found[name] == integrity.EVIDENCED, (name, content["integrity"])
  assert content["training"]["steps"] == 1 and content["data"]["cache"][0]["documents"] == 2
  assert content["evaluations"][0]["figures"]["held-out text, en"]["blanks' tokens right (share)"]["low"] < 0.25


@pytest.mark.parametrize("name", ["name", "owner", "license", "version", "architecture", "tokenizer"])
def test_what_is_left_out_is_missing(model: pathlib.Path, world, name: str) -> None:
  path = model / "about.yaml"
  path.write_text("\n".join(line for line in ABOUT.splitlines() if not line.startswith(f"{name}:")), encoding="utf-8")
  missing = [text for each in made(model, world)["integrity"] for text in each["missing"]]
  assert any(text.endswith(f": {name}") for text in missing), missing


def test_the_head_is_the_hubs(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  made(model, world, evaluation=[held_out(tmp_path / "held.json", model)])
  read = huggingface_hub.ModelCard.load(model / "README.md")
  assert read.data.license == "apache-2.0" and read.data.language == ["en", "zh"]
  assert read.data.library_name == "glmjax" and read.data.eval_results[0].metric_value == 2.5
  head = (model / "README.md").read_text(encoding="utf-8").split("---\n")[1]
  assert yaml.safe_load(head)["model-index"][0]["name"] == "Test | <b>model</b>"
  assert "<b>" not in read.text.replace(r"\<b", "")


def test_what_belongs_to_another_model_is_refused(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  other = untrained_run.write(tmp_path / "other", seed=2)
  with pytest.raises(errors.InputError, match="--run: .* is of another data"):
    made(model, run=other)
  with pytest.raises(errors.InputError, match="--run: .* is an export"):
    made(model, run=world.export)
  with pytest.raises(errors.InputError, match="--evaluation: .* is of weights 00000000"):
    made(model, evaluation=[held_out(tmp_path / "held.json", None)])
  with pytest.raises(errors.InputError, match="--cache"):
    made(other, cache=world.cache)
  assert not (model / "README.md").exists()


def test_another_run_of_equal_settings_is_refused(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  other, older = tmp_path / "other", tmp_path / "older"
  for folder in (other, older):
    shutil.copytree(world.run, folder)
  untrained_run.write_session(other)
  (older / "compute.jsonl").unlink()
  with pytest.raises(errors.InputError, match="--run: .*other is run .* of equal settings"):
    made(model, run=other)
  content = made(model, world, run=older)  # of which it cannot be told
  assert content["model"]["run"] is None and verdicts(content)["identity consistency"] == integrity.PARTIAL
  again = export.export(model, tmp_path / "again", bits=4)["out"]  # it stays what it is of
  assert made(pathlib.Path(again), world)["model"]["run"] == made(model, world)["model"]["run"] is not None


def test_what_a_run_made_its_model_forget(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  run = tmp_path / "run"
  shutil.copytree(world.run, run)
  before, after = ({"step": step, "loss": loss, "rows": [1.0, loss]} for step, loss in ((0, 2.0), (1, 2.5)))
  change = {"loss": 0.5, "standard_error": 0.1, "low": 0.304, "high": 0.696}
  found = {"text": {}, "samples": 2, "tokens": [1, 1], "before": before, "after": after, "difference": change}
  (run / "probe.json").write_text(json.dumps(found), encoding="utf-8")
  content = made(model, world, run=run)
  assert content["probe"] == {"before": 2.0, "after": 2.5, "samples": 2, "difference": change}
  assert "2.0000 nats a token before" in (model / "README.md").read_text(encoding="utf-8")
  found["after"]["step"] = 2  # of weights that came later
  (run / "probe.json").write_text(json.dumps(found), encoding="utf-8")
  assert made(model, world, run=run)["probe"] is None
  (run / "probe.json").write_text("{}", encoding="utf-8")
  with pytest.raises(errors.InputError, match="probe.json is damaged"):
    made(model, world, run=run)


def test_readmes_of_users_stay(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  (model / "README.md").write_text("# Mine\n", encoding="utf-8")
  with pytest.raises(errors.InputError, match="is not of glmjax card"):
    made(model)
  (model / "about.yaml").unlink()
  (model / "LICENSE").unlink()
  with pytest.raises(errors.InputError, match="README.md"):
    export.export(world.run, model, overwrite=True)
  assert (model / "README.md").read_text(encoding="utf-8") == "# Mine\n"


def test_an_export_may_be_written_over_its_card_but_not_over_its_statements(model: pathlib.Path, world) -> None:
  made(model)
  (model / "LICENSE").unlink()
  with pytest.raises(errors.InputError, match="about.yaml"):
    export.export(world.run, model, overwrite=True)
  (model / "about.yaml").unlink()
  export.export(world.run, model, overwrite=True)
  assert not (model / "README.md").exists() and not (model / "card.json").exists()


def test_a_card_of_other_weights_is_stale(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  made(model, world, out=tmp_path / "card")
  assert not [text for text in checked(model, tmp_path) if "make it again" in text]
  other = untrained_run.write(tmp_path / "other", seed=2)
  export.export(other, tmp_path / "export")
  problems = files.check(tmp_path / "export", tmp_path / "card")["problems"]
  assert any("the card is of weights" in text for text in problems)
  assert any("checksums.json is other" in text for text in problems)


def checked(model: pathlib.Path, tmp_path: pathlib.Path, *waived: str) -> list[str]:
  return files.check(model, tmp_path / "card", waived)["problems"]


def test_other_statements_make_a_card_stale(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  made(model, world, out=tmp_path / "card")
  (model / "about.yaml").write_text(ABOUT.replace("1.2.0", "1.3.0"), encoding="utf-8")
  assert "about.yaml says other things than the card: make it again" in checked(model, tmp_path)


def test_criteria_may_be_waived(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  content = made(model, world, out=tmp_path / "card")
  unmet = [name for name, verdict in verdicts(content).items() if verdict != integrity.EVIDENCED]
  assert unmet and checked(model, tmp_path) and not checked(model, tmp_path, *unmet)
  with pytest.raises(errors.InputError, match="--waive is 'honesty'"):
    checked(model, tmp_path, "honesty")


@pytest.mark.parametrize("text", ["{}", '{"integrity": 5}', "[]", "{"])
def test_damaged_cards_are_named(model: pathlib.Path, tmp_path: pathlib.Path, text: str) -> None:
  (tmp_path / "card").mkdir()
  (tmp_path / "card" / "card.json").write_text(text, encoding="utf-8")
  with pytest.raises(errors.InputError, match="card.json"):
    checked(model, tmp_path)


def drift(folder: pathlib.Path, out: pathlib.Path) -> tuple[str, ...]:
  return {each["name"]: tuple(each["missing"]) for each in made(folder, out=out)["integrity"]}["versioning drift"]


def test_new_weights_ask_for_a_new_version(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  made(model, out=tmp_path / "card")
  other = untrained_run.write(tmp_path / "other", seed=2)
  (other / "about.yaml").write_text(ABOUT, encoding="utf-8")
  for _ in range(2):  # nor does a second card forget it
    assert any("a version above 1.2.0" in text for text in drift(other, tmp_path / "card"))
  (other / "about.yaml").write_text(
    ABOUT.replace("1.2.0", "1.3.0").replace("changes: all of it\n", ""), encoding="utf-8"
  )
  assert [text for text in drift(other, tmp_path / "card") if "a version above" in text or "what changed" in text] == [
    "what changed since the version before: changes"
  ]


def test_adapters_and_parts_of_evaluations_are_not_these_weights(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "evaluated"
  folder.mkdir()
  figures = {"lambada": {"figures": {"accuracy": {"value": 50.0, "low": 40.0, "high": 60.0, "items": 10}}}}
  (folder / "report.json").write_text(json.dumps(figures), encoding="utf-8")
  run = {"weights": load.fingerprint(model), "limit": None, "skip": True}
  (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
  found = {each["name"]: each for each in made(model, evaluation=[folder])["integrity"]}["benchmark reproducibility"]
  assert found["verdict"] == integrity.PARTIAL and "left out" in found["missing"][0]
  (folder / "run.json").write_text(json.dumps(run | {"adapter": "1" * 64}), encoding="utf-8")
  with pytest.raises(errors.InputError, match="is of weights 11111111"):
    made(model, evaluation=[folder])
  (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
  for value in (None, "x", float("nan")):
    figures["lambada"]["figures"]["accuracy"]["value"] = value
    (folder / "report.json").write_text(json.dumps(figures), encoding="utf-8")
    with pytest.raises(errors.InputError, match="report.json is damaged"):
      made(model, evaluation=[folder])


def text_report(path: pathlib.Path, **changes) -> pathlib.Path:
  content = {
    "report": "text",
    "documents": 4,
    "bytes": 82,
    "languages": {"en": {"documents": 2}},
    "duplicates": {"exact": {"documents": 0}},
    "personal": {},
    "lines": {"longest": [{"begins": "a secret of somebody"}]},
    "overlap": {"n": 13, "files": {"/home/somebody/lambada.jsonl": {"items": 3, "compared": 2, "overlapping": 1}}},
  }
  path.write_text(json.dumps(content | changes), encoding="utf-8")
  return path


def test_reports_are_of_the_caches_text_and_counts_alone(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  manifest = json.loads((world.cache / "manifest.json").read_text(encoding="utf-8"))
  rows = manifest["tasks"]["pretrain_en"]["splits"].values()
  counted = {"documents": sum(row["documents"] for row in rows), "bytes": sum(row["utf8_bytes"] for row in rows)}
  content = made(model, world, text=text_report(tmp_path / "report.json", **counted))
  found = {each["name"]: each["missing"] for each in content["integrity"]}["dataset composition"]
  assert not [text for text in found if "--text" in text or "--against" in text]
  for name in (files.README, files.JSON, files.PAGE):
    assert not [each for each in ("secret", "somebody") if each in (model / name).read_text(encoding="utf-8")]
  with pytest.raises(errors.InputError, match="report on the same files"):
    made(model, world, text=text_report(tmp_path / "report.json", bytes=1))
  with pytest.raises(errors.InputError, match="is no report on a text"):
    made(model, world, text=text_report(tmp_path / "report.json", report="tasks"))
  with pytest.raises(errors.InputError, match="is damaged"):
    made(model, world, text=text_report(tmp_path / "report.json", personal=5, **counted))


def test_files_of_others_stay(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  made(model)
  for name in (files.JSON, files.PAGE, "card-loss.png"):
    out = tmp_path / name.replace(".", "-")
    out.mkdir()
    (out / name).write_text("{}", encoding="utf-8")
    with pytest.raises(errors.InputError, match="is not of glmjax card"):
      made(model, out=out)
  for other in (world.run, world.cache):
    with pytest.raises(errors.InputError, match="name another folder"):
      made(model, out=other)
  quoting = tmp_path / "quoting"
  quoting.mkdir()
  (quoting / "README.md").write_text(
    (model / "README.md").read_text(encoding="utf-8").split("---\n")[-1], encoding="utf-8"
  )
  with pytest.raises(errors.InputError, match="README.md is not of glmjax card"):
    made(model, out=quoting)


def test_what_was_changed_behind_a_card_is_told(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  made(model, world)
  readme = model / "README.md"
  readme.write_text(readme.read_text(encoding="utf-8") + "Best model ever.", encoding="utf-8")
  (model / "card.html").unlink()
  (model / "about.yaml").unlink()
  found = "; ".join(files.check(model)["problems"])
  for said in ("README.md is other than the card says", "card.html is other", "about.yaml is gone"):
    assert said in found
  content = json.loads((model / "card.json").read_text(encoding="utf-8"))
  (model / "card.json").write_text(json.dumps(content | {"integrity": []}), encoding="utf-8")
  with pytest.raises(errors.InputError, match="card.json is damaged"):
    files.check(model)


def test_libraries_that_runs_record_are_all_explained() -> None:
  assert {*compute.PACKAGES} <= {*sections.CHANGES}


def test_the_same_model_has_the_same_card(model: pathlib.Path, world, tmp_path: pathlib.Path) -> None:
  for name in ("one", "two"):
    made(model, world, out=tmp_path / name)
  for file in (files.README, files.JSON, files.PAGE):
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("family", ["chatglm-6b", "glm-130b"])
def test_an_import_has_a_card(family: str, tmp_path: pathlib.Path) -> None:
  """With what its authors published, as stated by them, and the rest not known."""
  own = {"chatglm-6b": dict(positions="rotary_2d", mlp="gelu_tanh"), "glm-130b": {}}
  sizes = dict(num_layers=2, embed_dim=64, num_heads=8, mlp_dim=176, max_length=32, vocab_size=512)
  config = config_lib.GLMConfig(**sizes | own[family], param_dtype="float16")
  theirs, items = tmp_path / "theirs", their_files.random_items(family, config)
  if family == "chatglm-6b":
    write.write_safetensors(theirs, items)
    write.write_hub_configs(theirs, config, None, None)
  else:
    theirs.mkdir()
    write.write_ranks(theirs, items, 2, "49300")
  thudm_load.import_model(family, theirs, tmp_path / "model", tokenizer="none")
  content = card.make(tmp_path / "model", about=family)
  assert content["model"]["kind"] == "an import" and content["model"]["name"].lower() == family
  page = (tmp_path / "model" / files.PAGE).read_text(encoding="utf-8")
  for fact in content["about"]["published"]:
    assert html.escape(fact["value"]) in page and html.escape(fact["source"]) in page
  assert verdicts(content)["licence clarity"] == integrity.PARTIAL
  assert verdicts(content)["training compute"] != integrity.EVIDENCED and content["compute"] is None
  assert files.check(tmp_path / "model", waive=integrity.names())["problems"] == []
