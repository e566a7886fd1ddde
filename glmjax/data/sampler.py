"""Row i of a mixture, computed from (seed, i) and the token cache instead of iterated to.

Which task: a fixed repeating schedule with the mixture's rates, so how often a task was picked before i has a
closed form. Which window of the task: that count, sent through a keyed permutation of the epoch's windows.
Nothing here is a table as large as the text, and no state is kept from row to row: row 10^12 costs what row 0
does.
"""

import difflib
import fractions
import functools
import hashlib
import math
from collections.abc import Mapping

import numpy as np

from glmjax import errors
from glmjax.data import glm10b
from glmjax.data import rows
from glmjax.data import shards

Infilling = rows.BlankInfilling | glm10b.BlockStrategy

_MAX_PERIOD = 1 << 16  # rates that are no simple fractions are rounded to 1 / 65,536
_MAX_DENOMINATOR = 1000
_FEISTEL_ROUNDS = 6


def rate_weights(rates: Mapping[str, float]) -> dict[str, int]:
  """Integers in the proportion of `rates`: exact for simple fractions, else of sum 65,536 and at least 1."""
  if any(not math.isfinite(rate) or rate < 0 for rate in rates.values()) or not any(rates.values()):
    raise errors.InputError(f"mixture rates {dict(rates)}: each must be 0 or more, and one above 0")
  exact = {name: fractions.Fraction(str(float(rate))) for name, rate in rates.items() if rate > 0}
  total = sum(exact.values())
  shares = {name: rate / total for name, rate in exact.items()}
  # 0.3333333333333333 is meant to be 1/3.
  simple = {name: share.limit_denominator(_MAX_DENOMINATOR) for name, share in shares.items()}
  close = all(abs(simple[name] - share) < 1e-9 for name, share in shares.items())
  period = math.lcm(*(share.denominator for share in simple.values()))
  if close and min(simple.values()) > 0 and sum(simple.values()) == 1 and period <= _MAX_PERIOD:
    return {name: int(share * period) for name, share in simple.items()}
  if len(exact) > _MAX_PERIOD // 2:
    raise errors.InputError(f"a mixture of {len(exact)} tasks: at most {_MAX_PERIOD // 2} are supported")
  # Largest remainders after one place for each.
  spare = _MAX_PERIOD - len(exact)
  quotas = {name: spare * share for name, share in shares.items()}
  weights = {name: 1 + int(quota) for name, quota in quotas.items()}
  by_remainder = sorted(quotas, key=lambda name: (int(quotas[name]) - quotas[name], name))
  for name in by_remainder[:_MAX_PERIOD - sum(weights.values())]:
    weights[name] += 1
  return weights


class Schedule:
  """Which task each sample index is of: a period of sum(weights) picks, each task spread evenly over it."""

  def __init__(self, weights: Mapping[str, int]) -> None:
    self.names = sorted(weights)
    self.weights = [weights[name] for name in self.names]
    self.period = sum(self.weights)
    # Pick j of a task with weight w belongs at (j + 1/2) / w of the period.
    places = np.concatenate([(np.arange(weight) + 0.5) / weight for weight in self.weights])
    owners = np.repeat(np.arange(len(self.weights)), self.weights)
    self._owner = owners[np.argsort(places, kind="stable")]
    self._earlier = np.empty(self.period, np.int64)  # picks of the same task before this one in the period
    for k, weight in enumerate(self.weights):
      self._earlier[self._owner == k] = np.arange(weight)

  def pick(self, index: int) -> tuple[str, int]:
    """The task of sample `index`, and how many samples before it were of that task."""
    cycle, place = divmod(index, self.period)
    owner = int(self._owner[place])
    return self.names[owner], cycle * self.weights[owner] + int(self._earlier[place])


@functools.lru_cache(maxsize=4096)
def _round_keys(*key: int | str) -> tuple[int, ...]:
  """64-bit numbers, one a round, from anything printable."""
  digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
  return tuple(int.from_bytes(digest[i:i + 8], "little") for i in range(0, len(digest), 8))


def permute(index: int, size: int, *key: int | str) -> int:
  """Where a permutation of range(size), settled by `key`, sends `index`; needs no table.

  A Feistel network permutes the next power of four; a result beyond `size` is sent through again (cycle
  walking), at most four times on average.
  """
  assert 0 <= index < size, (index, size)
  half = max((size - 1).bit_length() + 1, 2) // 2
  mask = (1 << half) - 1
  keys = _round_keys(*key)
  while True:
    left, right = index >> half, index & mask
    for round_key in keys:
      # splitmix64's mixing of the right half: every bit of the result depends on all of it.
      mixed = (right + round_key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
      mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
      mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
      left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
    index = left << half | right
    if index < size:
      return index


class TextRows:
  """Rows of a text task: fixed-size windows over its documents laid end to end as a circle."""

  def __init__(self, reader: shards.SplitReader, infilling: Infilling, seed: int, task: str) -> None:
    self._reader, self._infilling = reader, infilling
    self._seed, self._task = seed, task
    self._length = infilling.window_length
    self.num_rows = reader.num_tokens // self._length

  def window(self, epoch: int, number: int) -> np.ndarray:
    """Window `number` of an epoch. Epochs cut at other places; one window may run on from end to start."""
    total = self._reader.num_tokens
    offset = _round_keys(self._seed, self._task, epoch, "offset")[0] % self._length
    start = (offset + number * self._length) % total
    stop = start + self._length
    if stop <= total:
      return self._reader.read(start, stop)
    return np.concatenate([self._reader.read(start, total), self._reader.read(0, stop - total)])

  def row(self, epoch: int, number: int, index: int) -> rows.Row:
    return self._infilling.text_row(self.window(epoch, number), self._seed, index)


class InstructionRows:
  """Rows of an instruction task: consecutive pairs, as many as fit."""

  def __init__(self, reader: shards.SplitReader, infilling: Infilling) -> None:
    self._reader, self._infilling = reader, infilling
    self._starts = pack_pairs(reader.document_lengths(), infilling)
    self.num_rows = len(self._starts) - 1

  def row(self, epoch: int, number: int, index: int) -> rows.Row:
    del epoch, index  # nothing in these rows is drawn
    documents = map(self._reader.document, range(self._starts[number], self._starts[number + 1]))
    return self._infilling.instruction_row(
        [(d.tokens[:d.input_length], d.tokens[d.input_length:]) for d in documents])


def pack_pairs(lengths: np.ndarray, infilling: Infilling) -> list[int]:
  """Number of each row's first pair, and the number of pairs last: rows are filled in order.

  Args:
    lengths: int64 [pairs, 2], tokens of inputs and targets.
    infilling: gives a pair's length in a row.
  """
  distinct, which = np.unique(lengths, axis=0, return_inverse=True)
  lengths_in_row = [infilling.instruction_length(int(a), int(b)) for a, b in distinct]
  places = np.array(lengths_in_row, np.int64)[which.ravel()]
  ends = np.concatenate([[0], np.cumsum(places)])
  # For every pair at once, the first one that no longer fits into a row begun with it; then follow the chain.
  following = (np.searchsorted(ends, ends[:-1] + infilling.seq_length, side="right") - 1).tolist()
  starts = [0]
  while starts[-1] < len(places):
    starts.append(following[starts[-1]])
  return starts


class MixtureSampler:
  """The rows of one split of a cached mixture, by number."""

  def __init__(self, cache: shards.TokenCache, infilling: Infilling, seed: int, split: str = "train",
               rates: Mapping[str, float] | None = None) -> None:
    _check_rates(cache, rates)
    rates = rates or {name: task["rate"] for name, task in cache.tasks.items() if split in task["splits"]}
    if not rates:
      raise errors.InputError(f"{cache.directory}: no task has a split {split!r}")
    self.schedule = Schedule(rate_weights(rates))
    self._seed = seed
    self._sources = {name: _task_rows(cache, name, split, infilling, seed) for name in self.schedule.names}

  def row(self, index: int) -> rows.Row:
    """Sample `index`."""
    task, epoch, number = self.locate(index)
    return self._sources[task].row(epoch, number, index)

  def locate(self, index: int) -> tuple[str, int, int]:
    """Sample `index` as (task, epoch of the task, number of its window or row in the task)."""
    assert index >= 0, index
    task, count = self.schedule.pick(index)
    num_rows = self._sources[task].num_rows
    epoch, place = divmod(count, num_rows)
    return task, epoch, permute(place, num_rows, self._seed, task, epoch)

  def describe(self) -> dict:
    """What the rows depend on besides cache, infilling and seed; `rows_per_epoch` is for people."""
    return {"weights": dict(zip(self.schedule.names, self.schedule.weights)),
            "rows_per_epoch": {name: source.num_rows for name, source in self._sources.items()}}


def _task_rows(cache: shards.TokenCache, name: str, split: str, infilling: Infilling,
               seed: int) -> TextRows | InstructionRows:
  reader = cache.split(name, split)
  if cache.tasks[name]["kind"] == "text":
    source = TextRows(reader, infilling, seed, name)
    needed = f"a window of {infilling.window_length} tokens"
  else:
    source = InstructionRows(reader, infilling)
    needed = "a single pair"
  if source.num_rows == 0:
    raise errors.InputError(
        f"{cache.directory}: task {name}, split {split} holds {reader.num_tokens} tokens, not "
        f"enough for {needed}; use a shorter seq_length, more text, or rate 0 for it")
  return source


def _check_rates(cache: shards.TokenCache, rates: Mapping[str, float] | None) -> None:
  for name in rates or ():
    if name not in cache.tasks:
      near = difflib.get_close_matches(name, cache.tasks, 1) or sorted(cache.tasks)
      raise errors.InputError(f"rates name the task {name!r}, which {cache.directory} does not hold; "
                              f"did you mean {near[0]!r}?")
