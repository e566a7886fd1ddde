"""The card of a model: README.md for the Hub, card.json for programs, card.html for people, and the check of them.

  FOLDER/  README.md   card.json   card.html   card-*.png

docs/cards.md documents card.json.
"""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import glmjax
from glmjax import errors
from glmjax.cards import about as about_lib
from glmjax.cards import compute as compute_lib
from glmjax.cards import curve as curve_lib
from glmjax.cards import document
from glmjax.cards import emissions as emissions_lib
from glmjax.cards import facts as facts_lib
from glmjax.cards import front_matter
from glmjax.cards import integrity
from glmjax.cards import sections
from glmjax.io import folders
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import user_json
from glmjax.plan import footprint as footprint_lib

FORMAT = 1
README, JSON, PAGE = folders.CARD_README, "card.json", "card.html"
_log = logging.getLogger("glmjax")


def make(
  folder: paths.Named,
  out: paths.Named | None = None,
  about: paths.Named | None = None,
  run: paths.Named | None = None,
  cache: paths.Named | None = None,
  text: paths.Named | None = None,
  evaluation: Sequence[paths.Named] = (),
) -> dict[str, Any]:
  """Writes the card of a model, from what its folder, its run and its owner say.

  Args:
    folder: of a training run, an export, an import or an adapter.
    out: folder for the card; None: the model's own.
    about: the owner's statements, a file, or the name of one that comes with glmjax; None: the model's about.yaml.
    run: the training run that an export was made from.
    cache: the token cache that the run read.
    text: report.json of `glmjax data` on the text.
    evaluation: what `glmjax evaluate` wrote of these weights: files of held-out figures, folders of tasks.

  Returns:
    What card.json holds.

  Raises:
    errors.InputError: where something named is of another model, or the card would replace a README.md of the user's.
  """
  folder = facts_lib.local(folder, "the model's folder")
  target = folder if out is None else facts_lib.local(out, "--out")
  stated, stated_in = about_lib.find(folder, about)
  _check_free(target)
  before = _before(target)
  facts, run_folder = facts_lib.gather(folder, stated, facts_lib.Sources(run, cache, text, evaluation))
  compute = None if run_folder is None else compute_lib.total(run_folder)
  rows = [] if facts.config.base else footprint_lib.footprint(facts.config.model)
  known = integrity.Known(facts, compute, rows, before)
  criteria = integrity.report(known)
  emissions = _emissions(compute, stated)
  curve = None
  if facts.training is not None:
    total = None if facts.config.base else sum(facts.weights.parameters.values())
    curve = curve_lib.fit(run_folder / "metrics.jsonl", total)
  more = sections.More(rows, [] if curve is None else curve.sentences(), _pictures(curve), emissions)
  page = sections.make(known, criteria, more)
  content = _content(known, criteria, more) | {"curve": None if curve is None else curve.to_dict()}
  _write(target, content, page, front_matter.render(facts, emissions), sections.badges(criteria))
  if stated_in is None and target == folder:
    _log.info(
      "%s", f"{folder / about_lib.FILE} is not there: copy this, and state what you know:\n{about_lib.TEMPLATE}"
    )
  return content | {"out": str(target)}


def _emissions(compute: compute_lib.Compute | None, stated: about_lib.About) -> emissions_lib.Emissions | None:
  """Returns the CO2 of a run; None where its energy or its grid is not known. Without a PUE: of the machines alone."""
  if compute is None or stated.grid is None:
    return None
  return emissions_lib.of(compute.energy.low_kwh, compute.energy.high_kwh, stated.pue or 1.0, stated.grid)


def _pictures(curve: curve_lib.Curve | None) -> list[document.Picture]:
  """Draws the curve, continued; [] where nothing can be told of it."""
  if curve is None or curve.shape is None:
    return []
  says = "Loss over tokens, the law that it follows, and the ends of runs of up to twice the tokens"
  return [document.Picture("card-loss.png", curve_lib.drawn(curve).png, says)]


def _check_free(target: pathlib.Path) -> None:
  """Checks that no README.md is there that glmjax has not written."""
  readme = target / README
  if readme.exists() and not folders.is_card(readme):
    raise errors.InputError(f"{readme} is not of glmjax card, and would be lost: name another --out, or move it away")


def _before(target: pathlib.Path) -> integrity.Previous | None:
  """Returns what the card that is there is of; None where there is none, or it is damaged."""
  try:
    model = user_json.read(target / JSON)["model"]
    return integrity.Previous(model["version"], str(model["weights"]["fingerprint"]))
  except (errors.InputError, KeyError, TypeError):
    return None


def _content(known: integrity.Known, criteria: Sequence[integrity.Criterion], more: sections.More) -> dict[str, Any]:
  """Returns what card.json holds."""
  facts = known.facts
  return facts_lib.plain(
    {
      "format": FORMAT,
      "glmjax": glmjax.__version__,
      "model": {
        "folder": facts.folder,
        "kind": facts.kind,
        "name": facts.about.name,
        "version": facts.about.version,
        "weights": facts_lib.plain(facts.weights),
        "architecture": facts_lib.plain(facts.config.model),
        "tokenizer": facts.tokenizer,
        "files": facts.files,
        "base": facts.config.base or None,
      },
      "about": facts_lib.plain(facts.about),
      "data": {
        "recorded": facts.config.data or None,
        "cache": None if facts.manifest is None else facts_lib.rows_of(facts.manifest),
        "text": facts.text,
      },
      "training": facts.training,
      "interventions": facts.interventions,
      "compute": None if known.compute is None else known.compute.to_dict(),
      "emissions": None if more.emissions is None else more.emissions.to_dict(),
      "evaluations": [facts_lib.plain(each) for each in facts.evaluations],
      "hardware": [facts_lib.plain(row) for row in more.footprint],
      "integrity": [facts_lib.plain(each) | {"verdict": each.verdict} for each in criteria],
    }
  )


def _write(target: pathlib.Path, content: Mapping[str, Any], page: document.Document, head: str, badges: str) -> None:
  """Writes the files, each whole; card.json last, which says what the others are of."""
  readme = f"{head}{folders.CARD_MARK}\n\n{document.markdown(page)}"
  try:
    target.mkdir(parents=True, exist_ok=True)
    for picture in page.pictures:
      with publish.file(target / picture.file) as file:
        file.write(picture.png)
    publish.write_text(target / PAGE, document.page(page, badges))
    publish.write_text(target / README, readme)
    publish.write_json(target / JSON, content)
  except OSError as error:
    raise errors.InputError(f"cannot write the card to {target}: {errors.reason(error)}") from error


def check(folder: paths.Named, out: paths.Named | None = None, waive: Sequence[str] = ()) -> dict[str, Any]:
  """Checks that a model's card is of these weights and statements, and that every criterion is evidenced.

  Args:
    folder: the model's.
    out: folder of the card; None: the model's own.
    waive: names of criteria that need not be met.

  Returns:
    {"problems": a line each, "criteria": those looked at}.

  Raises:
    errors.InputError: where there is no card.
  """
  folder = facts_lib.local(folder, "the model's folder")
  target = folder if out is None else facts_lib.local(out, "--out")
  content = user_json.read(target / JSON, expected=f"make the card first: glmjax card {folder}")
  try:
    criteria = [
      integrity.Criterion(each["name"], each["group"], tuple(each["evidence"]), tuple(each["missing"]))
      for each in content["integrity"]
    ]
    model, stated = content["model"], content["about"]
    weights, files = model["weights"]["fingerprint"], dict(model["files"])
  except (KeyError, TypeError, ValueError) as error:
    raise errors.InputError(f"{target / JSON} is damaged ({errors.one_line(error)}): make the card again") from None
  looked = integrity.waived(criteria, list(waive))
  now, _ = facts_lib.gather(folder, about_lib.About(), facts_lib.Sources())
  problems = []
  if now.weights.fingerprint != weights:
    problems.append(
      f"the card is of weights {weights[:16]}, and these are {now.weights.fingerprint[:16]}: make it again"
    )
  problems += [
    f"{name} is other than what the card has: make it again"
    for name in sorted({*files, *now.files})
    if files.get(name) != now.files.get(name)
  ]
  if (folder / about_lib.FILE).exists() and facts_lib.plain(about_lib.read(folder / about_lib.FILE)) != stated:
    problems.append(f"{about_lib.FILE} says other things than the card: make it again")
  problems += [f"{each.name}: {text}" for each in looked for text in each.missing]
  return {"problems": problems, "criteria": [each.name for each in looked]}
