"""The files of a card: whose they are, what earlier ones said, and whether they are still true.

card.json comes last. It has the hashes of the others, and the versions that cards in its folder were of.
"""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from glmjax import errors
from glmjax.cards import about as about_lib
from glmjax.cards import document
from glmjax.cards import facts as facts_lib
from glmjax.cards import integrity
from glmjax.io import folders
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import user_json

FORMAT = 1
README, JSON, PAGE, PICTURES = folders.CARD_README, "card.json", "card.html", "card-*.png"


def claim(target: pathlib.Path, model: pathlib.Path) -> None:
  """Checks that a card may be written: into its model's folder, or one that is no model's, over a card at most.

  Raises:
    errors.InputError: naming what would be lost.
  """
  kinds = folders.kinds(target) if target.is_dir() else []
  if kinds and folders.real(target, "--out") != folders.real(model, "the model's folder"):
    raise errors.InputError(f"--out: {target} is {kinds[0].value}: name another folder")
  readme = target / README
  if readme.exists() and not folders.is_card(readme):
    raise errors.InputError(f"{readme} is not of glmjax card, and would be lost: name another --out, or move it away")
  there = [path for name in (JSON, PAGE, PICTURES) for path in sorted(target.glob(name))]
  if there and not _read(target):
    raise errors.InputError(f"{there[0]} is not of glmjax card, and would be lost: name another --out, or move it away")


def _read(target: pathlib.Path) -> dict[str, Any]:
  """Returns what a folder's card.json holds; {} where there is none, or it is no card's."""
  try:
    content = user_json.read(target / JSON)
  except errors.InputError:
    return {}
  return content if isinstance(content.get("integrity"), list) and isinstance(content.get("model"), dict) else {}


def earlier(target: pathlib.Path, weights: str) -> list[integrity.Version]:
  """Returns the versions that cards in a folder were of, but for those of these weights."""
  content = _read(target)
  found = content.get("versions")
  versions = []
  for each in found if isinstance(found, list) else []:
    version, fingerprint = (each.get("version"), each.get("weights")) if isinstance(each, dict) else (None, None)
    if isinstance(version, str) and not about_lib.VERSION.fullmatch(version):
      version = None
    if isinstance(fingerprint, str) and fingerprint != weights:
      versions.append(integrity.Version(version if isinstance(version, str) else None, fingerprint))
  return versions


def write(
  target: pathlib.Path,
  content: Mapping[str, Any],
  versions: Sequence[integrity.Version],
  readme: str,
  page: str,
  pictures: Sequence[document.Picture],
) -> dict[str, Any]:
  """Writes a card, each file whole, and returns what card.json holds.

  Args:
    content: of card.json, without the versions and hashes.
    versions: that cards here were of, this one's last.
  """
  files = {README: readme.encode(), PAGE: page.encode()} | {picture.file: picture.png for picture in pictures}
  hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
  whole = {**content, "versions": [facts_lib.plain(each) for each in versions], "written": hashes}
  try:
    target.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
      with publish.file(target / name) as file:
        file.write(data)
    for old in target.glob(PICTURES):
      if old.name not in files:
        old.unlink()
    publish.write_json(target / JSON, whole)
  except OSError as error:
    raise errors.InputError(f"cannot write the card to {target}: {errors.reason(error)}") from error
  return whole


def check(folder: paths.Named, out: paths.Named | None = None, waive: Sequence[str] = ()) -> dict[str, Any]:
  """Checks that a model's card is whole, of these weights and statements, and that every criterion is evidenced.

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
    model, stated, written = content["model"], content["about"], dict(content["written"])
    weights, files = model["weights"]["fingerprint"], dict(model["files"])
    if [each.name for each in criteria] != integrity.names():
      raise ValueError("the criteria are not those that there are")
  except (KeyError, TypeError, ValueError) as error:
    raise errors.InputError(f"{target / JSON} is damaged ({errors.one_line(error)}): make the card again") from None
  looked = integrity.waived(criteria, list(waive))
  now, _, _ = facts_lib.gather(folder, about_lib.About(), facts_lib.Sources())
  problems = []
  if now.weights.fingerprint != weights:
    problems.append(
      f"the card is of weights {weights[:16]}, and these are {now.weights.fingerprint[:16]}: make it again"
    )
  changed = [name for name in sorted({*files, *now.files}) if files.get(name) != now.files.get(name)]
  changed += [name for name, expected in written.items() if _hash(target / name) != expected]
  problems += [f"{name} is other than the card says: make it again" for name in changed]
  problems += _stated(folder, stated, content.get("stated_in"))
  problems += [f"{each.name}: {text}" for each in looked for text in each.missing]
  return {"problems": problems, "criteria": [each.name for each in looked]}


def _hash(path: pathlib.Path) -> str | None:
  return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _stated(folder: pathlib.Path, stated: Mapping[str, Any], where: Any) -> list[str]:
  """Says where the owner's statements are others now, or gone."""
  path = folder / about_lib.FILE
  if path.exists():
    same = facts_lib.plain(about_lib.read(path)) == stated
    return [] if same else [f"{about_lib.FILE} says other things than the card: make it again"]
  return (
    [f"{about_lib.FILE} is gone, and the card has its statements: make it again"] if where == about_lib.FILE else []
  )
