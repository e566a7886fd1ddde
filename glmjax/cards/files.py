"""The files of a card: whose they are, what earlier ones said, and whether they are still true.

card.json comes last. It has the hashes of the others, and the versions that cards in its folder were of.
"""

import hashlib
import json
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
README, JSON, PAGE, PICTURES = folders.CARD_README, *folders.CARD_FILES


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
  there = [path for name in folders.CARD_FILES for path in sorted(target.glob(name))]
  if there and not readme.exists() and not _read(target):  # README.md is written first: a kill may leave it alone
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
  hashes[JSON] = _seal(whole)
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


def _seal(content: Mapping[str, Any]) -> str:
  """Returns the hash of what card.json holds, but for this hash itself."""
  written = {name: own for name, own in content["written"].items() if name != JSON}
  text = json.dumps(facts_lib.plain({**content, "written": written}), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def beside(stated: about_lib.Stated, target: pathlib.Path) -> list[paths.Path]:
  """Returns the folders, beside the model's, in which the licence's text may be: the statements' and the card's."""
  return [each for each in (stated.folder, target) if each is not None]


def check(
  folder: paths.Named, out: paths.Named | None = None, waive: Sequence[str] = (), about: paths.Named | None = None
) -> dict[str, Any]:
  """Checks that a model's card is whole, of these weights and statements, and that every criterion is evidenced.

  Args:
    folder: the model's.
    out: folder of the card; None: the model's own.
    waive: names of criteria that need not be met.
    about: the owner's statements, as the card was made with; None: the model's about.yaml, or what comes with glmjax.

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
    model, written, seal = content["model"], dict(content["written"]), _seal(content)
    weights, files = model["weights"]["fingerprint"], dict(model["files"])
    if [each.name for each in criteria] != integrity.names():
      raise ValueError("the criteria are not those that there are")
  except (KeyError, TypeError, ValueError) as error:
    raise errors.InputError(f"{target / JSON} is damaged ({errors.one_line(error)}): make the card again") from None
  looked = integrity.waived(criteria, list(waive))
  stated, problems = _stated(folder, content, about)
  sources = facts_lib.Sources(beside=beside(stated, target))
  now, _, _ = facts_lib.gather(folder, stated.about, sources)
  if now.weights.fingerprint != weights:
    problems.append(
      f"the card is of weights {weights[:16]}, and these are {now.weights.fingerprint[:16]}: make it again"
    )
  changed = [name for name in sorted({*files, *now.files}) if files.get(name) != now.files.get(name)]
  found = {name: seal if name == JSON else _found(target / name) for name in (*written, JSON)}
  changed += [name for name, own in found.items() if own != written.get(name)]
  problems += [f"{name} is other than the card says: make it again" for name in changed]
  problems += [f"{each.name}: {text}" for each in looked for text in each.missing]
  return {"problems": problems, "criteria": [each.name for each in looked]}


def _found(path: pathlib.Path) -> str | None:
  """Returns the hash of a file of the card; None where it is gone."""
  return facts_lib.file_hash(path) if path.is_file() else None


def _stated(
  folder: pathlib.Path, content: Mapping[str, Any], named: paths.Named | None
) -> tuple[about_lib.Stated, list[str]]:
  """Returns what is stated now, and says where the card has other statements."""
  where = content.get("stated_in")
  if named is None and where in about_lib.shipped():
    named = where
  stated = about_lib.find(folder, named)
  if named is None and where == about_lib.ELSEWHERE:
    return stated, ["the card has the statements of a file elsewhere: name that with --about"]
  if facts_lib.plain(stated.about) == content.get("about"):
    return stated, []
  if stated.where is None:
    return stated, [f"{where} is gone, and the card has its statements: make it again"]
  return stated, [f"{stated.where} says other things than the card: make it again"]
