"""Reads the cases of the evaluation harness: model, tokenizer, what the original was given."""

from collections.abc import Iterable, Sequence
import functools
import json
import os
import pathlib
from typing import Any

import golden_models
import numpy as np

from glmjax import tokens as tokens_lib
from glmjax.harness import asking
from glmjax.harness import items as items_lib
from glmjax.harness import layouts
from glmjax.infer import engine
from glmjax.infer import prompt as prompt_lib

SPACE = "\u2581"


def folder() -> pathlib.Path:
  """Where the cases are."""
  here = pathlib.Path(__file__).parent / "evaluation" / "cases"
  return pathlib.Path(os.environ.get("GLMJAX_EVALUATION_DIR") or here)


@functools.cache
def _json(name: str) -> dict[str, Any]:
  return json.loads((folder() / f"{name}.json").read_text())


class Greedy:
  """The cases' tokenizer: the longest piece that fits, from the left (cases/README.md, section 2)."""

  def __init__(self, table: dict[str, Any], specials: tokens_lib.SpecialTokens) -> None:
    self.specials, self.vocab_size, self.num_image_tokens = specials, table["num_tokens"], table["num_image_tokens"]
    self._pieces, self._unk, self._unk_text = table["pieces"], table["unk_id"], table["unk_surface"]
    self._texts = {i: piece for piece, i in self._pieces.items()} | {self._unk: self._unk_text}
    self._longest = max(map(len, self._pieces))

  def encode(self, text: str, allow_special: bool = False) -> list[int]:
    del allow_special
    rest, ids = text.replace("\n", "<n>").replace(" ", SPACE), []
    rest = SPACE + rest if rest else rest
    while rest:
      sizes = range(min(self._longest, len(rest)), 0, -1)
      size = next((size for size in sizes if rest[:size] in self._pieces), None)
      ids.append(self._unk if size is None else self._pieces[rest[:size]])
      rest = rest[size or 1 :]
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    text = "".join(self._texts.get(i, "") for i in ids).replace(SPACE, " ").replace("<n>", "\n")
    return text.removeprefix(" ")

  def decode_bytes(self, ids: Sequence[int], show_special: bool = False, dummy_prefix: bool = True) -> bytes:
    raise NotImplementedError


@functools.cache
def tokenizer() -> Greedy:
  named, table = _json("model")["special_tokens"], _json("tokenizer")["table"]
  names = {name: name.strip("[]").lower() for name in named}
  ids = {names[name]: i for name, i in named.items()}
  return Greedy(table, tokens_lib.SpecialTokens(**ids, pad=0, unk=table["unk_id"]))


@functools.cache
def asker(rounding: str) -> asking.Asker:
  """The model with frequencies of its positions rounded as said."""
  runner = golden_models.runner("evaluation", rotary_rounding=rounding)
  ids = {int(theirs): ours for theirs, ours in _json("model")["lambada_id_map"].items()}
  return asking.Asker(engine.Engine(runner, tokenizer()), ids)


def check_inputs(asked: asking.Asked, found: dict[str, np.ndarray]) -> None:
  """Asserts that an item's rows read what the original's row did: tokens, places, and what each token sees."""
  layout = layouts.Layout(asked.task, golden_models.config("evaluation"), tokenizer().specials)
  if isinstance(asked.item, items_lib.Question):
    rows = layout.question(asked.item)
    context = len(rows[0].prompt.tokens) - len(rows[0].targets)
    # Where all choices of a file have one token the original reads sop once for all of them.
    once = np.sum(found["tokens"][context:] == layout.specials.sop) == 1
    slot = context
    for row in rows:
      _check_row(row.prompt, [*range(context), *range(slot, slot + len(row.targets))], found)
      slot += 0 if once else len(row.targets)
    return
  prompt = layout.window(asked.item).prompt if isinstance(asked.item, items_lib.Window) else layout.blank(asked.item)
  _check_row(prompt, list(range(len(prompt.tokens))), found)


def _check_row(prompt: prompt_lib.Prompt, own: list[int], found: dict[str, np.ndarray]) -> None:
  assert found["tokens"][own].tolist() == prompt.tokens
  assert found["position_ids"][own].tolist() == prompt.positions[0].tolist()
  count, seen = len(own), np.zeros((len(own), len(found["tokens"])), bool)
  seen[:, own] = np.arange(count) < np.maximum(np.arange(count) + 1, prompt.context_length)[:, None]
  np.testing.assert_array_equal(~found["attention_mask"][own], seen)
