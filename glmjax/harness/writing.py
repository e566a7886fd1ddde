"""Layouts of data sets whose answers are written: the last word of a text, a span of it, a summary."""

import hashlib
import pathlib
import re
from typing import Any

from glmjax import errors
from glmjax.harness import files
from glmjax.io import user_text

Records = files.Records


def last_word(path: pathlib.Path) -> Records:
  """Yields a text without its last word, and that word (Paperno et al., 2016), of a .jsonl file's `text` or of lines.

  A text's words are what spaces divide.
  """
  if path.suffix == ".jsonl":
    texts = ((files.entry(record, "text", place), place) for record, place in files.lines(path))
  else:
    texts = ((line, f"{path}, line {number}") for number, line in user_text.lines(path) if line.strip())
  for text, place in texts:
    words = text.strip().rsplit(maxsplit=1)
    if len(words) < 2:
      raise errors.InputError(f"{place}: a single word: there is nothing before the last one")
    yield {"context": words[0], "word": words[1]}, place


def squad(content: Any, where: str) -> Records:
  """Yields context, question and answers (each once) of SQuAD's nested form, which CMRC 2018 and DRCD have too."""
  for article in files.entry(content, "data", where, list):
    for paragraph in files.entry(article, "paragraphs", where, list):
      context = files.entry(paragraph, "context", where)
      for question in files.entry(paragraph, "qas", where, list):
        place = f"{where}, question {question.get('id') if isinstance(question, dict) else question}"
        answers = [files.entry(answer, "text", place) for answer in files.entry(question, "answers", place, list)]
        found = {"context": context, "question": files.entry(question, "question", place)}
        yield found | {"answers": list(dict.fromkeys(answers))}, place


def xsum(content: Any, where: str) -> Records:
  """Yields document and summary of XSum's test split (Narayan et al., 2018).

  `content` is XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json; beside it are the articles, bbc-summary-data/ID.summary, whose
  parts begin with [SN]NAME[SN].
  """
  folder = pathlib.Path(where).parent / "bbc-summary-data"
  for name in files.entry(content, "test", where, list):
    path = folder / f"{name}.summary"
    parts = re.split(r"\[SN\]([A-Z-]+)\[SN\]", user_text.read(path))[1:]
    found = {key: text.strip() for key, text in zip(parts[::2], parts[1::2])}
    summary = files.entry(found, "FIRST-SENTENCE", str(path))
    yield {"document": files.entry(found, "RESTBODY", str(path)), "summary": summary}, str(path)


def cnn_dailymail(path: pathlib.Path) -> Records:
  """Yields document and summary of CNN and Daily Mail stories (See et al., 2017).

  `path` is a list of addresses, as all_test.txt; beside it are the stories, cnn/stories/ and dailymail/stories/, named
  by the SHA-1 of their address. What follows each @highlight is a sentence of the summary.
  """
  for number, address in user_text.lines(path):
    name = f"{hashlib.sha1(address.strip().encode()).hexdigest()}.story"
    places = [path.parent / kind / "stories" / name for kind in ("cnn", "dailymail")]
    story = next((place for place in places if place.is_file()), None)
    if story is None:
      raise errors.InputError(f"{path}, line {number}: there is no story {places[0]}, nor in dailymail")
    document, *highlights = user_text.read(story).split("@highlight")
    summary = " ".join(text.strip().rstrip(".") + " ." for text in highlights)
    yield {"document": document.strip(), "summary": summary}, str(story)


def e2e(path: pathlib.Path) -> Records:
  """Yields each meaning of testset_w_refs.csv once, with all its references (Dušek et al., 2020)."""
  found: dict[str, tuple[list[str], str]] = {}
  for record, place in files.table(path):
    references, _ = found.setdefault(files.entry(record, "mr", place), ([], place))
    references.append(files.entry(record, "ref", place))
  for meaning, (references, place) in found.items():
    yield {"meaning": meaning, "references": references}, place


def toxicity_prompts(path: pathlib.Path) -> Records:
  """Yields prompts, what followed them, and how toxic each prompt is, None where nobody knows (Gehman et al., 2020)."""
  for record, place in files.lines(path):
    prompt, continuation = (files.entry(record, name, place, dict) for name in ("prompt", "continuation"))
    found = {"text": files.entry(prompt, "text", place), "continuation": files.entry(continuation, "text", place)}
    yield found | {"prompt_toxicity": prompt.get("toxicity")}, place
