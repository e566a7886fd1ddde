"""Batches from a token cache, made ahead of time in helper processes; needs neither TensorFlow nor JAX."""

import collections
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from glmjax import errors
from glmjax import ranges
from glmjax.data import nearby
from glmjax.data import rows
from glmjax.data import sampler
from glmjax.data import shards
from glmjax.io import together
from glmjax.data import workers
from glmjax.io import bucket_path
from glmjax.io import paths

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class CachedMixture:
  """A DataSource over a token cache: sample i is a function of cache, infilling, seed and i alone."""

  directory: paths.Named  # made by glmjax cache; on the disk or in a bucket
  # Rows from windows; or what makes that from `specials` (gin's @BlankInfilling), the cache's then.
  infilling: sampler.Infilling | Callable[..., sampler.Infilling]
  seed: int = 0
  split: str = "train"
  # By task, or by pattern ("instruct_*") for tasks that share as cached; None: all as cached.
  rates: Mapping[str, float] | None = None
  rate_changes: Sequence[sampler.RateChange] = ()  # other rates from a sample on
  num_workers: int = 1  # processes that make batches; 0: the caller's own
  prefetch: int = 2  # batches that each of them is ahead
  local_gib: float = shards.LOCAL_GIB  # of the local disk, for what is read of caches in buckets; 0: none

  def __post_init__(self) -> None:
    ranges.whole("CachedMixture.seed", self.seed, -(2**63), 2**64 - 1)
    ranges.whole("CachedMixture.num_workers", self.num_workers, 0, 1024)
    ranges.whole("CachedMixture.prefetch", self.prefetch, 1, 1024)
    ranges.number("CachedMixture.local_gib", self.local_gib, 0, 1e6)

  @property
  def seq_length(self) -> int:
    return self._infilling.seq_length

  @functools.cached_property
  def cache(self) -> shards.TokenCache:
    """The opened cache, its files checked for size."""
    return shards.TokenCache.open(self.directory, self.local_gib)

  @functools.cached_property
  def _infilling(self) -> sampler.Infilling:
    specials = self.cache.specials
    if callable(self.infilling):
      return self.infilling(specials=specials)
    if self.infilling.specials != specials:
      raise errors.InputError(
        f"{self.directory}: its tokenizer has other special tokens than the infilling: "
        f"{specials}, not {self.infilling.specials}"
      )
    return self.infilling

  @functools.cached_property
  def sampler(self) -> sampler.MixtureSampler:
    """Rows by number, in this process."""
    return sampler.MixtureSampler(self.cache, self._infilling, self.seed, self.split, self.rates, self.rate_changes)

  def describe(self) -> dict:
    """Describes all that decides the rows: a run resumed with another description would see other data."""
    described = {
      "source": "cache",
      "mixture": self.cache.manifest["mixture"],
      "cache": self.cache.fingerprint,
      "tokenizer": self.cache.manifest["tokenizer"]["fingerprint"],
      "seed": self.seed,
      "split": self.split,
      "infilling": rows.described(self._infilling),
      **self.sampler.describe(),
    }
    return json.loads(json.dumps(described))  # as a checkpoint will give it back: lists for tuples

  def samples_once(self) -> int:
    """Counts the first samples of which none is there twice."""
    return self.sampler.samples_once()

  def save_tokenizer(self, folder: paths.Named) -> None:
    """Copies the tokenizer that made the cache's ids into the folder."""
    self.cache.copy_tokenizer(folder)

  def check(self) -> None:
    """Says before anything is computed what `batches` would come to later.

    Raises:
      errors.InputError: when the cache, the split or a rate gives no rows.
    """
    self.sampler  # noqa: B018  (made once, and kept)

  def batches(self, plan: Iterable[tuple[int, int]], process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """Yields batches of this host's rows, one for each (first sample index, batch size) of the plan."""
    local = (local_rows(first, size, process_index, process_count) for first, size in plan)
    if self.num_workers == 0:
      return map(_batch_maker(self, self.cache), local)
    return self._prefetched(local)

  def _prefetched(self, local: Iterator[tuple[int, int]]) -> Iterator[Batch]:
    """Yields batches in order from helper processes in turn, each kept `prefetch` batches ahead."""
    settings = dataclasses.replace(self, infilling=self._infilling, num_workers=0)
    pool: list[workers.Worker] = []
    asked: collections.deque[tuple[workers.Worker, tuple[int, int]]] = collections.deque()
    try:
      pool = [workers.Worker(f"data loader {i}", _batch_maker, settings, self.cache) for i in range(self.num_workers)]
      turns = 0
      for rows_asked in local:
        worker = pool[turns % len(pool)]
        turns += 1
        worker.request(rows_asked)
        asked.append((worker, rows_asked))
        if len(asked) >= self.prefetch * len(pool):
          yield _answer(*asked.popleft())
      while asked:
        yield _answer(*asked.popleft())
    finally:
      for worker in pool:
        worker.close()


def local_rows(first: int, size: int, process_index: int, process_count: int) -> tuple[int, int]:
  """Returns this host's (first sample index, count): its own contiguous rows of the batch."""
  if size % process_count:
    raise errors.InputError(f"a batch of {size} rows does not divide over {process_count} hosts; change the batch size")
  local = size // process_count
  return first + process_index * local, local


def _batch_maker(settings: CachedMixture, cache: shards.TokenCache) -> Callable[[tuple[int, int]], Batch]:
  """Makes what a helper process runs: it reads the cache that the caller has opened, or finds out that it was
  replaced.
  """
  settings.__dict__["cache"] = cache
  return functools.partial(make_batch, settings.sampler, isinstance(cache.directory, bucket_path.BucketPath))


def make_batch(source: sampler.MixtureSampler, in_bucket: bool, asked: tuple[int, int]) -> Batch:
  """Stacks rows [first, first + count); those whose text has to be fetched are made side by side, and wait once."""
  first, count = asked
  indices, made = range(first, first + count), {}
  with nearby.alone() if in_bucket else contextlib.nullcontext():  # threads would take turns: three times as long
    for index in indices:
      with contextlib.suppress(nearby.Lacking):
        made[index] = _row(source, index)
  lacking = [index for index in indices if index not in made]
  made.update(zip(lacking, together.each(functools.partial(_row, source), lacking)))
  return {feature: np.stack([made[index][feature] for index in indices]) for feature in made[first]}


def _row(source: sampler.MixtureSampler, index: int) -> Mapping[str, np.ndarray]:
  try:
    return source.row(index)
  except nearby.Lacking:
    raise
  except Exception as error:
    message = f"sample {index} ({source.locate(index)[0]}): {error}"
    kind = errors.InputError if isinstance(error, errors.InputError) else RuntimeError
    raise kind(message) from error


def _answer(worker: workers.Worker, asked: tuple[int, int]) -> Batch:
  try:
    return worker.result()
  except workers.WorkerError as error:
    raise workers.WorkerError(f"{error} while making samples {asked[0]} to {asked[0] + asked[1] - 1}") from error
