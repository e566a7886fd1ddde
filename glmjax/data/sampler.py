"""Row i of a mixture, computed from (seed, i) and the token cache instead of iterated to.

Which task: a fixed repeating schedule with the mixture's rates, and while rates change, the two of before and
after mixed; so how often a task was picked before i has a closed form. Which window of the task: that count,
sent through a keyed permutation of the epoch's windows. Nothing here is a table as large as the text, and no
state is kept from row to row: row 10^12 costs what row 0 does.
"""

import bisect
import dataclasses
import difflib
import fnmatch
import fractions
import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from glmjax import errors
from glmjax import ranges
from glmjax.data import glm10b
from glmjax.data import packing
from glmjax.data import preference_rows
from glmjax.data import rows
from glmjax.data import tokenized

Infilling = rows.BlankInfilling | glm10b.BlockStrategy

_MAX_PERIOD = 1 << 16  # rates that are no simple fractions are rounded to 1 / 65,536
_MAX_DENOMINATOR = 1000
_FEISTEL_ROUNDS = 6


def rate_weights(rates: Mapping[str, float]) -> dict[str, int]:
  """Returns integers in the proportion of `rates`: exact for simple fractions, else of sum 65,536 and at least 1."""
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
  for name in by_remainder[: _MAX_PERIOD - sum(weights.values())]:
    weights[name] += 1
  return weights


@dataclasses.dataclass(frozen=True)
class RateChange:
  """Other rates from a sample on: at once, or along a straight line."""

  first_sample: int
  rates: Mapping[str, float]  # by task or pattern, as CachedMixture.rates
  ramp_samples: int = 0  # samples from the old rates to these

  def __post_init__(self) -> None:
    for name in ("first_sample", "ramp_samples"):
      ranges.whole(f"RateChange.{name}", getattr(self, name), 0, ranges.MOST_SAMPLES)


class SampleSchedule:
  """A schedule of which task each sample index is of: a period of sum(weights) picks, each task spread evenly over
  it.
  """

  def __init__(self, weights: Mapping[str, int]) -> None:
    self.names = sorted(weights)
    self.weights = [weights[name] for name in self.names]
    self.period = sum(self.weights)
    # Pick j of a task with weight w belongs at (j + 1/2) / w of the period.
    places = np.concatenate([(np.arange(weight) + 0.5) / weight for weight in self.weights])
    owners = np.repeat(np.arange(len(self.weights)), self.weights)
    self._owner = owners[np.argsort(places, kind="stable")]
    # Of each task's picks in the period.
    self._places = [np.flatnonzero(self._owner == k) for k in range(len(self.weights))]
    self._earlier = np.empty(self.period, np.int64)  # picks of the same task before this one in the period
    for own_places in self._places:
      self._earlier[own_places] = np.arange(len(own_places))

  def pick(self, index: int) -> tuple[str, int]:
    """Returns the task of sample `index`, and how many samples before it were of that task."""
    cycle, place = divmod(index, self.period)
    owner = int(self._owner[place])
    return self.names[owner], cycle * self.weights[owner] + int(self._earlier[place])

  def count(self, name: str, picks: int) -> int:
    """Counts how many of the first `picks` samples are of that task."""
    if name not in self.names:
      return 0
    owner = self.names.index(name)
    cycle, place = divmod(picks, self.period)
    return cycle * self.weights[owner] + int(np.searchsorted(self._places[owner], place))


@dataclasses.dataclass(frozen=True)
class _Stage:
  """The samples from `first` on: of `schedule`, or while a ramp of `length` lasts, of `before` too.

  Of the m first samples of a ramp, m^2 / 2 length (rounded down) are picks of the new schedule: their share
  rises from 0 to 1 in a straight line. Old and new schedule each go through their own picks in order.
  """

  first: int
  schedule: SampleSchedule
  before: SampleSchedule | None = None
  length: int = 0

  def new_picks(self, samples: int) -> int:
    """Counts, of the stage's first samples, those that the new schedule picks."""
    return samples if self.before is None else samples * samples // (2 * self.length)

  def pick(self, samples: int) -> tuple[str, int]:
    """Returns the task of the stage's sample of that number, and how many of its samples before were of that task."""
    new = self.new_picks(samples)
    if self.new_picks(samples + 1) > new:
      name, count = self.schedule.pick(new)
      return name, count + (self.before.count(name, samples - new) if self.before else 0)
    name, count = self.before.pick(samples - new)
    return name, count + self.schedule.count(name, new)

  def count(self, name: str, samples: int) -> int:
    """Counts how many of the stage's first samples are of that task."""
    new = self.new_picks(samples)
    return self.schedule.count(name, new) + (self.before.count(name, samples - new) if self.before else 0)


class Timeline:
  """A schedule of which task each sample index is of, where rates change on the way; like SampleSchedule without
  changes.
  """

  def __init__(self, weights: Mapping[str, int], changes: Sequence[tuple[int, int, Mapping[str, int]]] = ()) -> None:
    """Takes `changes`: (first sample, samples of the ramp, weights after it), in order and apart."""
    stages = [_Stage(0, SampleSchedule(weights))]
    for first, length, changed in changes:
      if first < stages[-1].first:
        raise errors.InputError(
          f"a RateChange from sample {first} on, before another one is over (sample "
          f"{stages[-1].first}): give them in order, with ramps that do not overlap"
        )
      schedule = SampleSchedule(changed)
      if length:
        stages.append(_Stage(first, schedule, stages[-1].schedule, length))
      stages.append(_Stage(first + length, schedule))
    self.names = sorted({name for stage in stages for name in stage.schedule.names})
    self._stages = stages
    self._firsts = [stage.first for stage in stages]
    self._counts = [dict.fromkeys(self.names, 0)]  # of each task before each stage
    for stage, following in zip(stages, stages[1:]):
      done = following.first - stage.first
      self._counts.append({name: n + stage.count(name, done) for name, n in self._counts[-1].items()})

  def pick(self, index: int) -> tuple[str, int]:
    """Returns the task of sample `index`, and how many samples before it were of that task."""
    number = bisect.bisect_right(self._firsts, index) - 1
    name, count = self._stages[number].pick(index - self._firsts[number])
    return name, self._counts[number][name] + count

  def count(self, name: str, samples: int) -> int:
    """Counts how many of the first samples are of that task."""
    number = max(bisect.bisect_left(self._firsts, samples) - 1, 0)
    return self._counts[number][name] + self._stages[number].count(name, samples - self._firsts[number])


@functools.lru_cache(maxsize=4096)
def _round_keys(*key: int | str) -> tuple[int, ...]:
  """Returns 64-bit numbers, one a round, from anything printable."""
  digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
  return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def permute(index: int, size: int, *key: int | str) -> int:
  """Says where a permutation of range(size), settled by `key`, sends `index`; needs no table.

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

  def __init__(self, reader: tokenized.Split, infilling: Infilling, seed: int, task: str) -> None:
    self._reader, self._infilling = reader, infilling
    self._seed, self._task = seed, task
    self._length = infilling.window_length
    self.num_rows = reader.num_tokens // self._length

  def window(self, epoch: int, number: int) -> np.ndarray:
    """Returns window `number` of an epoch. Epochs cut at other places; one window may run on from end to start."""
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
  """Rows of an instruction task, each of as many pairs as fit."""

  def __init__(self, reader: tokenized.Split, infilling: Infilling) -> None:
    self._reader, self._infilling = reader, infilling
    self._pairs = packing.pack_pairs(reader.document_lengths(), infilling)
    self.num_rows = len(self._pairs)

  def row(self, epoch: int, number: int, index: int) -> rows.Row:
    del epoch, index  # nothing in these rows is drawn
    documents = [d for first, last in self._pairs.runs(number) for d in self._reader.documents_between(first, last)]
    return self._infilling.instruction_row(
      [(d.tokens[: d.input_length], d.tokens[d.input_length :]) for d in documents]
    )


class MixtureSampler:
  """The rows of one split of a mixture that is tokenized, by number."""

  def __init__(
    self,
    cache: tokenized.Mixture,
    infilling: Infilling,
    seed: int,
    split: str = "train",
    rates: Mapping[str, float] | None = None,
    changes: Sequence[RateChange] = (),
  ) -> None:
    self.weights = rate_weights(task_rates(cache, split, rates))
    self.changes = [
      (change.first_sample, change.ramp_samples, rate_weights(task_rates(cache, split, change.rates)))
      for change in changes
    ]
    self.schedule = Timeline(self.weights, self.changes)
    self._seed = seed
    self._sources = {name: _task_rows(cache, name, split, infilling, seed) for name in self.schedule.names}

  def row(self, index: int) -> rows.Row:
    """Makes sample `index` into a row; the same one every time."""
    task, epoch, number = self.locate(index)
    return self._sources[task].row(epoch, number, index)

  def locate(self, index: int) -> tuple[str, int, int]:
    """Returns sample `index` as (task, epoch of the task, number of its window or row in the task)."""
    assert index >= 0, index
    task, count = self.schedule.pick(index)
    num_rows = self._sources[task].num_rows
    epoch, place = divmod(count, num_rows)
    return task, epoch, permute(place, num_rows, self._seed, task, epoch)

  def samples_once(self) -> int:
    """Counts the first samples in which no task has begun its second epoch: none of their rows is there twice."""
    sizes = {name: source.num_rows for name, source in self._sources.items()}

    def repeats(samples: int) -> bool:
      return any(self.schedule.count(name, samples) > size for name, size in sizes.items())

    return bisect.bisect_left(range(1, sum(sizes.values()) + 1), True, key=repeats)

  def left_out(self) -> dict[str, int]:
    """Counts, by task, the pairs of answers that are in no row, as all of them that would be there is alike."""
    found = {name: source.left_out for name, source in self._sources.items() if hasattr(source, "left_out")}
    return {name: count for name, count in found.items() if count}

  def describe(self) -> dict:
    """Describes what the rows depend on besides cache, infilling and seed; `rows_per_epoch` is for people.

    A change stands apart from what was before it: samples before its first do not depend on it.
    """

    def sizes(names: Iterable[str]) -> dict[str, int]:
      return {name: self._sources[name].num_rows for name in sorted(names)}

    described = {"weights": dict(sorted(self.weights.items())), "rows_per_epoch": sizes(self.weights)}
    if self.changes:
      described["changes"] = [
        {
          "first_sample": first,
          "ramp_samples": length,
          "weights": dict(sorted(weights.items())),
          "rows_per_epoch": sizes(weights),
        }
        for first, length, weights in self.changes
      ]
    return described


def _task_rows(
  cache: tokenized.Mixture, name: str, split: str, infilling: Infilling, seed: int
) -> TextRows | InstructionRows | preference_rows.PreferenceRows:
  reader, kind = cache.split(name, split), cache.tasks[name]["kind"]
  length = "shorter"
  if kind == "text":
    source = TextRows(reader, infilling, seed, name)
    needed = f"a window of {infilling.window_length} tokens"
  elif kind == tokenized.PREFERENCE:
    source = preference_rows.PreferenceRows(reader, infilling)
    needed, length = "a single pair of answers that differ in what a row has room for", "longer"
  else:
    source = InstructionRows(reader, infilling)
    needed = "a single pair"
  if source.num_rows == 0:
    without = "" if split == "train" else "; or do without that split (loop.train.validation = None)"
    raise errors.InputError(
      f"{cache.directory}: task {name}, split {split} holds {reader.num_tokens} tokens, not "
      f"enough for {needed}; use a {length} seq_length, more text, or rate 0 for it{without}"
    )
  return source


def task_rates(cache: tokenized.Mixture, split: str, rates: Mapping[str, float] | None) -> dict[str, float]:
  """Returns each task's rate, as given or as cached (None).

  A name in `rates` may have wildcards, and be several joined by "|": what it is given is then shared out
  among the tasks that it fits, in the proportion of the cached rates. A task that two names fit gets both.
  Of other splits than "train" tasks without a document are left out.

  Raises:
    errors.InputError: when that leaves none.
  """
  having = {name: task for name, task in cache.tasks.items() if split in task["splits"]}
  if not having:
    raise errors.InputError(f"{cache.directory}: no task has a split {split!r}")
  if split != "train":  # of a small set nothing may be held out
    having = {name: task for name, task in having.items() if task["splits"][split]["documents"]}
    if not having:
      raise nothing_held_out(cache, split, cache.tasks)
  cached = {name: task["rate"] for name, task in having.items()}
  if rates is None:
    return cached
  shared = share(rates, cached, cache.tasks, str(cache.directory))
  if split != "train" and any(rates.values()) and not any(shared.values()):  # all 0 is what `rate_weights` refuses
    raise nothing_held_out(cache, split, set(share(rates, dict.fromkeys(cache.tasks, 1.0), cache.tasks, "")))
  return shared


def nothing_held_out(cache: tokenized.Mixture, split: str, tasks: Iterable[str]) -> errors.InputError:
  """Returns the error of a split in which none of the tasks has a document."""
  return errors.InputError(
    f"{cache.directory}: of {', '.join(sorted(tasks))} nothing is in the split {split!r}: make the cache again "
    "(glmjax cache --overwrite holds out a part of any text, and every 50th instruction pair), or do without that "
    "split (loop.train.validation = None)"
  )


def share(rates: Mapping[str, float], whole: Mapping[str, float], known: Iterable[str], where: str) -> dict[str, float]:
  """Shares rates out: each task's by `rates`, whose names and patterns share theirs out in the proportion of `whole`.

  Tasks that are `known` and not in `whole` get nothing.

  Raises:
    errors.InputError: for a name that fits no task known in `where`.
  """
  known = list(known)
  shared: dict[str, float] = {}
  for pattern, rate in rates.items():
    parts = pattern.split("|")
    fitting = [name for name in known if any(fnmatch.fnmatchcase(name, part) for part in parts)]
    if not fitting:
      near = difflib.get_close_matches(pattern, known, 1) or sorted(known)
      raise errors.InputError(
        f"rates name the task {pattern!r}, which {where} does not hold; did you mean {near[0]!r}?"
      )
    fitting = [name for name in fitting if name in whole]
    total = sum(whole[name] for name in fitting)
    for name in fitting:
      part = whole[name] / total if total else 1 / len(fitting)
      shared[name] = shared.get(name, 0.0) + rate * (1.0 if len(fitting) == 1 else part)
  return shared
