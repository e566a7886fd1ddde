"""The card command: what it prints, and what a check of a card comes to."""

from pathlib import Path
from typing import Any

from glmjax.cli.flags import Command, Flag


def show(content: dict[str, Any]) -> None:
  """Prints where the card is, and of each criterion how it fares and what is missing."""
  print(content["out"])
  for each in content["integrity"]:
    print(f"{each['verdict']:12} {each['name']}{': ' if each['missing'] else ''}{'; '.join(each['missing'])}")


def show_check(found: dict[str, Any]) -> None:
  """Prints what is wrong with a card, a line each."""
  print(
    "\n".join(found["problems"]) or f"the card is of this model, and {len(found['criteria'])} criteria are evidenced"
  )


def status(found: dict[str, Any]) -> int:
  """Returns 1 where a check found a problem, 0 otherwise."""
  return 1 if found["problems"] else 0


def show_changes(found: dict[str, Any]) -> None:
  """Prints what is other in one model than in another."""
  from glmjax.cards import changes

  print(changes.table(found))


CHANGES = Command(
  "compare --weights",
  "glmjax.cards.changes.compare",
  "what is other in one model than in the one before: a changelog, and which number of its version rises",
  "glmjax compare --weights --json runs/mine-float runs/mine-tuned",
  (Flag("runs", "two folders of models: before and after", Path, repeatable=True),),
  show=show_changes,
)

_FOLDER = Flag("folder", "of the model: a training run, an export, an import or an adapter", Path)
_OUT = Flag("--out", "folder of the card (the model's own)", Path)
_ABOUT = Flag(
  "--about", "YAML file of what its owner states (about.yaml in the folder), or quickstart, glm-130b, ...", Path
)

COMMANDS = (
  Command(
    "card",
    "glmjax.cards.card.make",
    "say of a model what it is, cost and takes, with the evidence: README.md, card.json, card.html",
    "glmjax card --run=runs/mine --cache=runs/cache --evaluation=runs/mine-evaluated runs/mine-int4",
    (
      _FOLDER,
      _OUT,
      _ABOUT,
      Flag("--run", "folder of the training run that an export was made from", Path),
      Flag("--cache", "folder of the token cache that the run read", Path),
      Flag("--text", "report.json of glmjax data on that text", Path),
      Flag("--evaluation", "what glmjax evaluate wrote of it, file or folder (repeatable)", Path, repeatable=True),
    ),
    show=show,
    modes=(
      Command(
        "card --check",
        "glmjax.cards.files.check",
        "check that a card is of the model beside it, and that all criteria are evidenced: status 1 otherwise",
        "glmjax card --check --waive='training compute' runs/mine-int4",
        (_FOLDER, _OUT, _ABOUT, Flag("--waive", "a criterion that need not be met (repeatable)", repeatable=True)),
        show=show_check,
        status=status,
      ),
    ),
  ),
)
