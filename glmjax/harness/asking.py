"""Puts items to a model: all that waits at the same time goes through it together, whichever task it comes from."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import logging
import pickle
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.harness import items as items_lib
from glmjax.harness import lambada
from glmjax.harness import layouts
from glmjax.harness import metrics
from glmjax.harness import task as task_lib
from glmjax.infer import beam as beam_lib
from glmjax.infer import engine as engine_lib
from glmjax.infer import lanes as lanes_lib
from glmjax.infer import sampling as sampling_lib
from glmjax.infer import score as score_lib

_log = logging.getLogger("glmjax")
_DECODED_AT_ONCE = 16  # tokens, before somebody looks who has ended


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
  """An item, and where it stands."""

  task: task_lib.Task
  group: str
  file: str  # its name behind the task's path
  number: int  # from 0, in the file
  packed: bytes  # the item, in a tenth of the memory that its lists of tokens take
  tokens: int  # that the model reads for it
  padded: Sequence[int] = ()  # its prompt as the original's beam search counts it

  @property
  def item(self) -> items_lib.Item:
    """The item, made anew."""
    return pickle.loads(self.packed)

  @property
  def key(self) -> tuple[str, str, str, int]:
    """What tells it from all others of a run."""
    return self.task.name, self.group, self.file, self.number


class Asker:
  """A model that items are put to.

  As in the original eop and eos end answers, and nothing else is kept from coming out.
  """

  def __init__(self, engine: engine_lib.Engine, lambada_ids: Mapping[int, int] | None = None) -> None:
    """Takes a model; `lambada_ids` as lambada.marks takes them."""
    specials = engine.tokenizer.specials
    stops = (specials.eop, specials.eos)
    self._engine = engine_lib.Engine(engine.runner, engine.tokenizer, engine.max_batch, stops, suppressed_tokens=())
    self._lambada_ids = lambada_ids

  def _layout(self, task: task_lib.Task) -> layouts.Layout:
    return layouts.Layout(task, self._engine.config, self._engine.tokenizer.specials)

  def ask(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Returns the record of each item, in order."""
    found: dict[int, dict[str, Any]] = {}
    scored = [i for i, each in enumerate(asked) if not isinstance(each.item, items_lib.Blank)]
    rows = [self._rows(asked[i]) for i in scored]
    scores = iter(self._engine.score_rows([row for some in rows for row in some]))
    for i, some in zip(scored, rows, strict=True):
      found[i] = self._scored(asked[i], some, [next(scores) for _ in some])
    for task in {each.task.name: each.task for each in asked if isinstance(each.item, items_lib.Blank)}.values():
      members = [i for i, each in enumerate(asked) if each.task is task]
      answers = (self._search if task.searches else self._decode)(task, [asked[i] for i in members])
      for i, answer in zip(members, answers, strict=True):
        found[i] = self._answered(asked[i], answer)
    return [found[i] for i in range(len(asked))]

  def _rows(self, asked: Asked) -> list[score_lib.Row]:
    layout = self._layout(asked.task)
    if isinstance(asked.item, items_lib.Window):
      return [layout.window(asked.item)]
    return layout.question(asked.item)

  def _scored(self, asked: Asked, rows: Sequence[score_lib.Row], scores: Sequence[score_lib.Score]) -> dict[str, Any]:
    record = _begun(asked, rows[0].prompt.tokens)
    if isinstance(asked.item, items_lib.Window):
      return record | {"loss": -scores[0].total, "tokens": scores[0].count}
    totals, counts = [score.total for score in scores], [score.count for score in scores]
    compared = [total / count for total, count in zip(totals, counts)] if asked.task.kind.by_length else totals
    prediction = int(np.argmax(compared))
    return record | {
      "scores": totals,
      "tokens": counts,
      "prediction": prediction,
      "target": asked.item.label,
      "values": {} if asked.task.kind.own_metrics else {"Accuracy": float(prediction == asked.item.label)},
    }

  def _decode(self, task: task_lib.Task, asked: Sequence[Asked]) -> list[list[beam_lib.Beam]]:
    """Returns of each item the one answer that the likeliest tokens make, or those that are drawn, each item's always
    the same.
    """
    sampling = sampling_lib.Sampling(float(task.num_samples > 0), top_p=task.top_p, min_tokens=task.min_gen_length)
    count = max(1, task.num_samples)
    scheduler = self._engine.scheduler(min(count * len(asked), self._engine.max_batch))
    layout = self._layout(task)
    prompts = [layout.blank(each.item) for each in asked]
    answers = [
      scheduler.submit(lanes_lib.Request(prompt, task.max_gen_length, sampling, each.number * count + i))
      for each, prompt in zip(asked, prompts)
      for i in range(count)
    ]
    while scheduler.busy:
      scheduler.advance(_DECODED_AT_ONCE, fill=True)
    for answer in answers:
      answer.check()
    found = [beam_lib.Beam(answer.tokens, 0.0) for answer in answers]
    return [found[first : first + count] for first in range(0, len(found), count)]

  def _search(self, task: task_lib.Task, asked: Sequence[Asked]) -> list[list[beam_lib.Beam]]:
    """Returns of each item its beams, the best first, without the prompt."""
    settings = search(task)
    specials, suppressed_V, beginnings = self._engine.tokenizer.specials, None, []
    if task.kind.first_word:
      never, beginnings = lambada.marks(self._engine.tokenizer, self._lambada_ids)
      suppressed_V = np.isin(np.arange(self._engine.config.vocab_size), [*never])
    ids = beam_lib.Ids(sorted(self._engine.stops), specials.pad, suppressed_V, beginnings)
    layout, size = self._layout(task), max(1, self._engine.max_batch // task.num_beams)
    found = []
    for first in range(0, len(asked), size):
      some = asked[first : first + size]
      prompts = [layout.blank(each.item) for each in some]
      counted = [each.padded for each in some]
      beams = beam_lib.search(self._engine.runner, prompts, task.max_gen_length, settings, ids, counted)
      for own, row in zip(beams, counted):
        found.append([dataclasses.replace(each, tokens=each.tokens[len(row) :]) for each in own])
    return found

  def _answered(self, asked: Asked, beams: Sequence[beam_lib.Beam]) -> dict[str, Any]:
    tokenizer, item, task = self._engine.tokenizer, asked.item, asked.task
    answers = [self._without_stop(beam.tokens) for beam in beams]
    texts = [tokenizer.decode(answer) for answer in answers]
    if end := tokenizer.decode(self._layout(task).end(item)):
      texts = [text.partition(end)[0] for text in texts]
    chosen = lambada.choose(texts) if task.kind.first_word else 0
    prediction, text = answers[chosen], texts[chosen]
    if task.kind.first_word:
      prediction = tokenizer.encode(lambada.first_word(text))
      text = tokenizer.decode(prediction)
      values = {"Accuracy": float(any(text.strip() == target.strip() for target in item.targets))}
    else:
      counted = texts if task.num_samples else [text]
      values = {name: _mean_of(name, counted, item.targets) for name in task.metrics}
    record = _begun(asked, self._layout(task).blank(item).tokens)
    if task.searches:
      record["beams"] = [{"tokens": beam.tokens, "score": beam.score} for beam in beams]
    if task.num_samples:
      record["continuations"] = texts
    return record | {
      "answer": answers[chosen],
      "prediction": prediction,
      "prediction_text": text,
      "targets": item.targets,
      "values": values,
    }

  def _without_stop(self, tokens: Sequence[int]) -> list[int]:
    return list(tokens[:-1] if tokens and tokens[-1] in self._engine.stops else tokens)


def _mean_of(metric: str, texts: Sequence[str], targets: Sequence[str]) -> float:
  return float(np.mean([metrics.OF_ANSWER[metric](text, targets) for text in texts]))


def _begun(asked: Asked, prompt: Sequence[int]) -> dict[str, Any]:
  """Returns what a record says of its item, with a fingerprint of what the model read first."""
  fingerprint = hashlib.sha256(np.array(prompt, "<i8").tobytes()).hexdigest()[:16]
  place = {"task": asked.task.name, "group": asked.group, "file": asked.file, "item": asked.number}
  return {**asked.item.fields, **place, "prompt": fingerprint}


def search(task: task_lib.Task) -> beam_lib.BeamSearch:
  """Returns how a task's answers are searched for.

  Raises:
    errors.InputError: for a setting that is out of range.
  """
  return beam_lib.BeamSearch(task.num_beams, task.length_penalty, task.no_repeat_ngram_size, task.min_gen_length)


def placed(
  group: str,
  file: str,
  items: Iterable[items_lib.Item],
  layout: layouts.Layout,
  limit: int | None = None,
  skip: bool = False,
) -> list[Asked]:
  """Returns a file's items, each with its place, the first `limit` of them; `skip`: without those that do not fit into
  the model, which is said.

  Raises:
    errors.InputError: for one that does not fit, unless they are left out, and choices that the task's metric does not
      compare.
  """
  task, found, unfit, wrong, texts = layout.task, [], [], 0, False
  searches = task.searches and task.type == task_lib.GENERATION
  batch, prompts = task.micro_batch_size if searches else 1, []
  most = None if limit is None else -(-limit // batch) * batch  # whole batches, whose longest prompt counts
  for i, item in enumerate(items):
    try:
      found.append(Asked(task, group, file, i, pickle.dumps(item), layout.tokens(item)))
    except errors.InputError as error:
      unfit.append(f"item {i}: {error}")
      if not skip:
        raise errors.InputError(f"task {task.name}, {file}, {unfit[0]}") from None
      continue
    if searches:
      prompts.append(layout.blank(item))
    elif isinstance(item, items_lib.Question):
      wrong += not 0 <= item.label < len(item.choices)
      texts |= any(len(choice) > 1 for choice in item.choices)
    if len(found) == most:
      break
  if unfit:
    _log.warning("task %s, %s: left out: %d items, first %s", task.name, file, len(unfit), unfit[0])
  if wrong:
    _log.warning("task %s, %s: %d labels are no choice's number: they count as wrong answers", task.name, file, wrong)
  if task.type == task_lib.CHOICES and task.kind.own_metrics and found and not texts:
    raise errors.InputError(
      f"task {task.name}, {file}: all choices have one token, and {task.metrics[0]} compares texts"
    )
  if searches:
    padded = layouts.padded(prompts, batch)
    found = [dataclasses.replace(each, padded=row) for each, row in zip(found, padded, strict=True)]
  return found[:limit]
