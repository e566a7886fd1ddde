"""Batches: the same rows for any number of hosts and workers, clean ends, failures that name the sample."""

import dataclasses
import functools
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from glmjax import errors
from glmjax import tokens
from glmjax.data import builder
from glmjax.data import loader
from glmjax.data import rows
from glmjax.data import shards
from glmjax.data import workers

SPECIALS = tokens.icetk(0, 500)
INFILLING = rows.BlankInfilling(64, SPECIALS, samples_per_sequence=2)


def make_cache(directory: pathlib.Path, seed: int = 0, empty: tuple[str, ...] | None = None) -> shards.TokenCache:
  """With a validation split if `empty` is given: names of tasks that it does not have."""
  tokenizer = {"fingerprint": "f" * 64, "vocab_size": 508, "specials": dataclasses.asdict(SPECIALS)}
  splits = {split: {"source": ""} for split in (["train"] if empty is None else ["train", "validation"])}
  tasks = {name: {"kind": "text", "rate": rate, "splits": splits} for name, rate in [("en", 2), ("zh", 1)]}
  with builder.CacheBuilder(directory, builder.make_plan("m", 2, tokenizer, tasks)) as making:
    for shard in making.missing():
      rng = np.random.default_rng([shard.index, ord(shard.task[0]), *([seed] if seed else [])])
      documents = [
        shards.Document(np.append(rng.integers(4, 500, 90), SPECIALS.eod))
        for _ in range(30 if shard.split == "train" or shard.task not in empty else 0)
      ]
      builder.write_shard(making.partial, shard, documents, 508)
    return making.finish()


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
  make_cache(tmp_path / "cache")
  return tmp_path / "cache"


def gather(source: loader.CachedMixture, plan: list[tuple[int, int]], process_count: int = 1) -> list[loader.Batch]:
  """Global batches, put together from every host's rows."""
  hosts = [list(source.batches(iter(plan), i, process_count)) for i in range(process_count)]
  return [
    {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in zip(*hosts, strict=True)
  ]


def assert_same(a: list[loader.Batch], b: list[loader.Batch]) -> None:
  assert len(a) == len(b)
  for x, y in zip(a, b):
    assert x.keys() == y.keys()
    for name in x:
      assert x[name].dtype == y[name].dtype
      np.testing.assert_array_equal(x[name], y[name])


def test_hosts_and_workers_change_nothing(directory: pathlib.Path) -> None:
  plan = [(0, 8), (8, 8), (100, 4), (10**9, 8), (10**12, 12)]
  source = loader.CachedMixture(directory, INFILLING, seed=5, num_workers=0)
  expected = gather(source, plan)
  assert [batch["tokens"].shape for batch in expected] == [(size, 64) for _, size in plan]
  for process_count in (2, 4):
    assert_same(gather(source, plan, process_count), expected)
  for num_workers in (1, 2):
    assert_same(gather(dataclasses.replace(source, num_workers=num_workers), plan), expected)
  assert_same(gather(dataclasses.replace(source, num_workers=2, prefetch=1), plan, 2), expected)


def test_batches_are_the_samplers_rows(directory: pathlib.Path) -> None:
  source = loader.CachedMixture(directory, INFILLING, num_workers=0)
  (one,) = source.batches([(10, 6)])
  parts = list(source.batches([(10, 2), (12, 4)]))
  for name in one:
    np.testing.assert_array_equal(one[name], np.concatenate([part[name] for part in parts]))
    np.testing.assert_array_equal(one[name][3], source.sampler.row(13)[name])


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned_2d"])
def test_batch_features(directory: pathlib.Path, positions: str) -> None:
  infilling = dataclasses.replace(INFILLING, positions=positions)
  (batch,) = loader.CachedMixture(directory, infilling, num_workers=0).batches([(0, 4)])
  assert batch.keys() == {"tokens", "targets", "loss_weights", "positions", "attend_start", "attend_end", "objective"}
  for name, value in batch.items():
    assert value.dtype == (np.float32 if name == "loss_weights" else np.int32)
    assert value.shape == ((4, 2, 64) if name == "positions" and positions != "rotary" else (4, 64))


def test_special_tokens_come_from_the_cache(directory: pathlib.Path) -> None:
  factory = functools.partial(rows.BlankInfilling, 64, samples_per_sequence=2)
  source = loader.CachedMixture(directory, factory)
  given = loader.CachedMixture(directory, INFILLING, num_workers=0)
  assert source.seq_length == 64
  assert_same(gather(source, [(0, 4)]), gather(given, [(0, 4)]))
  other = dataclasses.replace(INFILLING, specials=tokens.icetk())
  with pytest.raises(errors.InputError, match="other special tokens"):
    loader.CachedMixture(directory, other, num_workers=0).batches([(0, 4)])


def test_description_tells_other_rows_apart(directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
  source = loader.CachedMixture(directory, INFILLING)
  copy = make_cache(tmp_path / "copy").directory
  base = source.describe()
  assert json.loads(json.dumps(base)) == base
  assert base == loader.CachedMixture(copy, INFILLING, num_workers=2, prefetch=3).describe()
  infilling = dataclasses.replace(INFILLING, gmask_rate=0.5)
  others = [dict(seed=1), dict(rates={"en": 1}), dict(infilling=infilling)]
  assert all(dataclasses.replace(source, **change).describe() != base for change in others)


def test_batch_that_does_not_divide_is_refused(directory: pathlib.Path) -> None:
  source = loader.CachedMixture(directory, INFILLING)
  with pytest.raises(errors.InputError, match="a batch of 6 rows does not divide over 4 hosts"):
    next(source.batches([(0, 6)], 0, 4))
  with pytest.raises(errors.InputError, match="CachedMixture.num_workers is -1"):
    loader.CachedMixture(directory, INFILLING, num_workers=-1)


def endless(size: int = 4) -> loader.Iterator[tuple[int, int]]:
  first = 0
  while True:
    yield first, size
    first += size


def helper_pids(batches: loader.Iterator[loader.Batch]) -> list[int]:
  return [worker.pid for worker in batches.gi_frame.f_locals["pool"]]


def test_closing_ends_the_workers(directory: pathlib.Path) -> None:
  batches = loader.CachedMixture(directory, INFILLING, num_workers=2).batches(endless())
  next(batches)
  pids = helper_pids(batches)
  for pid in pids:
    os.kill(pid, 0)
  batches.close()
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_is_reported_with_the_sample(directory: pathlib.Path, num_workers: int) -> None:
  batches = loader.CachedMixture(directory, INFILLING, num_workers=num_workers).batches(endless())
  for _ in range(3):  # all workers have opened the cache
    next(batches)
  for path in directory.rglob("*.tokens"):
    os.truncate(path, 10)
  named = r"^sample \d+ \((en|zh)\): .*\.tokens: ends too early"
  with pytest.raises(errors.InputError, match=named) as caught:
    for _ in batches:
      pass
  assert "\n" not in str(caught.value)


def test_workers_read_the_cache_that_was_opened_or_say_so(directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
  source = loader.CachedMixture(directory, INFILLING, num_workers=2)
  described = source.describe()
  expected = gather(loader.CachedMixture(directory, INFILLING, num_workers=0), [(0, 4)])
  directory.rename(tmp_path / "old")
  make_cache(directory)  # the same bytes are the same data
  assert_same(gather(source, [(0, 4)]), expected)
  path = directory / "en/train-00000-of-00002.tokens"
  path.write_bytes(path.read_bytes()[::-1])
  with pytest.raises(errors.InputError, match="sample .* token cache is damaged"):
    list(source.batches(iter([(0, 64)])))
  (directory / "manifest.json").unlink()
  build_other(directory)
  with pytest.raises(errors.InputError, match="sample .* was replaced while it was being read"):
    list(source.batches(iter([(0, 64)])))
  assert source.describe() == described


def build_other(directory: pathlib.Path) -> None:
  """Another cache of that name."""
  for path in sorted(directory.rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  make_cache(directory, 1)


def test_nothing_held_out_is_said_before_the_first_batch(tmp_path: pathlib.Path) -> None:
  make_cache(tmp_path / "cache", empty=("en", "zh"))
  source = loader.CachedMixture(tmp_path / "cache", INFILLING, split="validation")
  for call in (source.check, source.describe, lambda: next(source.batches(iter([(0, 4)])))):
    with pytest.raises(errors.InputError, match="of en, zh nothing is in the split 'validation': make the cache again"):
      call()
  loader.CachedMixture(tmp_path / "cache", INFILLING).check()
  make_cache(tmp_path / "half", empty=("zh",))
  source = dataclasses.replace(source, directory=tmp_path / "half")
  source.check()
  with pytest.raises(errors.InputError, match="of zh nothing is in the split 'validation'"):
    dataclasses.replace(source, rates={"z*": 1.0}).check()


def test_damage_at_open_is_reported_by_the_caller(directory: pathlib.Path) -> None:
  (directory / "zh/train-00001-of-00002.tokens").unlink()
  with pytest.raises(errors.InputError, match="zh/train-00001-of-00002.tokens: missing"):
    next(loader.CachedMixture(directory, INFILLING).batches(endless()))


def test_killed_worker_does_not_hang(directory: pathlib.Path) -> None:
  batches = loader.CachedMixture(directory, INFILLING, num_workers=1).batches(endless())
  next(batches)
  os.kill(helper_pids(batches)[0], signal.SIGKILL)
  killed = r"data loader 0 process \d+ was killed by SIGKILL .* samples \d+ to \d+"
  with pytest.raises(workers.WorkerError, match=killed):
    for _ in batches:
      pass


def test_worker_ends_with_its_parent(directory: pathlib.Path) -> None:
  script = f"""
import os, pickle, signal, sys
source = pickle.loads({pickle.dumps(loader.CachedMixture(directory, INFILLING))!r})
batches = source.batches((i, 1) for i in range(10**9))
next(batches)
print(batches.gi_frame.f_locals["pool"][0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
  done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 20
  with pytest.raises(ProcessLookupError):
    while time.monotonic() < deadline:
      os.kill(int(done.stdout), 0)
      time.sleep(0.1)


def test_training_from_the_cache_needs_no_tensorflow_or_jax(directory: pathlib.Path) -> None:
  script = f"""
import pickle, sys
from glmjax.data import loader
source = pickle.loads({pickle.dumps(loader.CachedMixture(directory, INFILLING, num_workers=0))!r})
next(source.batches([(0, 2)]))
print([name for name in ("tensorflow", "seqio", "jax", "flax", "sentencepiece") if name in sys.modules])
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
  assert done.stdout == "[]\n"
