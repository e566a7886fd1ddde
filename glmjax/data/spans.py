"""Blank infilling of one sample: which spans are masked, and the sequence that results.

A sample is a context in which every masked span has become one mask token, followed by the
spans themselves. With text `a b c d e`, spans (1, 3) and (4, 5) and the second span first:

  tokens           a  [MASK]  d  [MASK]   sop  e    sop  b  c
  targets          a  [MASK]  d  [MASK]   e    eop  b    c  eop
  positions        0  1       2  3        3    3    1    1  1
  block positions  0  0       0  0        1    2    1    2  3
                   \\____ context ______/ \\_____ targets ____/

Sizes are in tokens. Nothing here holds state: an example's draws come from `example_rng`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from glmjax.tokens import SpecialTokens

# The counter's last word keeps these draws apart from any other use of Philox with the same key.
_SPAN_STREAM = 0x5350414E
LONGEST = 1 << 16  # tokens of a span
LARGEST_MEAN = 500  # of their lengths; from about 700 on float64 has no such probabilities


class Sample(NamedTuple):
  """One corrupted sample; arrays are int32 [n], and places from `context_length` on are predicted."""

  tokens: np.ndarray
  targets: np.ndarray
  positions: np.ndarray  # index in the context; a span's places carry their mask's index
  block_positions: np.ndarray  # 0 in the context, 1, 2, ... within a span
  context_length: int


def example_rng(seed: int, index: int) -> np.random.Generator:
  """Returns the generator of example `index`: a function of its arguments alone."""
  key = np.array([seed % 2**64, index % 2**64], np.uint64)
  counter = np.array([0, 0, 0, _SPAN_STREAM], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=counter))


def span_length_pmf(mean: float = 3.0, max_length: int = 39) -> np.ndarray:
  """Returns P(length = 1..max_length): Poisson(mean) cut to that range and renormalised."""
  lengths = np.arange(1, max_length + 1)
  log_factorials = np.cumsum(np.log(lengths))
  weights = np.exp(lengths * math.log(mean) - mean - log_factorials)
  return weights / weights.sum()


def sample_spans(
  lengths: Sequence[int] | np.ndarray,
  total: int,
  draw: Callable[[int, int], Sequence[int] | np.ndarray],
  offset: int = 0,
) -> np.ndarray:
  """Places spans of the given lengths, in that order, in [offset, offset + total): int [k, 2].

  At least one token lies between two spans. `draw(high, k)` returns k integers of [0, high).
  The same rule as both original samplers, so the same draws give the same spans.
  """
  lengths = np.asarray(lengths, np.int64)
  slack = total - int(lengths.sum()) - len(lengths) + 1
  assert slack >= 0, f"spans of {int(lengths.sum())} tokens do not fit in {total}"
  places = np.sort(np.asarray(draw(slack + 1, len(lengths)), np.int64))
  ends = offset + places + np.cumsum(lengths + 1) - 1
  return np.stack([ends - lengths, ends], axis=1)


def corrupt(tokens: np.ndarray, spans: np.ndarray, mask: int, specials: SpecialTokens) -> Sample:
  """Makes the sample of `tokens` [n] with `spans` [k, 2] (start, end) masked; spans come in target order."""
  tokens = np.asarray(tokens, np.int32)
  starts, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]

  text_order = np.argsort(starts)
  removed = np.empty(len(starts), np.int64)  # text tokens gone before each span
  removed[text_order] = np.cumsum(lengths[text_order] - 1) - (lengths[text_order] - 1)
  edges = np.zeros(len(tokens) + 1, np.int8)
  edges[starts] += 1
  edges[spans[:, 1]] -= 1
  kept = np.cumsum(edges[:-1], dtype=np.int8) == 0
  kept[starts] = True
  masked = tokens.copy()
  masked[starts] = mask
  context = masked[kept]

  places = lengths + 1  # sop + span, or span + eop
  ends = np.cumsum(places)
  firsts = ends - places
  within = np.arange(ends[-1]) - np.repeat(firsts, places)
  source = within + np.repeat(starts, places)  # text index of each target; one too far at a span's end
  inputs = tokens[source - 1]
  inputs[firsts] = specials.sop
  outputs = tokens.take(source, mode="clip")
  outputs[ends - 1] = specials.eop
  return _join(context, inputs, outputs, np.repeat(starts - removed, places), within + 1)


def corrupt_suffix(
  tokens: np.ndarray, prefix_length: int, mask: int, specials: SpecialTokens, eop: bool = False
) -> Sample:
  """Makes the sample in which all after the prefix is one blank: [gMASK] without eop, instructions with."""
  tokens = np.asarray(tokens, np.int32)
  context = np.append(tokens[:prefix_length], np.int32(mask))
  suffix = tokens[prefix_length:]
  outputs = np.append(suffix, np.int32(specials.eop)) if eop else suffix
  inputs = np.empty(len(outputs), np.int32)
  inputs[0] = specials.sop
  inputs[1:] = suffix[: len(outputs) - 1]
  return _join(context, inputs, outputs, np.full(len(outputs), prefix_length), np.arange(1, len(outputs) + 1))


def truncate(sample: Sample, length: int) -> Sample:
  """Returns the first `length` places of a sample."""
  return Sample(*(array[:length] for array in sample[:4]), min(sample.context_length, length))


def _join(
  context: np.ndarray, inputs: np.ndarray, outputs: np.ndarray, positions: np.ndarray, block_positions: np.ndarray
) -> Sample:
  """Joins a context and its targets."""
  n, c = len(context) + len(inputs), len(context)
  joined = np.zeros((4, n), np.int32)
  joined[0, :c] = joined[1, :c] = context
  joined[2, :c] = np.arange(c)
  joined[:, c:] = inputs, outputs, positions, block_positions
  return Sample(*joined, c)
