"""Sampling by number: exact rates, every window once an epoch, nothing that grows with the index."""

import collections
import dataclasses
import math
import pathlib
import time

import numpy as np
import pytest

from glmjax import errors
from glmjax import tokens
from glmjax.data import builder
from glmjax.data import rows
from glmjax.data import sampler
from glmjax.data import shards

SPECIALS = tokens.icetk(0, 60_000)
INFILLING = rows.BlankInfilling(64, SPECIALS, samples_per_sequence=2)


Shards = list[list[shards.Document]]


def make_cache(directory: pathlib.Path, tasks: dict[str, tuple[float, Shards]]) -> shards.TokenCache:
  """A cache of the tasks' (rate, shards of documents); pairs make an instruction task."""
  tokenizer = {"fingerprint": "f" * 64, "vocab_size": 60_008, "specials": dataclasses.asdict(SPECIALS)}
  about = {
    name: {
      "kind": "instruction" if parts[0][0].input_length else "text",
      "rate": rate,
      "splits": {"train": {"source": ""}},
    }
    for name, (rate, parts) in tasks.items()
  }
  with builder.CacheBuilder(directory, builder.make_plan("m", 2, tokenizer, about)) as making:
    for shard in making.missing():
      builder.write_shard(making.partial, shard, tasks[shard.task][1][shard.index], 60_008)
    return making.finish()


def numbered(first: int, count: int) -> Shards:
  """Documents in two shards whose tokens count up from `first`, so that a token tells its place."""
  parts = np.array_split(np.arange(first, first + count), 7)
  return [[shards.Document(part) for part in parts[:3]], [shards.Document(part) for part in parts[3:]]]


def pairs(lengths: list[tuple[int, int]]) -> Shards:
  documents = [shards.Document(np.arange(a + b) + 10 * i, input_length=a) for i, (a, b) in enumerate(lengths)]
  return [documents[: len(documents) // 2], documents[len(documents) // 2 :]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> shards.TokenCache:
  rng = np.random.default_rng(0)
  lengths = [(int(a), int(b)) for a, b in rng.integers(1, 40, (150, 2))]
  return make_cache(
    tmp_path_factory.mktemp("sampler") / "cache",
    {"en": (0.5, numbered(100, 20_011)), "zh": (0.3, numbered(30_000, 9_000)), "qa": (0.2, pairs(lengths))},
  )


@pytest.mark.parametrize(
  "rates,expected",
  [
    ({"a": 0.7, "b": 0.3}, {"a": 7, "b": 3}),
    ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, {"a": 1, "b": 1, "c": 1}),
    ({"a": 2, "b": 6, "c": 0}, {"a": 1, "b": 3}),
    ({"a": 0.95 / 2, "b": 0.95 / 2, "c": 0.05}, {"a": 19, "b": 19, "c": 2}),
    ({"only": 1e-9}, {"only": 1}),
  ],
)
def test_simple_rates_are_exact(rates: dict[str, float], expected: dict[str, int]) -> None:
  assert sampler.rate_weights(rates) == expected


def test_awkward_rates_are_near_and_none_vanishes() -> None:
  rng = np.random.default_rng(0)
  for n in (2, 7, 74):
    rates = {f"t{i}": float(rate) for i, rate in enumerate(rng.exponential(1, n) ** 3)} | {"rare": 1e-12}
    weights = sampler.rate_weights(rates)
    total = sum(rates.values())
    assert sum(weights.values()) == 1 << 16 and min(weights.values()) >= 1
    errors_of_shares = [abs(weights[name] / (1 << 16) - rate / total) for name, rate in rates.items()]
    assert max(errors_of_shares) <= (n + 2) / (1 << 16)


@pytest.mark.parametrize("rates", [{"a": -1.0}, {"a": 0.0}, {"a": math.nan}, {"a": math.inf, "b": 1.0}])
def test_bad_rates_are_refused(rates: dict[str, float]) -> None:
  with pytest.raises(errors.InputError, match="mixture rates"):
    sampler.rate_weights(rates)


@pytest.mark.parametrize("shares", [(1,), (7, 3), (19, 19, 2), (1, 500, 499)])
def test_schedule_counts_every_pick_and_spreads_them(shares: tuple[int, ...]) -> None:
  weights = dict(zip("abc", shares))
  schedule = sampler.SampleSchedule(weights)
  counts = collections.Counter()
  for index in range(2 * schedule.period):
    task, count = schedule.pick(index)
    assert count == counts[task]
    counts[task] += 1
    for name, weight in weights.items():  # never far from its share
      assert abs(counts[name] - (index + 1) * weight / schedule.period) < len(weights)
  assert counts == {name: 2 * weight for name, weight in weights.items()}
  task, count = schedule.pick(10**12 * schedule.period + 1)
  assert (task, count) == (schedule.pick(1)[0], 10**12 * weights[task] + schedule.pick(1)[1])


CHANGES = [(37, 0, {"a": 2, "c": 1}), (37, 400, {"b": 3, "d": 1}), (500, 333, {"a": 1, "d": 1}), (900, 1, {"a": 1})]


def share(index: float, task: str) -> float:
  """The rate that a task should have at a place between samples, by CHANGES."""
  value = {"a": 0.95, "b": 0.05}
  for first, length, weights in CHANGES:
    new = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    part = min((index - first) / length, 1) if length else 1
    if index >= first:
      value = {name: (1 - part) * value.get(name, 0) + part * new.get(name, 0) for name in {*value, *new}}
  return value.get(task, 0)


def test_rates_change_along_straight_lines_with_counts_in_closed_form() -> None:
  timeline = sampler.Timeline({"a": 19, "b": 1}, CHANGES)
  counts, wanted = collections.Counter(), collections.Counter()
  for index in range(1_200):
    assert {name: timeline.count(name, index) for name in "abcd"} == {name: counts[name] for name in "abcd"}
    task, count = timeline.pick(index)
    assert count == counts[task]  # the same from anywhere: nothing but the index goes in
    counts[task] += 1
    for name in "abcd":
      wanted[name] += share(index + 0.5, name)
      assert abs(counts[name] - wanted[name]) < 4
  assert timeline.names == ["a", "b", "c", "d"]
  assert timeline.pick(10**15 + 901) == ("a", counts["a"] + 10**15 + 901 - 1_200)


def test_long_ramp_is_exact_and_cheap() -> None:
  # Instructions from 0 to 5 % over GLM-130B's 2,000 steps of 4,224 samples.
  first, length = 83_655_480, 8_448_000
  timeline = sampler.Timeline({"text": 1}, [(first, length, {"text": 19, "instructions": 1})])
  assert timeline.count("instructions", first) == 0
  for part in (0.1, 0.5, 1.0):
    seen = int(part * length)
    assert timeline.count("instructions", first + seen) == pytest.approx(0.05 * seen * part / 2, abs=2)
    assert timeline.count("text", first + seen) + timeline.count("instructions", first + seen) == first + seen
  after = timeline.count("instructions", first + length + 10**12)
  assert after == pytest.approx(0.025 * length + 5 * 10**10, abs=2)


def test_without_changes_a_timeline_is_its_schedule() -> None:
  weights = {"a": 7, "b": 3, "c": 11}
  timeline, schedule = sampler.Timeline(weights), sampler.SampleSchedule(weights)
  assert all(timeline.pick(i) == schedule.pick(i) for i in [*range(50), 10**12])
  assert all(timeline.count("b", i) == sum(schedule.pick(k)[0] == "b" for k in range(i)) for i in range(50))


def test_changes_that_overlap_are_refused() -> None:
  with pytest.raises(errors.InputError, match="from sample 50 on, before another one is over .sample 70."):
    sampler.Timeline({"a": 1}, [(20, 50, {"b": 1}), (50, 0, {"a": 1})])
  with pytest.raises(errors.InputError, match="0 or more"):
    sampler.RateChange(-1, {"a": 1})


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permutation_visits_each_once_and_differs_by_key(size: int) -> None:
  orders = [[sampler.permute(i, size, 7, "en", epoch) for i in range(size)] for epoch in range(3)]
  for order in orders:
    assert sorted(order) == list(range(size))
  if size >= 16:
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != [sampler.permute(i, size, 8, "en", 0) for i in range(size)]


def test_permutation_looks_random() -> None:
  size = 3000
  order = np.array([sampler.permute(i, size, 1) for i in range(size)])
  assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.06
  assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06
  steps = np.diff(order)
  assert np.unique(steps).size > size / 2  # no stride


def test_each_window_is_visited_once_an_epoch(cache: shards.TokenCache) -> None:
  source = sampler.MixtureSampler(cache, INFILLING, seed=3, rates={"en": 1})
  windows = 20_011 // INFILLING.window_length
  first_tokens = []
  for epoch in range(3):
    numbers = [source.locate(epoch * windows + i) for i in range(windows)]
    assert {(task, e) for task, e, _ in numbers} == {("en", epoch)}
    assert sorted(number for *_, number in numbers) == list(range(windows))
    text = source._sources["en"]
    seen = np.concatenate([text.window(epoch, number) for *_, number in numbers])
    assert np.unique(seen).size == seen.size == windows * INFILLING.window_length  # no token twice
    first_tokens.append(int(text.window(epoch, 0)[0]))
  assert len(set(first_tokens)) > 1  # windows are cut elsewhere


@pytest.mark.parametrize("changes", [(), [sampler.RateChange(40, {"en": 0.1, "zh": 0.9}, ramp_samples=30)]])
@pytest.mark.parametrize("rates", [None, {"en": 0.001, "zh": 0.999}, {"en": 1.0}])
def test_samples_once_are_those_before_the_first_second_epoch(cache: shards.TokenCache, rates, changes) -> None:
  source = sampler.MixtureSampler(cache, INFILLING, 3, rates=rates, changes=changes)
  count = source.samples_once()
  located = [source.locate(index) for index in range(count)]
  assert count > 1 and len({*located}) == count and not any(epoch for _, epoch, _ in located)
  assert source.locate(count)[1] == 1


def test_rates_are_exact_over_the_period(cache: shards.TokenCache) -> None:
  source = sampler.MixtureSampler(cache, INFILLING, seed=3)
  assert collections.Counter(source.locate(i)[0] for i in range(40, 50)) == {"en": 5, "zh": 3, "qa": 2}
  source = sampler.MixtureSampler(cache, INFILLING, seed=3, rates={"zh": 1, "qa": 1})
  assert collections.Counter(source.locate(i)[0] for i in range(10)) == {"zh": 5, "qa": 5}


def test_patterns_share_as_cached(cache: shards.TokenCache) -> None:
  rates = sampler.task_rates(cache, "train", {"[ez]*": 0.95, "qa": 0.05})
  assert rates == pytest.approx({"en": 0.95 * 5 / 8, "zh": 0.95 * 3 / 8, "qa": 0.05})
  both = sampler.task_rates(cache, "train", {"en|qa": 0.7, "qa": 0.3})
  assert both == pytest.approx({"en": 0.5, "qa": 0.5})
  with pytest.raises(errors.InputError, match="rates name the task 'no_.'"):
    sampler.task_rates(cache, "train", {"no_*": 1})


def test_sets_too_small_for_a_held_out_pair_are_left_out_there(tmp_path: pathlib.Path) -> None:
  tokenizer = {"fingerprint": "f" * 64, "vocab_size": 60_008, "specials": dataclasses.asdict(SPECIALS)}
  splits = {"train": {"source": ""}, "validation": {"source": ""}}
  about = {
    name: {"kind": kind, "rate": 0.5, "splits": splits} for name, kind in (("en", "text"), ("small", "instruction"))
  }
  made = {"en": numbered(0, 500)[0], "small": pairs([(3, 3)] * 4)[0]}
  with builder.CacheBuilder(tmp_path / "cache", builder.make_plan("m", 1, tokenizer, about)) as making:
    for shard in making.missing():
      held_out_pairs = shard.split == "validation" and shard.task == "small"
      builder.write_shard(making.partial, shard, [] if held_out_pairs else made[shard.task], 60_008)
    small = making.finish()
  for rates, names in ((None, ["en"]), ({"en": 0.9, "sm*": 0.1}, ["en"]), ({"*": 1}, ["en"])):
    assert sampler.MixtureSampler(small, INFILLING, 0, "validation", rates).schedule.names == names
    assert sampler.MixtureSampler(small, INFILLING, 0, "train", rates).schedule.names == ["en", "small"]
  with pytest.raises(errors.InputError, match="of small nothing is in the split 'validation'"):
    sampler.MixtureSampler(small, INFILLING, 0, "validation", {"small": 1})
  for rates in ({}, {"en": 0}):  # the rates are at fault there, and the cache is not
    with pytest.raises(errors.InputError, match="mixture rates .*one above 0"):
      sampler.MixtureSampler(small, INFILLING, 0, "validation", rates)


def test_changed_rates_keep_rows_before_them_and_lose_none(cache: shards.TokenCache) -> None:
  changes = [sampler.RateChange(60, {"[ez]*": 0.5, "qa": 0.5}, 80)]
  plain = sampler.MixtureSampler(cache, INFILLING, seed=3, rates={"en": 1})
  changed = sampler.MixtureSampler(cache, INFILLING, seed=3, rates={"en": 1}, changes=changes)
  assert [plain.locate(i) for i in range(60)] == [changed.locate(i) for i in range(60)]
  located = [changed.locate(i) for i in range(400)]
  assert len({*located}) == 400  # no window twice in an epoch
  for task in ("en", "zh", "qa"):
    numbers = [number for name, epoch, number in located if name == task and epoch == 0]
    rows_of_task = changed.describe()["changes"][0]["rows_per_epoch"][task]
    assert len(numbers) == min(changed.schedule.count(task, 400), rows_of_task)
  again = sampler.MixtureSampler(cache, INFILLING, seed=3, rates={"en": 1}, changes=changes)
  for index in (333, 100, 61):  # resumed anywhere, in any order
    for feature, value in changed.row(index).items():
      np.testing.assert_array_equal(value, again.row(index)[feature])
  described = changed.describe()
  assert {**described, "changes": None} == {**plain.describe(), "changes": None}


def test_rows_depend_on_seed_and_index_alone(cache: shards.TokenCache) -> None:
  one, two = (sampler.MixtureSampler(cache, INFILLING, seed=3) for _ in range(2))
  other = sampler.MixtureSampler(cache, INFILLING, seed=4)
  for index in (17, 3, 10**9, 5, 10**12):
    for feature, value in one.row(index).items():
      np.testing.assert_array_equal(value, two.row(index)[feature])
  assert any((one.row(i)["tokens"] != other.row(i)["tokens"]).any() for i in range(5))


def test_far_index_costs_no_more(cache: shards.TokenCache) -> None:
  source = sampler.MixtureSampler(cache, INFILLING, seed=3)
  start = time.perf_counter()
  for i in range(10**12, 10**12 + 200):
    source.row(i)
  assert time.perf_counter() - start < 2


@pytest.mark.parametrize("packing", rows.PACKINGS)
def test_rows_of_pairs_are_each_visited_once(cache: shards.TokenCache, packing: str) -> None:
  infilling = dataclasses.replace(INFILLING, packing=packing)
  source = sampler.MixtureSampler(cache, infilling, seed=0, rates={"qa": 1})
  count = source.describe()["rows_per_epoch"]["qa"]
  assert sorted(source.locate(i)[2] for i in range(count)) == list(range(count))
  kept = 0
  for i in range(count):
    row = source.row(i)
    assert (row["objective"] == tokens.OBJECTIVE_INSTRUCTION).all()
    kept += len(rows.places_of_samples(row))
  assert kept == len(cache.split("qa", "train").document_lengths())


def test_what_is_missing_is_named(cache: shards.TokenCache) -> None:
  with pytest.raises(errors.InputError, match="task 'eng'.*did you mean 'en'"):
    sampler.MixtureSampler(cache, INFILLING, seed=0, rates={"eng": 1})
  with pytest.raises(errors.InputError, match="no task has a split 'test'"):
    sampler.MixtureSampler(cache, INFILLING, seed=0, split="test")
  with pytest.raises(errors.InputError, match="not enough for a window of 32767 tokens"):
    sampler.MixtureSampler(cache, rows.BlankInfilling(1 << 15, SPECIALS), seed=0)
