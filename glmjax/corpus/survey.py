"""A report on text before a model is trained on it: what there is, what is there twice, what should not be there.

Documents stream by one at a time. What is kept of each: 25 bytes, 34 with a tokenizer, and 480 more of those that are
compared for being near duplicates; of everything else a bounded amount.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import importlib.util
from typing import Any

import numpy as np

import glmjax
from glmjax import errors
from glmjax import ranges
from glmjax import show
from glmjax import tokenizer as tokenizer_lib
from glmjax.corpus import measures
from glmjax.corpus import overlap as overlap_lib
from glmjax.corpus import page
from glmjax.corpus import pictures
from glmjax.data import word_list
from glmjax.data import duplicates
from glmjax.data import languages
from glmjax.data import rows
from glmjax.data import text
from glmjax.data import tokenizing
from glmjax.data import units
from glmjax.io import folders
from glmjax.io import paths
from glmjax.io import progress
from glmjax.io import publish
from glmjax.io import user_json

JSON, PAGE = "report.json", "report.md"
_SAMPLE_LENGTH = 48  # places of a sample's row: what a picture has room for
_KIND = "text"  # report.json's "report"
_OBJECTIVES = {"mask": 0.0, "gmask": 1.0}  # of samples: the share of them that leave out all that follows
_SAMPLES = {
  f"{language}_{objective}": f"sample_{language}_{objective}.png"
  for language in languages.LANGUAGES
  for objective in _OBJECTIVES
}


def survey(
  corpora: Mapping[str, text.Patterns] | text.Patterns,
  out: paths.Named,
  tokenizer: paths.Named | None = None,
  against: Sequence[paths.Named] = (),
  words: paths.Named | None = None,
  *,
  field: str = "text",
  near_documents: int = 1_000_000,
) -> dict[str, Any]:
  """Reads text and writes report.md, report.json and pictures of it.

  Args:
    corpora: .jsonl or .txt files, folders or globs; or several of them by name, as mixtures have them.
    out: the report's folder.
    tokenizer: tokenizer folder; None: lengths are in characters alone, and no samples are shown.
    against: evaluation sets, .jsonl or .txt files or folders of them, whose items are looked for in the text.
    words: a list of words, one a line, whose documents are counted; None: none are.
    field: of a .jsonl record, where the text is.
    near_documents: so many, the first, are compared for being near duplicates, at 480 bytes each.

  Returns:
    What report.json holds (docs/data.md).

  Raises:
    errors.InputError: for what is wrong with the files, before or while they are read; nothing is written then.
  """
  ranges.whole("near_documents", near_documents, 0)
  out = paths.named(out, "--out")
  _check_out(out)
  files_of = {name: text.find_files(patterns) for name, patterns in _named(corpora).items()}
  reading = _Reading(
    None if tokenizer is None else tokenizer_lib.Tokenizer.load(tokenizer),
    None if words is None else word_list.Words(words),
    overlap_lib.Evaluation(list(against)) if against else None,
    near_documents,
  )
  for name, files in files_of.items():
    reading.read(name, files, field)
  report = {"glmjax": glmjax.__version__, "report": _KIND, **reading.figures()}
  _write(out, report, reading)
  return report


def _named(corpora: Mapping[str, text.Patterns] | text.Patterns) -> dict[str, text.Patterns]:
  """Returns corpora by name; those without one are each called as it was given."""
  if isinstance(corpora, Mapping):
    text.check_corpora(corpora)
    return dict(corpora)
  if not text.are_patterns(corpora):
    raise errors.InputError(f"corpora are {str(corpora)[:60]!r}: give .jsonl or .txt files, folders or globs")
  each = [corpora] if isinstance(corpora, paths.Named) else list(corpora)
  if not each:
    raise errors.InputError("no text files are named; give .jsonl or .txt files, folders or globs")
  return {str(pattern): pattern for pattern in each}


class _Reading:
  """All that is counted, and the text that streams through it."""

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer | None,
    words: word_list.Words | None,
    evaluation: overlap_lib.Evaluation | None,
    near_documents: int,
  ) -> None:
    self.tokenizer = tokenizer
    self.samples = measures.Samples()
    self._words, self._evaluation = words, evaluation
    self._all, self._corpora = measures.Totals(), dict[str, measures.Totals]()
    self._characters, self._tokens = measures.Lengths(), measures.Lengths()
    self._lines, self._personal = measures.Lines(), measures.Personal()
    self._duplicates, self._places = measures.Duplicates(near_documents), measures.Places()
    self._with_words = self._documents = 0
    self._overlap = max(
      duplicates.SHINGLE - 1, words.overlap if words else 0, overlap_lib.N - 1 if evaluation is not None else 0
    )

  def read(self, name: str, files: Sequence[paths.Path], field: str) -> None:
    """Takes in a corpus."""
    totals = self._corpora.setdefault(name, measures.Totals())
    documents = self._tokenized(self._documents_of(files, field))
    with progress.bar(documents, desc=f"read {name}", unit=" documents", disable=None) as bar:
      for document, tokens in bar:
        self._add(document, tokens, totals)

  def _documents_of(self, files: Sequence[paths.Path], field: str) -> Iterator[str]:
    before = self._documents
    for path in files:
      self._places.begin(str(path), before)
      for _, document in text.file_documents(path, 0, field):
        before += 1
        yield document

  def _tokenized(self, documents: Iterator[str]) -> Iterator[tuple[str, int | None]]:
    """Yields documents with how many tokens they have."""
    if self.tokenizer is None:
      yield from ((document, None) for document in documents)
      return
    for group in tokenizing.groups((document,) for document in documents):
      texts = [document for (document,) in group]
      yield from zip(texts, map(len, self.tokenizer.encode_arrays(texts)))

  def _add(self, document: str, tokens: int | None, totals: measures.Totals) -> None:
    place = self._places.place(self._documents)
    classes, sketch, has_words = np.zeros(6, np.int64), self._duplicates.begin(), False
    for block in units.blocks(document, self._overlap):
      classes += block.classes
      sketch.add(block)
      has_words = has_words or self._words is not None and self._words.are_in(block)
      if self._evaluation is not None:
        self._evaluation.meet(block.grams(overlap_lib.N))
    language, size = languages.language(classes), tokenizing.utf8_bytes(document)
    self._duplicates.add(sketch, size)
    for each in (self._all, totals):
      each.add(language, size, len(document))
    self._characters.add(len(document), language)
    if tokens is not None:
      self._tokens.add(tokens, language)
    self._lines.add(document, place)
    self._personal.add(document, place)
    self.samples.add(document, language)
    self._with_words += has_words
    self._documents += 1

  def figures(self) -> dict[str, Any]:
    """Returns what report.json has of the text."""
    found = {
      **self._all.figures(),
      "corpora": {name: totals.figures() for name, totals in self._corpora.items()},
      "lengths": {"characters": self._characters.figures()},
      "duplicates": self._duplicates.figures(self._places),
      "lines": self._lines.figures(),
      "personal": self._personal.figures(),
    }
    if self.tokenizer is not None:
      found["tokenizer"] = self.tokenizer.fingerprint
      found["lengths"]["tokens"] = self._tokens.figures()
    if self._words is not None:
      found["words"] = {
        "list": str(self._words.path),
        "documents": self._with_words,
        "share": self._with_words / self._documents,
      }
    if self._evaluation is not None:
      found["overlap"] = self._evaluation.figures()
    return found


def _check_out(out: paths.Path) -> None:
  """Finds out before the work whether the report has a place, and takes the place of an earlier one at most."""
  others = (PAGE, *pictures.FILES, *_SAMPLES.values())
  for name in (JSON, *others):
    folders.claim_file(out / name, "--out")
  if (out / JSON).exists():
    if user_json.read(out / JSON).get("report") != _KIND:
      raise errors.InputError(f"{out / JSON} is not of glmjax data, and would be lost: name another --out")
    return
  for name in others:
    if (out / name).exists():
      raise errors.InputError(f"{out / name} is not of glmjax data, and would be lost: name another --out")


def _write(out: paths.Path, report: Mapping[str, Any], reading: _Reading) -> None:
  """Writes the figures, the pictures and the page.

  Raises:
    errors.InputError: where the system refuses.
  """
  drawn, samples = {}, _samples(reading)
  if importlib.util.find_spec("matplotlib") is not None:  # of the extra `report`: the page does without
    drawn = pictures.draw(report)
    drawn |= {_SAMPLES[name]: show.row(row, reading.tokenizer) for name, row in samples.items()}
  decode = functools.partial(reading.tokenizer.decode, show_special=True) if reading.tokenizer else None
  described = {name: rows.describe_samples(row, decode) for name, row in samples.items()}
  try:
    with contextlib.ExitStack() as stack:
      stack.enter_context(publish.parent(out / JSON))
      publish.write_json(out / JSON, report)  # first: by it a next report knows that the others are to be replaced
      for name, picture in drawn.items():
        picture.save(out / name)
      publish.write_text(out / PAGE, page.render(report, described, list(drawn)))
  except OSError as error:
    raise errors.InputError(f"{out} cannot be written: {errors.reason(error)}; write --out elsewhere") from error


def _samples(reading: _Reading) -> dict[str, rows.Row]:
  """Returns rows of documents' beginnings, with blanks and with all that follows left out, by names of pictures."""
  if reading.tokenizer is None:
    return {}
  made = {}
  for language, beginning in reading.samples.texts.items():
    tokens = reading.tokenizer.encode_arrays([beginning])[0]
    for objective, gmask_rate in _OBJECTIVES.items():
      infilling = rows.BlankInfilling(
        _SAMPLE_LENGTH, reading.tokenizer.specials, gmask_rate=gmask_rate, samples_per_sequence=1
      )
      if len(tokens) >= 2:
        made[f"{language}_{objective}"] = infilling.text_row(tokens[: infilling.window_length], 0, 0)
  return made
