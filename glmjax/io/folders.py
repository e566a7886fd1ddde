"""What a folder is, told by its marks, and who may write there.

Nothing takes over or deletes what is of another kind: whoever writes a folder or a file claims it first. An export, a
token cache and a tokenizer are replaced as a whole, so that nothing else may be in them; a run has names of its own
in its folder, and leaves the others alone.
"""

from collections.abc import Callable, Iterable, Iterator
import enum
import fnmatch
import itertools
import json
import os
import pathlib
import re
from typing import Any

from glmjax import errors
from glmjax.io import globs
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import together
from glmjax.io import tokenizer_folder

CARD_README = "README.md"
CARD_FILES = CARD_JSON, CARD_PAGE, CARD_PICTURES = "card.json", "card.html", "card-*.png"
CARD_MARK = "<!-- Written by glmjax card: change about.yaml, and make it again. -->"
_LARGEST_CARD = 1 << 22  # bytes of its metadata
_LARGEST_MARK = 1 << 26  # bytes of a JSON file that is looked into
_LARGEST_LAYOUT = 1 << 16  # of our tokenizer.json; those of other programs hold the vocabulary


class Kind(enum.Enum):
  """What a folder can be; the value is how it is called."""

  RUN = "a training run"
  EXPORT = "an exported model"
  CACHE = "a token cache"
  TOKENIZER = "a tokenizer"
  TEXT = "the sample text"
  WEIGHTS = "model weights of another program"


COMPUTE = re.compile(r"compute(-[1-9][0-9]{0,5})?\.jsonl")  # what a run cost, a file of each process
# The files of each kind, by their paths within its folder. Of a run: all that --overwrite may delete.
_FILES = {
  Kind.RUN: r"((config|probe)\.json|config\.gin|(metrics|layers)\.jsonl|interventions\.(jsonl|gin)|\.lock|"
  rf"{COMPUTE.pattern}|"
  r"(checkpoints|checkpoints\.deleting|tokenizer|tensorboard|profile)(/.*)?)",
  Kind.EXPORT: r"(README\.md|card(\.(json|html)|-\w+\.png)|config\.json|checksums\.json|"
  r"tokenizer/tokenizer\.(json|model)|params/(_\w+|commit_success\.txt|\w+\.jsonl?|weights\.safetensors|[^/]+/(\.zarray|[\d.]+(\.__lock)?|process_\d+)))",
  Kind.CACHE: r"(manifest\.json|config\.gin|tokenizer/[^/]+|progress/[^/]+\.json|"
  r"[^/]+/[^/]+-\d{5}-of-\d{5}\.\w+)",
  Kind.TOKENIZER: r"(tokenizer\.model|tokenizer\.json|config\.gin)",
  Kind.TEXT: r"(en|zh)\.jsonl",
  Kind.WEIGHTS: r"((generation_|tokenizer_)?config\.json|latest|[^/]+\.(safetensors|bin|pt|model|index\.json)|"
  r"[^/]+/mp_rank_[^/]+\.pt)",
}
_REPLACED_WHOLE = (Kind.EXPORT, Kind.CACHE, Kind.TOKENIZER)
_SWEPT = (Kind.EXPORT, Kind.TOKENIZER, Kind.WEIGHTS)  # of what killed writers leave in a bucket
_OF_MODEL = {"vocab_size", "num_layers", "embed_dim"}  # in config.json, under "model"


def real(path: paths.Named, what: str) -> paths.Path:
  """Returns the absolute path without links, so that a link's target is judged and written, not the link.

  Args:
    path: as the user wrote it.
    what: names it in the error, as "--workdir".
  """
  path = paths.named(path, what)
  return pathlib.Path(os.path.realpath(path)) if isinstance(path, pathlib.Path) else path


def called(path: paths.Named, what: str) -> str:
  """Returns what a folder is called: the last part of its path as the user wrote it, so that a link has its own name;
  where that says nothing ("." or ".."), the real folder's name.

  Args:
    path: as the user wrote it.
    what: names it in the error, as "--workdir".
  """
  name = paths.named(path, what).name
  return name if name not in ("", "..") else real(path, what).name


def kinds(folder: paths.Path, among: Iterable[Kind] = Kind) -> list[Kind]:
  """Returns all that a folder shows marks of; [] when it is missing, empty, or holds other things."""
  try:
    return [kind for kind in among if _MARKS[kind](folder)]
  except PermissionError:  # of a parent that others own
    return []
  except OSError as error:
    raise errors.InputError(f"cannot look into {folder}: {errors.reason(error)}") from error


def claim(
  path: paths.Named, kind: Kind, what: str, *, overwrite: bool = False, sources: Iterable[paths.Named] = ()
) -> paths.Path:
  """Returns the real path of a folder that may be written as `kind`; changes nothing.

  It may be missing, empty, or of this kind already. What is there is then for the caller to compare.

  Args:
    path: as the user wrote it.
    kind: what will be written there.
    what: names the path in the error, as "--workdir".
    overwrite: what is there will be deleted; so all of it must be of this kind.
    sources: folders or files that are read for it.

  Raises:
    errors.InputError: when it is of another kind, lies in what is replaced as a whole, or holds a source.
  """
  folder = real(path, what)
  if not isinstance(folder, pathlib.Path) and not folder.key:
    raise errors.InputError(f"{what} is {folder}: name a folder in it")
  for source in sources:
    _check_apart(folder, kind, real(source, "the source"))
  _check_parents(folder)
  try:
    there = sorted(child.name for child in folder.iterdir())
  except FileNotFoundError:
    return folder
  except OSError as error:
    raise errors.InputError(f"{folder} can be no folder: {errors.reason(error)}; choose another") from error
  if publish.in_work(folder):
    _check_may_sweep(folder, kind)
    return folder
  found = kinds(folder)
  others = [other.value for other in found if other is not kind]
  if kind is Kind.RUN and kind in found:
    others = [other.value for other in found if other in _REPLACED_WHOLE]
  if others:
    raise errors.InputError(f"{folder} is {' and '.join(others)}: choose another folder for {kind.value}")
  if kind not in found:
    _check_free(folder, kind, there)
  elif overwrite and kind in _REPLACED_WHOLE and (strange := list(itertools.islice(strangers(folder, kind), 3))):
    raise errors.InputError(
      f"{folder} holds more than {kind.value} ({', '.join(strange)}), which would be deleted: "
      "move that away, or choose another folder"
    )
  return folder


def _check_may_sweep(folder: paths.Path, kind: Kind) -> None:
  """Checks that what a writer left unfinished in a bucket is of a kind that the next writer removes, and all of it."""
  if kind not in (Kind.EXPORT, Kind.TOKENIZER):
    raise errors.InputError(f"{folder} holds what a writer has not finished: choose another folder for {kind.value}")
  for path in _files_below(folder):
    inside = path.relative_to(folder)
    written = publish.is_unfinished(path.name) or any(_owns(each, inside) for each in _SWEPT)
    if not written:
      raise errors.InputError(
        f"{folder} holds what a writer has not finished, and {inside}, which would be deleted with it: move that away, "
        "or choose another folder"
      )


def claim_file(path: paths.Named, what: str, stream: bool = False) -> paths.Path:
  """Returns the path of a file that a result may be written to, without links; changes nothing.

  Args:
    path: as the user wrote it.
    what: names the path in the error, as "--out".
    stream: it is only added to, so that a terminal or a pipe will do; its path is returned as it is.

  Raises:
    errors.InputError: when it is a folder, no regular file, or is a part of what a folder of any kind is made of.
  """
  file = paths.named(path, what)
  try:
    if file.is_dir():
      raise errors.InputError(f"{what}: {file} is a folder; name a file")
    if file.exists() and not file.is_file():
      if stream:
        return file
      raise errors.InputError(f"{what}: {file} is no regular file; choose another")
  except OSError as error:
    raise errors.InputError(f"{what}: cannot write {file}: {errors.reason(error)}") from error
  file = real(file, what)
  owners = [(parent, kind) for parent in file.parents for kind in _FILES if _owns(kind, file.relative_to(parent))]
  for _, kind in _shown(owners):
    raise errors.InputError(f"{what}: {file} belongs to {kind.value}; choose another file")
  return file


def strangers(folder: paths.Path, kind: Kind) -> Iterator[str]:
  """Yields the files in a folder that are not of this kind; unfinished ones and links to folders are nobody's."""
  for path in _files_below(folder):
    inside = path.relative_to(folder)
    written_by_user = inside.as_posix() == CARD_README and not is_card(path)
    if not publish.is_unfinished(path.name) and (written_by_user or not _owns(kind, inside)):
      yield str(inside)


def is_card(readme: paths.Path) -> bool:
  """Tells whether a README.md is a card's, which is made again: its mark is a line behind the metadata. All others are
  the user's.
  """
  if not readme.is_file():
    return False
  with readme.open("rb") as file:
    head = file.read(_LARGEST_CARD).decode("utf-8", "replace")
  _, _, behind = head.removeprefix("---\n").partition("\n---\n")
  return behind.startswith(f"{CARD_MARK}\n")


def card(folder: paths.Path) -> list[paths.Path]:
  """Returns the files of a model's card, README.md first; none where README.md is the user's."""
  readme = folder / CARD_README
  if not is_card(readme):
    return []
  there = sorted(folder.iterdir())
  return [readme, *(path for path in there if any(fnmatch.fnmatchcase(path.name, name) for name in CARD_FILES))]


def _files_below(folder: paths.Path) -> Iterator[paths.Path]:
  """Yields all that is no folder, links that lead nowhere as well, as it is found."""
  if not isinstance(folder, pathlib.Path):
    yield from folder.rglob("*")
    return
  for parent, _, files in os.walk(folder):
    yield from (pathlib.Path(parent) / name for name in sorted(files))


def _owns(kind: Kind, inside: pathlib.PurePath) -> bool:
  return re.fullmatch(_FILES[kind], inside.as_posix(), re.DOTALL) is not None


def _check_apart(folder: paths.Path, kind: Kind, source: paths.Path) -> None:
  """Checks that what is read is not what is written, nor lies in what may be deleted for it."""
  on_disk = isinstance(source, pathlib.Path) and isinstance(folder, pathlib.Path)
  if source == folder or on_disk and source.exists() and folder.exists() and os.path.samefile(source, folder):
    raise errors.InputError(f"{folder} is the source itself: choose another folder for {kind.value}")
  if folder in source.parents and (kind is not Kind.RUN or _owns(kind, source.relative_to(folder))):
    raise errors.InputError(f"{folder} holds the source {source}: choose another folder for {kind.value}")


def _check_parents(folder: paths.Path) -> None:
  owners = [
    (parent, kind)
    for parent in folder.parents
    for kind in (Kind.RUN, *_REPLACED_WHOLE)
    if kind is not Kind.RUN or _owns(kind, folder.relative_to(parent))
  ]
  for parent, kind in _shown(owners):
    raise errors.InputError(
      f"{folder} lies in {kind.value}, {parent}, and would be deleted with it: choose another folder"
    )


def _shown(owners: list[tuple[paths.Path, Kind]]) -> list[tuple[paths.Path, Kind]]:
  """Returns those of some folders and kinds where the folder shows the marks of the kind."""
  return [each for each, found in zip(owners, together.each(lambda each: kinds(each[0], each[1:]), owners)) if found]


def _check_free(folder: paths.Path, kind: Kind, there: list[str]) -> None:
  """Checks that a folder that is not of this kind yet is empty; a run may begin beside files that are none of its own.

  The sample text may go anywhere: it writes only what is not there.
  """
  if kind is Kind.TEXT:
    return
  if kind is Kind.RUN:
    there = [name for name in there if name != ".lock" and _owns(kind, pathlib.PurePath(name))]
  if there:
    listed = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
    raise errors.InputError(f"{folder} holds other things ({listed}) and is not {kind.value}: choose another folder")


def _json(path: paths.Path, largest: int = _LARGEST_MARK) -> dict[str, Any] | None:
  """Reads the object in a small file; {} for one that is damaged, None for none."""
  try:
    if not path.is_file():
      return None
    content = json.loads(path.read_bytes()) if path.stat().st_size <= largest else {}
  except (OSError, ValueError, RecursionError) as error:
    if errors.may_pass(error):  # what cannot be read just now may be anything
      raise
    return {}
  return content if isinstance(content, dict) else {}


def _is_run(folder: paths.Path) -> bool:
  config = _json(folder / "config.json") or {}
  if isinstance(model := config.get("model"), dict) and _OF_MODEL <= set(model) and "export" not in config:
    return True
  steps = folder / "checkpoints"
  return steps.is_dir() and any(
    child.name.isdecimal() and (child / "metadata" / "checksums.json").exists() for child in steps.iterdir()
  )


def _is_export(folder: paths.Path) -> bool:
  if not (folder / "params").is_dir():
    return False
  config = _json(folder / "config.json") or {}
  return (folder / "checksums.json").exists() or "export" in config


def _is_cache(folder: paths.Path) -> bool:
  manifest = _json(folder / "manifest.json")
  if manifest is None and not (folder / "progress").is_dir():
    return False
  if manifest and "tasks" in manifest and "mixture" in manifest or (folder / "progress" / "plan.json").is_file():
    return True
  return any(globs.inside(folder, "*/*-?????-of-?????.tokens"))  # the manifest is damaged


def _is_tokenizer(folder: paths.Path) -> bool:
  layout = folder / tokenizer_folder.LAYOUT
  return (folder / tokenizer_folder.MODEL).is_file() and layout.is_file() and layout.stat().st_size <= _LARGEST_LAYOUT


def _is_text(folder: paths.Path) -> bool:
  return (folder / "en.jsonl").is_file() and (folder / "zh.jsonl").is_file()


def _is_weights(folder: paths.Path) -> bool:
  config = _json(folder / "config.json") or {}
  if "model_type" in config or "architectures" in config or (folder / "ice_text.model").is_file():
    return True
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  patterns = ("*.safetensors", "pytorch_model*.bin", "mp_rank_*.pt", "*.index.json")
  if any(fnmatch.filter(names, pattern) for pattern in patterns):
    return True
  return "latest" in names and any(globs.inside(folder, "*/mp_rank_*.pt"))


_MARKS: dict[Kind, Callable[[paths.Path], bool]] = {
  Kind.RUN: _is_run,
  Kind.EXPORT: _is_export,
  Kind.CACHE: _is_cache,
  Kind.TOKENIZER: _is_tokenizer,
  Kind.TEXT: _is_text,
  Kind.WEIGHTS: _is_weights,
}
