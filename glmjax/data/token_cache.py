"""Tokenizes a mixture's tasks once, into a token cache on disk."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import os
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping

from glmjax import errors
from glmjax import ranges
from glmjax.data import builder
from glmjax.data import file_tasks
from glmjax.data import mixtures
from glmjax.data import pools
from glmjax.data import shard_writer
from glmjax.data import shards
from glmjax.data import splits
from glmjax.data import tokenizing
from glmjax.io import bucket_path
from glmjax.io import folders
from glmjax.io import lease
from glmjax.io import paths
from glmjax.io import progress

_log = logging.getLogger("glmjax")

_READ_TOGETHER = 4  # shards of a task with fewer files: each reading parses all of it


def cache_mixture(
  mixture: str | mixtures.Mixture,
  directory: paths.Named,
  *,
  num_shards: int = 8,
  num_workers: int | None = None,
  overwrite: bool = False,
  on_start: Callable[[paths.Path], None] | None = None,
) -> dict:
  """Tokenizes every split of a mixture's tasks into DIRECTORY, or goes on where a killed run stopped.

  Args:
    mixture: tasks of text files (`mixtures.pretraining`, `mixtures.instruction`), which need neither seqio nor
      TensorFlow; or the name of a mixture or task that is registered with seqio.
    directory: the cache's folder; it appears when all is done, in a bucket by its last object, the manifest.
    num_shards: shards of each split: the unit of parallel work, and of what a killed run loses. A task of
      fewer files than that is read several times, once for some shards of every split.
    num_workers: processes, forked so that they know the tasks that this one does, or where something is in a bucket
      started anew and sent them; 0: this process alone; None: one a processor where that is possible.
    overwrite: replace another cache in DIRECTORY.
    on_start: called with the folder that will be the cache, before it gets its name; the command line writes there.

  Returns:
    Documents, tokens and UTF-8 bytes of each task's splits.
  """
  _check_settings(num_shards, num_workers, overwrite)
  folders.claim(directory, folders.Kind.CACHE, "directory", overwrite=overwrite)  # before the text is read
  mixture = _mixture(mixture)
  for task in mixture.tasks:  # before processes are forked, which then know what filters leave
    task.notes()
  in_bucket = _is_in_bucket(mixture, directory)
  num_workers = _count_workers(num_workers, mixture, in_bucket)
  with _pool(num_workers, mixture, in_bucket) as pool:
    tasks_by_file = pool.submit(_files).result()
    hashing = pool.map(_file_hash, tasks_by_file.values(), tasks_by_file)
    hashes = progress.bar(hashing, total=len(tasks_by_file), unit="file", desc="read", leave=False)
    plan = pool.submit(_make_plan, num_shards, dict(zip(tasks_by_file, hashes))).result()
    _say_what_is_cut(mixture)
    with builder.CacheBuilder(directory, plan, overwrite) as making:
      todo = making.missing()
      vocab_size = plan["tokenizer"]["vocab_size"]
      jobs = [
        pool.submit(_write_shards, making.partial, group, num_shards, vocab_size, lease.lent())
        for group in _read_together(mixture, todo, num_shards, -(-len(todo) // max(num_workers, 1)))
      ]
      try:
        _show_progress(jobs, len(todo), total=len(builder.all_shards(plan)))
      except BaseException:
        if not num_workers:  # a thread of this process writes nothing once the lock is given up
          concurrent.futures.wait([job for job in jobs if not job.cancel()])
        raise
      if on_start is not None:
        on_start(making.directory if making.finished else making.partial)
      with tempfile.TemporaryDirectory() as scratch:
        mixture.tokenizer.save(pathlib.Path(scratch) / "tokenizer")
        finished = making.finish(pathlib.Path(scratch) / "tokenizer")
  _say_what_is_empty(finished)
  return _counts(finished)


def _check_settings(num_shards: int, num_workers: int | None, overwrite: bool) -> None:
  """Raises InputError, naming the setting, unless each is what it may be."""
  ranges.whole("num_shards", num_shards, 1, ranges.MOST_SHARDS)
  if num_workers is not None:
    ranges.whole("num_workers", num_workers, 0, ranges.MOST_WORKERS)
  ranges.flag("overwrite", overwrite)


def _counts(cache: shards.TokenCache) -> dict[str, dict[str, dict[str, int]]]:
  """Returns documents, tokens and UTF-8 bytes of each task's splits."""
  names = ("documents", "tokens", "utf8_bytes")
  return {
    task: {split: {name: about[name] for name in names} for split, about in own["splits"].items()}
    for task, own in cache.tasks.items()
  }


def _mixture(given: object) -> mixtures.Mixture:
  """Returns the mixture that a user gave, or named.

  Raises:
    errors.InputError: when it is none.
  """
  if isinstance(given, str):
    return _seqio_tasks(f"the mixture {given!r} is one of seqio's").mixture(given)
  if not isinstance(given, mixtures.Mixture):
    raise errors.InputError(
      f"cache_mixture.mixture is {str(given)[:60]}: give what mixtures.pretraining(...) or mixtures.instruction(...) "
      "returns (in a gin file with () at its end), or the name of a mixture that is registered with seqio"
    )
  if given.prefers:
    raise errors.InputError(
      "pairs of answers are not cached: runs read them when they begin (in_memory.InMemoryMixture)"
    )
  return given


def _seqio_tasks(why: str) -> types.ModuleType:
  """Imports what knows seqio, and so TensorFlow.

  Raises:
    errors.InputError: where they are not installed; its line begins with `why` they are needed.
  """
  try:
    from glmjax.data import seqio_tasks
  except ModuleNotFoundError as error:
    raise errors.InputError(
      f"{why}, and {error.name} is not installed: pip install 'glmjax[data]', or cache text files by "
      "cache_mixture.mixture = @mixtures.pretraining(), which does without (docs/data.md)"
    ) from error
  return seqio_tasks


def _say_what_is_cut(mixture: mixtures.Mixture) -> None:
  """Tells of which tasks parts of documents are held out, where whole ones would be too few."""
  for task in mixture.tasks:
    if (windows := task.windows) is not None:
      _log.warning(
        "task %s: too few documents to hold out every %dth; about one in %d windows of %s characters is "
        "held out instead",
        task.name,
        splits.HELD_OUT_EVERY,
        windows.every,
        f"{windows.size:,}",
      )


def _say_what_is_empty(finished: shards.TokenCache) -> None:
  """Tells which splits hold nothing, before a run or an evaluation comes to them."""
  for name, task in finished.tasks.items():
    if empty := [split for split, about in task["splits"].items() if not about["tokens"]]:
      _log.warning(
        "task %s: nothing is in the split %s; runs that validate use the other tasks, if there are any",
        name,
        ", ".join(empty),
      )


def _show_progress(jobs: list[concurrent.futures.Future], todo: int, total: int) -> None:
  """Waits for the jobs, which make `todo` of all shards; raises what one of them raised. How far they are a bar says,
  or where that is not shown a line a minute.
  """
  told, done = progress.Progress(todo, "shards cached", seconds=60), 0
  with progress.bar(total=total, initial=total - todo, unit="shard", desc="cache") as bar:
    tokens = 0
    for job in concurrent.futures.as_completed(jobs):
      lease.check()  # those who work have not taken it
      tokens += sum(record["tokens"] for record in job.result())
      bar.set_postfix_str(f"{tokens / 1e6:.2f}M tokens", refresh=False)
      bar.update(len(job.result()))
      done += len(job.result())
      if bar.disable:
        told.at(done)


def _through_tensorflow(mixture: mixtures.Mixture) -> bool:
  """Tells whether a task's examples come through TensorFlow."""
  return not all(isinstance(task, file_tasks.FileTask) for task in mixture.tasks)


def _is_in_bucket(mixture: mixtures.Mixture, directory: paths.Named) -> bool:
  """Tells whether something is read from a bucket, or written to one."""
  read = [path for task in mixture.tasks for path in task.paths]
  return any(isinstance(path, bucket_path.BucketPath) for path in [paths.named(directory), *read])


def _count_workers(num_workers: int | None, mixture: mixtures.Mixture, in_bucket: bool) -> int:
  """Says how many processes work beside this one."""
  can_fork = sys.platform == "linux"
  if in_bucket and _through_tensorflow(mixture):  # seqio's tasks cannot be sent, nor buckets used after a fork
    if num_workers:
      raise errors.InputError(
        f"num_workers is {num_workers}, but where text or cache are in a bucket one process alone caches seqio's own "
        "tasks: use 0"
      )
    return 0
  if can_fork and _through_tensorflow(mixture):
    from glmjax.data import seqio_tasks

    can_fork = not seqio_tasks.has_run()
  if num_workers is None:
    num_workers = len(os.sched_getaffinity(0)) if can_fork else 0
  if num_workers and not can_fork:
    raise errors.InputError(
      f"num_workers is {num_workers}, but this process cannot be forked (it is not on "
      "Linux, or TensorFlow has run in it); use 0, or the command glmjax cache"
    )
  return num_workers


def _pool(
  num_workers: int, mixture: mixtures.Mixture, in_bucket: bool
) -> contextlib.AbstractContextManager[concurrent.futures.Executor]:
  """Returns the workers that make the cache, each with the mixture."""
  if in_bucket and num_workers:
    return pools.fresh(num_workers, mixture)
  if num_workers and _through_tensorflow(mixture):
    return pools.forked(num_workers, mixture, _leave_gpus)
  return pools.forked(num_workers, mixture)


def _leave_gpus() -> None:
  from glmjax.data import seqio_tasks

  seqio_tasks.leave_gpus()


# What workers do.


def _files() -> dict[str, str]:
  """Returns the files that the mixture is made from, each with the name of a task that reads it."""
  return dict(sorted((file, task.name) for task in pools.given().tasks for file in task.files()))


def _file_hash(task: str, file: str) -> str:
  return pools.given().task(task).file_hash(file)


def _make_plan(num_shards: int, hashes: Mapping[str, str]) -> dict:
  return make_plan(pools.given(), num_shards, hashes)


def make_plan(mixture: mixtures.Mixture, num_shards: int, hashes: Mapping[str, str]) -> dict:
  """Plans what the cache of a mixture will hold; `hashes` stand for the contents of its files."""
  tasks = {}
  for task in sorted(mixture.tasks, key=lambda task: task.name):
    by_split = {split: {"source": task.fingerprint(split, hashes)} for split in task.splits}
    tasks[task.name] = {"kind": task.kind, "rate": mixture.rates[task.name], **task.notes(), "splits": by_split}
  about = {
    "fingerprint": mixture.tokenizer.fingerprint,
    "vocab_size": mixture.tokenizer.vocab_size,
    "specials": dataclasses.asdict(mixture.tokenizer.specials),
  }
  return builder.make_plan(mixture.name, num_shards, about, tasks)


def _read_together(
  mixture: mixtures.Mixture, todo: list[builder.Shard], num_shards: int, most: int
) -> Iterator[list[builder.Shard]]:
  """Yields groups of shards, each of one job: where one reading of the files serves several, about `most`.

  They are a task's shards of some numbers, of all its splits: every reading parses all of the text.
  """
  for name, found in itertools.groupby(todo, key=lambda shard: shard.task):
    task, of_task = mixture.task(name), list(found)
    if task.deals_out(num_shards):
      together = max(1, min(most // len(task.splits), _READ_TOGETHER))
      for first in range(0, num_shards, together):
        if group := [shard for shard in of_task if first <= shard.index < first + together]:
          yield group
    else:
      yield from ([shard] for shard in of_task)


def _write_shards(
  partial: paths.Path, group: list[builder.Shard], num_shards: int, vocab_size: int, locks: lease.Locks
) -> list[dict]:
  """Does one unit of work, under the locks of the process that asks for it: shards of a task, of the same reading."""
  mixture = pools.given()
  task = mixture.task(group[0].task)
  with lease.borrowed(locks):
    if task.deals_out(num_shards):
      return _deal_out(partial, group, num_shards, vocab_size)
    (shard,) = group
    documents = task.documents(mixture.tokenizer, shard.split, shard.index, num_shards)
    return [builder.write_shard(partial, shard, documents, vocab_size)]


def _deal_out(partial: paths.Path, group: list[builder.Shard], num_shards: int, vocab_size: int) -> list[dict]:
  """Writes shards of a task of files, each with its documents of one reading."""
  task = pools.given().task(group[0].task)
  with contextlib.ExitStack() as stack:
    writers = {
      (shard.split, shard.index): stack.enter_context(builder.writing_shard(partial, shard, vocab_size))
      for shard in group
    }
    destinations: collections.deque[shard_writer.ShardWriter] = collections.deque()

    def wanted() -> Iterator[tokenizing.Strings]:
      """Yields the examples of these shards, and notes where each one's document goes."""
      seen = collections.Counter[str]()
      for split, example in task.all_examples():
        if writer := writers.get((split, seen[split] % num_shards)):
          destinations.append(writer)
          yield example
        seen[split] += 1

    for document in tokenizing.documents(pools.given().tokenizer, task.kind, wanted()):
      destinations.popleft().add(document)
  return [writer.record for writer in writers.values()]
