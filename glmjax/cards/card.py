"""The card of a model: README.md for the Hub, card.json for programs, card.html for people, and the check of them.

  FOLDER/  README.md   card.json   card.html   card-*.png

docs/cards.md documents card.json.
"""

import importlib.util
import logging
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
from glmjax.cards import files
from glmjax.cards import front_matter
from glmjax.cards import integrity
from glmjax.cards import sections
from glmjax.io import folders
from glmjax.io import paths
from glmjax.plan import footprint as footprint_lib

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
    errors.InputError: where something named is of another model, or the card would replace files of the user's.
  """
  folder = facts_lib.local(folder, "the model's folder")
  target = folder if out is None else facts_lib.local(out, "--out")
  stated = about_lib.find(folder, about)
  files.claim(target, folder)
  sources = facts_lib.Sources(run, cache, text, evaluation, files.beside(stated, target))
  facts, run_folder, steps = facts_lib.gather(folder, stated.about, sources)
  compute = None if run_folder is None else compute_lib.total(run_folder)
  rows = [] if facts.config.base else footprint_lib.footprint(facts.config.model)
  earlier = files.earlier(target, facts.weights.fingerprint)
  known = integrity.Known(facts, compute, rows, earlier)
  criteria = integrity.report(known)
  curve = _curve(facts, steps)
  more = sections.More(rows, [] if curve is None else curve.sentences(), _pictures(curve), _emissions(known))
  page = sections.make(known, criteria, more)
  content = _content(known, criteria, more) | {"curve": None if curve is None else curve.to_dict()}
  content["stated_in"] = stated.where
  whole = known.compute is not None and integrity.is_whole(known.compute, facts.weights.step)
  head = front_matter.render(facts, more.emissions if whole else None)
  written = files.write(
    target,
    content,
    [*earlier, integrity.Version(stated.about.version, facts.weights.fingerprint)],
    f"{head}{folders.CARD_MARK}\n\n{document.markdown(page)}",
    document.page(page, sections.badges(criteria)),
    page.pictures,
  )
  if stated.where is None and target == folder:
    where = folder / about_lib.FILE
    _log.info("%s is not there: copy this, and state what you know:\n%s", where, about_lib.TEMPLATE)
  return written | {"out": str(target)}


def _curve(facts: facts_lib.Facts, steps: Sequence[Mapping[str, Any]]) -> curve_lib.Curve | None:
  """Fits the curve of the steps behind the weights; None where none are known, or they lack what a fit takes."""
  if not steps:
    return None
  total = None if facts.config.base else sum(facts.weights.parameters.values())
  try:
    return curve_lib.fit(steps, total)
  except errors.InputError:
    return None


def _emissions(known: integrity.Known) -> emissions_lib.Emissions | None:
  """Returns the CO2 of a run; None where its energy or its grid is not known. Without a PUE: of the machines alone."""
  compute, about = known.compute, known.facts.about
  if compute is None or about.grid is None:
    return None
  return emissions_lib.of(compute.energy.low_kwh, compute.energy.high_kwh, about.pue or 1.0, about.grid)


def _pictures(curve: curve_lib.Curve | None) -> list[document.Picture]:
  """Draws the curve, continued; [] where nothing can be told of it, or matplotlib is not installed."""
  if curve is None or curve.shape is None or importlib.util.find_spec("matplotlib") is None:
    return []
  says = "Loss over tokens, the law that it follows, and the ends of runs of up to twice the tokens"
  return [document.Picture("card-loss.png", curve_lib.drawn(curve).png, says)]


def _content(known: integrity.Known, criteria: Sequence[integrity.Criterion], more: sections.More) -> dict[str, Any]:
  """Returns what card.json holds."""
  facts = known.facts
  return facts_lib.plain(
    {
      "format": files.FORMAT,
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
        "run": facts.run,
      },
      "about": facts_lib.plain(facts.about),
      "data": {
        "recorded": facts.config.data or None,
        "cache": None if facts.manifest is None else facts_lib.rows_of(facts.manifest),
        "text": facts.text,
      },
      "training": facts.training,
      "interventions": facts.interventions,
      "probe": facts.probe,
      "compute": None if known.compute is None else known.compute.to_dict(),
      "emissions": None if more.emissions is None else more.emissions.to_dict(),
      "evaluations": [facts_lib.plain(each) for each in facts.evaluations],
      "hardware": [facts_lib.plain(row) for row in more.footprint],
      "integrity": [facts_lib.plain(each) | {"verdict": each.verdict} for each in criteria],
    }
  )
