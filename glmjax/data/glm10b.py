"""Blank infilling of the GLM-10B family: [MASK] spans, [sMASK] sentences, [gMASK] blanks.

The published construction draw by draw (THUDM/GLM's blocklm_utils.py), so that a given
`random.Random` reproduces a given batch; hence Python's generator and not numpy's here.
It differs from GLM-130B's in its mixture, in spans that keep within documents, in [gMASK] blanks in
the middle of a text, and in inputs replaced by dBLOCK.
"""

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glmjax import positions as positions_lib
from glmjax import ranges
from glmjax import tokens as tokens_lib
from glmjax.data import rows, spans
from glmjax.errors import InputError

_ATTEMPTS = 20  # to place the spans of a row, before it becomes a [gMASK] continuation
_POSITIONS = positions_lib.LEARNED_2D
_MIN_LENGTH = 64  # places; short sequences start at 32 tokens


class Text(NamedTuple):
  """One text: ENC, then documents, each with eos behind it unless cut off."""

  tokens: np.ndarray  # int [n]
  loss_weights: np.ndarray  # [n], 0 where a continuation must not be trained on (ENC)


class Built(NamedTuple):
  """A sample and the weight of each of its places."""

  sample: spans.Sample
  loss_weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class BlockStrategy:
  """The GLM-10B mixture; defaults are that model's (THUDM/GLM's config/ds_block_10B.sh)."""

  seq_length: int  # places in a row
  specials: tokens_lib.SpecialTokens
  sentence_ends: tuple[int, ...] = ()  # tokens that end a sentence (tokenizer.sentence_ends); [sMASK] needs them
  mask_rate: float = 0.5  # share of batches with [MASK] spans
  sentence_rate: float = 0.3  # share with [sMASK] sentences; what is left has [gMASK]
  infill_rate: float = 0.5  # share of [gMASK] samples that continue the text instead of filling its middle
  gmask_min_ratio: float = 0.25  # shortest [gMASK] target as a share of the text
  mask_ratio: float = 0.15  # [MASK] spans are drawn until they hold this share of the text
  sentence_ratio: float = 0.15  # likewise sentences
  mean_span_length: float = 3.0  # of the Poisson distribution before it is cut
  max_span_length: int = 39
  dblock_rate: float = 0.1  # share of [MASK] span inputs replaced by dBLOCK
  short_sequence_rate: float = 0.02  # share of batches whose texts are split into short ones
  single_span_rate: float = 0.0  # share of batches with one [MASK] span a sample
  shuffle_spans: bool = True  # False: targets in text order
  task_masks: bool = True  # False: [MASK] stands for all three kinds

  def __post_init__(self) -> None:
    ranges.whole("BlockStrategy.seq_length", self.seq_length, _MIN_LENGTH)
    for name in (
      "mask_rate",
      "sentence_rate",
      "infill_rate",
      "gmask_min_ratio",
      "dblock_rate",
      "short_sequence_rate",
      "single_span_rate",
    ):
      ranges.number(f"BlockStrategy.{name}", getattr(self, name), 0, 1)
    for name in ("mask_ratio", "sentence_ratio"):
      ranges.number(f"BlockStrategy.{name}", getattr(self, name), above=0, most=1)
    ranges.number("BlockStrategy.mean_span_length", self.mean_span_length, above=0, most=spans.LARGEST_MEAN)
    ranges.whole("BlockStrategy.max_span_length", self.max_span_length, 1, spans.LONGEST)
    for name in ("shuffle_spans", "task_masks"):
      ranges.flag(f"BlockStrategy.{name}", getattr(self, name))
    if self.mask_rate + self.sentence_rate > 1:
      raise InputError("BlockStrategy: mask_rate + sentence_rate must be 1 or less")
    if self.sentence_rate and not self.sentence_ends:
      raise InputError(
        "BlockStrategy: sentence_rate is not 0, so give sentence_ends (ids of tokens that end a sentence)"
      )

  @property
  def window_length(self) -> int:
    """The text tokens that a text row is given: ENC, a mask, and sop or eop come on top."""
    return self.seq_length - 3

  def text_row(self, tokens: np.ndarray, seed: int, index: int) -> rows.Row:
    """Makes the row of example `index`; text is cut from its end until context and targets fit."""
    rng = random.Random((seed % 2**64) << 64 | index % 2**64)
    tokens = np.append(np.int32(self.specials.enc), np.asarray(tokens[: self.window_length], np.int32))
    texts = [Text(tokens, (tokens != self.specials.enc).astype(np.float32))]
    if rng.random() < self.short_sequence_rate:
      texts = self._split(texts, rng)
    objective, single = self._draw_objective(rng)
    for _ in range(_ATTEMPTS):
      built = self._build(objective, single, texts, rng, rng)
      excess = max((len(b.sample.tokens) for b in built), default=0) - self.seq_length
      if built and excess <= 0:
        break
      cut = max(excess, 0)
      texts = [Text(text.tokens[: len(text.tokens) - cut], text.loss_weights) for text in texts]
    else:
      objective, built = tokens_lib.OBJECTIVE_GMASK, [self._continuation(texts[0], len(texts[0].tokens) // 2)]
    ends = np.cumsum([len(b.sample.tokens) for b in built])
    built = built[: np.searchsorted(ends, self.seq_length, side="right")]
    samples = [b.sample for b in built]
    row = rows.pack(samples, _POSITIONS, positions_lib.Counting.AT_MASK, self.seq_length, self.specials.pad)
    row["objective"][:] = objective
    weights = np.concatenate([b.loss_weights for b in built])
    row["loss_weights"][: len(weights)] = weights
    return row

  def instruction_row(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> rows.Row:
    """Lays pairs (inputs, targets) side by side, as in rows.BlankInfilling."""
    return self._instructions.instruction_row(pairs)

  def instruction_length(self, n_inputs: int, n_targets: int) -> int:
    """Counts the places that a pair takes in instruction_row, for packing in advance."""
    return self._instructions.instruction_length(n_inputs, n_targets)

  def construct(self, texts: Sequence[Text], rng: random.Random, dblock_rng: random.Random) -> tuple[int, list[Built]]:
    """Makes a batch as the original builds it: the objective, and samples of various lengths.

    A text whose spans do not fit is left out, as in the original. The original took `rng` from
    its count of batches, and drew dBLOCK from the process's global generator.
    """
    if rng.random() < self.short_sequence_rate:
      texts = self._split(texts, rng)
    objective, single = self._draw_objective(rng)
    return objective, self._build(objective, single, texts, rng, dblock_rng)

  def _draw_objective(self, rng: random.Random) -> tuple[int, bool]:
    """Draws the objective, and whether samples have a single span."""
    if rng.random() < self.single_span_rate:
      return tokens_lib.OBJECTIVE_MASK, True
    draw = rng.random()
    if draw < self.mask_rate:
      return tokens_lib.OBJECTIVE_MASK, False
    if draw < self.mask_rate + self.sentence_rate:
      return tokens_lib.OBJECTIVE_SENTENCE, False
    return tokens_lib.OBJECTIVE_GMASK, False

  def _build(
    self, objective: int, single: bool, texts: Sequence[Text], rng: random.Random, dblock_rng: random.Random
  ) -> list[Built]:
    if objective == tokens_lib.OBJECTIVE_MASK:
      built = [self._mask_sample(text, single, rng, dblock_rng) for text in texts]
    elif objective == tokens_lib.OBJECTIVE_SENTENCE:
      built = [self._sentence_sample(text, rng) for text in texts]
    else:
      lengths = [len(text.tokens) for text in texts]
      shortest = int(self.gmask_min_ratio * min(lengths))
      blank = rng.randint(shortest, max(max(lengths) - 2, shortest))
      built = [self._gmask_sample(text, blank, rng) for text in texts]
    return [b for b in built if b is not None]

  def _mask_sample(self, text: Text, single: bool, rng: random.Random, dblock_rng: random.Random) -> Built | None:
    lengths: list[int] = []
    while not lengths if single else sum(lengths) < int(self.mask_ratio * len(text.tokens)):
      lengths += rng.choices(range(1, self.max_span_length + 1), weights=self._length_weights)
    built = self._blank_sample(text, lengths, self.specials.mask, rng)
    if built is not None and self.dblock_rate > 0:
      sample = built.sample
      for i in np.flatnonzero(sample.block_positions > 1):  # a span's inputs, sop excepted
        if dblock_rng.random() < self.dblock_rate:
          sample.tokens[i] = self.specials.dblock
    return built

  def _sentence_sample(self, text: Text, rng: random.Random) -> Built | None:
    sentences = self._sentences(text.tokens)
    rng.shuffle(sentences)
    chosen, masked = [], 0
    for start, end in sentences:
      chosen.append((start, end))
      masked += end - start
      if masked >= int(self.sentence_ratio * len(text.tokens)):
        break
    mask = self.specials.smask if self.task_masks else self.specials.mask
    return self._corrupt(text, chosen, mask, rng) if chosen else None

  def _gmask_sample(self, text: Text, blank: int, rng: random.Random) -> Built | None:
    n = len(text.tokens)
    blank = min(blank, n - 2)
    if self._ends_document(text.tokens[:-1]).any() or rng.random() < self.infill_rate:
      return self._continuation(text, blank)
    return self._blank_sample(text, [blank], self._gmask, rng)

  def _continuation(self, text: Text, blank: int) -> Built:
    """Makes a sample of which the last `blank` tokens are predicted, without eop."""
    prefix = len(text.tokens) - blank
    sample = spans.corrupt_suffix(text.tokens, prefix, self._gmask, self.specials)
    weights = text.loss_weights[prefix : prefix + blank].astype(np.float32)
    return Built(sample, np.append(np.zeros(prefix + 1, np.float32), weights))

  def _blank_sample(self, text: Text, lengths: list[int], mask: int, rng: random.Random) -> Built | None:
    """Masks spans of these lengths within documents; None if they cannot all be placed."""
    rng.shuffle(lengths)
    rng.shuffle(lengths)  # the original shuffles twice
    placed = self._place_in_documents(text.tokens, lengths, rng)
    return self._corrupt(text, placed, mask, rng) if placed and len(placed) == len(lengths) else None

  def _corrupt(self, text: Text, chosen: list[tuple[int, int]], mask: int, rng: random.Random) -> Built:
    if self.shuffle_spans:
      rng.shuffle(chosen)
    else:
      chosen.sort()
    sample = spans.corrupt(text.tokens, np.array(chosen), mask, self.specials)
    return Built(sample, (sample.block_positions > 0).astype(np.float32))

  def _place_in_documents(self, tokens: np.ndarray, lengths: list[int], rng: random.Random) -> list[tuple[int, int]]:
    """Places spans: short documents get mask_ratio of spans each, the longest takes what is left if it fits."""
    placed: list[tuple[int, int]] = []
    documents = sorted(self._documents(tokens), key=lambda document: document[1])
    for i, (offset, length) in enumerate(documents):
      last = i == len(documents) - 1
      room = length if last else int(length * self.mask_ratio)
      left, taken = lengths[len(placed) :], 0
      while taken < len(left) and sum(left[: taken + 1]) + (taken if last else 0) <= room:
        taken += 1
      if taken:
        drawn = spans.sample_spans(
          left[:taken], length, lambda high, k: [rng.randrange(high) for _ in range(k)], offset
        )
        placed += [(int(start), int(end)) for start, end in drawn]
    return placed

  def _documents(self, tokens: np.ndarray) -> list[tuple[int, int]]:
    """Returns (first token, tokens) of each document, last first; no ENC, eos, nor a cut-off text's last token."""
    documents, after = [], len(tokens)
    for end in [*np.flatnonzero(self._ends_document(tokens))[::-1].tolist(), -1]:
      first = end + 1
      if first < len(tokens) and tokens[first] == self.specials.enc:
        first += 1
      length = after - first
      if after == len(tokens) and length > 0:
        length -= 1
      documents.append((first, length))
      after = end
    return documents

  def _sentences(self, tokens: np.ndarray) -> list[tuple[int, int]]:
    """Returns (start, end) of each sentence in text order; eos parts sentences and belongs to none."""
    sentences, start = [], int(tokens[0] == self.specials.enc)
    for i, token in enumerate(tokens.tolist()):
      if token in self._sentence_ends:
        sentences.append((start, i + 1))
        start = i + 1
      elif token in (self.specials.eos, self.specials.eod):
        start = i + 1
    if start < len(tokens):
      sentences.append((start, len(tokens)))
    return sentences

  def _split(self, texts: Sequence[Text], rng: random.Random) -> list[Text]:
    """Cuts texts to one random length, from sentence to sentence where that keeps half of it or more."""
    length = rng.randrange(32, self.seq_length - 1)
    short = []
    for text in texts:
      tokens, weights = text.tokens[1:], text.loss_weights[1:]
      for _ in range((self.seq_length - 1) // length):
        start, end = 0, len(tokens)
        if length < len(tokens):
          start = rng.randrange(0, len(tokens) - length)
          while start > 0 and (self._ends_document(tokens[start]) or not self._ends_sentence(tokens[start - 1])):
            start -= 1
          end = start + length
          while end > start and not self._ends_sentence(tokens[end - 1]):
            end -= 1
          if end - start < length // 2:
            end = start + length
        short.append(Text(np.append(self.specials.enc, tokens[start:end]), np.append(0, weights[start:end])))
    return short

  def _ends_sentence(self, token: int) -> bool:
    return bool(self._ends_document(token)) or int(token) in self._sentence_ends

  def _ends_document(self, tokens: np.ndarray) -> np.ndarray:
    return (tokens == self.specials.eos) | (tokens == self.specials.eod)

  @property
  def _gmask(self) -> int:
    return self.specials.gmask if self.task_masks else self.specials.mask

  @functools.cached_property
  def _sentence_ends(self) -> frozenset[int]:
    return frozenset(self.sentence_ends)

  @functools.cached_property
  def _instructions(self) -> rows.BlankInfilling:
    return rows.BlankInfilling(
      self.seq_length, self.specials, positions=_POSITIONS.name, samples_per_sequence=1, packing="greedy"
    )

  @functools.cached_property
  def _length_weights(self) -> list[float]:
    return spans.span_length_pmf(self.mean_span_length, self.max_span_length).tolist()
