"""Runs a seqio mixture's preprocessors once, into a token cache on disk.

A task gives examples of one of two kinds: `text`, the ids of one document with its end-of-document token, or
`inputs` and `targets`, the ids of a pair. Where it keeps the text itself as well (`<feature>_pretokenized`,
which seqio.preprocessors.tokenize adds), the UTF-8 bytes are counted for evaluation.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping

import seqio
import tensorflow as tf
import tqdm

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import builder
from glmjax.data import shard_writer
from glmjax.data import shards
from glmjax.data import splits
from glmjax.data import tokenizing
from glmjax.data import workers
from glmjax.io import folders

_log = logging.getLogger("glmjax")

_READ_TOGETHER = 4  # shards of a source with fewer files: each reading parses all of it
FEATURES = {"text": ("text",), "instruction": ("inputs", "targets")}


def cache_mixture(
  mixture_name: str,
  directory: str | os.PathLike,
  *,
  num_shards: int = 8,
  num_workers: int | None = None,
  overwrite: bool = False,
) -> dict:
  """Tokenizes every split of a mixture's tasks into DIRECTORY, or goes on where a killed run stopped.

  Args:
    mixture_name: a registered seqio mixture or task.
    directory: the cache's folder; it appears when all is done.
    num_shards: shards of each split: the unit of parallel work, and of what a killed run loses. A source of
      fewer files than that is read several times, once for some shards of every split.
    num_workers: processes, forked so that they know the tasks that this one has registered; 0: this process
      alone; None: one a processor if forking is possible.
    overwrite: replace another cache in DIRECTORY.

  Returns:
    Documents, tokens and UTF-8 bytes of each task's splits.
  """
  if num_shards < 1:
    raise errors.InputError(f"num_shards is {num_shards}; use 1 or more")
  folders.claim(directory, folders.Kind.CACHE, "directory", overwrite=overwrite)  # before the text is read
  tokenizer = mixture_tokenizer(mixture_name)
  num_workers = _count_workers(num_workers)
  with _pool(num_workers) as pool:
    files = pool.submit(_source_files, mixture_name).result()
    hashes = tqdm.tqdm(pool.map(_file_hash, files), total=len(files), unit="file", desc="read", leave=False)
    plan = pool.submit(make_plan, mixture_name, num_shards, dict(zip(files, hashes))).result()
    pool.submit(_say_what_is_cut, mixture_name).result()
    with builder.CacheBuilder(directory, plan, overwrite) as making:
      todo = making.missing()
      vocab_size = plan["tokenizer"]["vocab_size"]
      jobs = [
        pool.submit(_write_shards, making.partial, group, num_shards, vocab_size)
        for group in _read_together(todo, num_shards, -(-len(todo) // max(num_workers, 1)))
      ]
      _show_progress(jobs, len(todo), total=len(builder.all_shards(plan)))
      with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(pathlib.Path(scratch) / "tokenizer")
        finished = making.finish(pathlib.Path(scratch) / "tokenizer")
  _say_what_is_empty(finished)
  return {
    name: {
      split: {key: about[key] for key in ("documents", "tokens", "utf8_bytes")}
      for split, about in task["splits"].items()
    }
    for name, task in finished.tasks.items()
  }


def _say_what_is_cut(mixture_name: str) -> None:
  """Tells of which tasks parts of documents are held out, where whole ones would be too few."""
  for task in _tasks(mixture_name):
    if (windows := getattr(task.source, "windows", None)) is not None:
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
  """Waits for the jobs, which make `todo` of all shards, behind a progress bar; raises what one of them raised."""
  with tqdm.tqdm(total=total, initial=total - todo, unit="shard", desc="cache") as progress:
    tokens = 0
    for job in concurrent.futures.as_completed(jobs):
      tokens += sum(record["tokens"] for record in job.result())
      progress.set_postfix_str(f"{tokens / 1e6:.2f}M tokens", refresh=False)
      progress.update(len(job.result()))


def _count_workers(num_workers: int | None) -> int:
  """Says how many processes work beside this one."""
  can_fork = sys.platform == "linux" and not _tensorflow_has_run()
  if num_workers is None:
    num_workers = len(os.sched_getaffinity(0)) if can_fork else 0
  if num_workers < 0:
    raise errors.InputError(f"num_workers is {num_workers}; use 0 or more")
  if num_workers and not can_fork:
    raise errors.InputError(
      f"num_workers is {num_workers}, but this process cannot be forked (it is not on "
      "Linux, or TensorFlow has run in it); use 0, or the command glmjax cache"
    )
  return num_workers


@contextlib.contextmanager
def _pool(num_workers: int) -> Iterator[concurrent.futures.Executor]:
  """Yields an executor of forked processes, or of a thread of this one; at an error it drops what is unfinished."""
  if num_workers == 0:
    executor = concurrent.futures.ThreadPoolExecutor(1)
  else:
    executor = concurrent.futures.ProcessPoolExecutor(
      num_workers, multiprocessing.get_context("fork"), _start_worker, (os.getpid(),)
    )
  others = set(multiprocessing.active_children())
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Python 3.12 warns of threads; here they are OpenBLAS's idle ones
      executor.submit(os.getpid).result()  # all processes are forked here
    yield executor
  except BaseException as error:
    executor.shutdown(wait=False, cancel_futures=True)
    for process in set(multiprocessing.active_children()) - others:
      process.kill()
    if isinstance(error, concurrent.futures.process.BrokenProcessPool):
      raise errors.InputError(
        "a caching process was killed (out of memory?); run the same command again, "
        "with fewer num_workers: what is complete is kept"
      ) from error
    raise
  finally:
    executor.shutdown()


def _tensorflow_has_run() -> bool:
  """Tells whether TensorFlow has started its threads, which a forked process would lack."""
  threads = tf.config.threading.get_intra_op_parallelism_threads()
  try:
    tf.config.threading.set_intra_op_parallelism_threads(threads + 1)
  except RuntimeError:  # "cannot be modified after initialization"
    return True
  tf.config.threading.set_intra_op_parallelism_threads(threads)
  return False


def _start_worker(parent: int) -> None:
  """Makes a new process end with its parent, and at Ctrl-C without a word, and leave GPUs alone."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  threading.Thread(target=workers.follow, args=(parent,), daemon=True).start()
  tf.config.set_visible_devices([], "GPU")


def mixture_tokenizer(mixture_name: str) -> tokenizer_lib.Tokenizer:
  """Returns the one tokenizer of the mixture's tasks."""
  found = {}
  for task in _tasks(mixture_name):
    for name, feature in task.output_features.items():
      tokenizer = getattr(feature.vocabulary, "text_tokenizer", None)
      if not isinstance(tokenizer, tokenizer_lib.Tokenizer):
        kind = type(feature.vocabulary).__name__
        raise errors.InputError(
          f"task {task.name}: feature {name} has a {kind}; use glmjax.tasks.vocabulary.GLMVocabulary"
        )
      found[tokenizer.fingerprint] = tokenizer
  if len(found) != 1:
    raise errors.InputError(f"mixture {mixture_name}: its tasks use {len(found)} tokenizers; use one")
  return found.popitem()[1]


def make_plan(mixture_name: str, num_shards: int, file_hashes: Mapping[str, str]) -> dict:
  """Plans what the cache of a mixture will hold; `file_hashes` stand for the contents of its sources."""
  tokenizer = mixture_tokenizer(mixture_name)
  mixture = seqio.get_mixture_or_task(mixture_name)
  tasks = {}
  for task in _tasks(mixture_name):
    rate = float(mixture.get_rate(task)) if isinstance(mixture, seqio.Mixture) else 1.0
    kinds = {_kind(task, split) for split in task.splits}
    assert len(kinds) == 1, f"{task.name}: {kinds}"
    by_split = {split: {"source": _source_fingerprint(task, split, file_hashes)} for split in task.splits}
    tasks[task.name] = {"kind": kinds.pop(), "rate": rate, "splits": by_split}
  about = {
    "fingerprint": tokenizer.fingerprint,
    "vocab_size": tokenizer.vocab_size,
    "specials": dataclasses.asdict(tokenizer.specials),
  }
  return builder.make_plan(mixture_name, num_shards, about, tasks)


def _tasks(mixture_name: str) -> list[seqio.Task]:
  """Returns the tasks of a mixture; seqio's own message lists near names."""
  try:
    return list(seqio.get_subtasks(seqio.get_mixture_or_task(mixture_name)))
  except ValueError as error:
    raise errors.InputError(str(error).splitlines()[0]) from error


def _kind(task: seqio.Task, split: str) -> str:
  """Returns text or instruction, by the features that the task's examples have."""
  features = _examples(task, split, 0, 1).element_spec
  for kind, names in FEATURES.items():
    if all(name in features for name in names):
      return kind
  raise errors.InputError(f"task {task.name} gives {', '.join(features)}; a cache needs text, or inputs and targets")


def _examples(task: seqio.Task, split: str, index: int, num_shards: int) -> tf.data.Dataset:
  """Returns shard `index` of a task's examples, in order: as they are at its CacheDatasetPlaceholder, if it has one.

  Random preprocessors are seeded by the shard.
  """
  source = task.source
  if source.supports_arbitrary_sharding or len(source.list_shards(split)) >= num_shards:
    dataset = source.get_dataset(split=split, shuffle=False, shard_info=seqio.ShardInfo(index, num_shards))
  else:
    dataset = source.get_dataset(split=split, shuffle=False).shard(num_shards, index)
  if task.supports_caching:
    return task.preprocess_precache(dataset, seed=index)
  return task.preprocess_postcache(dataset, sequence_length=None, seed=index)


def _source_files(mixture_name: str) -> list[str]:
  """Returns the files that the mixture is made from; sources without files have other names for their shards."""
  names = {name for task in _tasks(mixture_name) for split in task.splits for name in task.source.list_shards(split)}
  return sorted(filter(tf.io.gfile.exists, names))


def _file_hash(name: str) -> str:
  digest = hashlib.sha256()
  with tf.io.gfile.GFile(name, "rb") as file:
    while block := file.read(1 << 22):
      digest.update(block)
  return digest.hexdigest()


def _source_fingerprint(task: seqio.Task, split: str, file_hashes: Mapping[str, str]) -> str:
  """Hashes what a split's tokens are made from: files, and the settings of source and preprocessors."""
  files = [(os.path.basename(name), file_hashes.get(name)) for name in task.source.list_shards(split)]
  made_from = [files, _settings(vars(task.source)), _settings(list(task.preprocessors))]
  return hashlib.sha256(repr(made_from).encode()).hexdigest()


def _settings(value: object) -> object:
  """Returns what of a value prints the same in every process: numbers, strings, names of functions, containers."""
  if isinstance(value, dict):
    return {str(key): _settings(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_settings(item) for item in value]
  if isinstance(value, functools.partial):
    return [_settings(value.func), _settings(value.args), _settings(value.keywords)]
  if isinstance(value, (str, bytes, int, float, type(None))):
    return value
  return getattr(value, "__qualname__", type(value).__qualname__)


def _documents(examples: Iterable[dict]) -> Iterator[shards.Document]:
  for example in examples:
    names = next(names for names in FEATURES.values() if all(name in example for name in names))
    texts = [example.get(f"{name}_pretokenized") for name in names]
    ids = [token for name in names for token in example[name].tolist()]
    utf8_bytes = -1 if any(text is None for text in texts) else sum(len(text) for text in texts)
    yield shards.Document(ids, utf8_bytes, len(example["inputs"]) if "inputs" in names else 0)


def _read_together(todo: list[builder.Shard], num_shards: int, most: int) -> Iterator[list[builder.Shard]]:
  """Yields groups of shards, each of one job: where one reading of the source serves several, about `most`.

  They are a task's shards of some numbers, of all its splits: every reading parses all of the text.
  """
  for name, found in itertools.groupby(todo, key=lambda shard: shard.task):
    task, of_task = seqio.TaskRegistry.get(name), list(found)
    if tokenizing.is_direct(task) and task.source.deals_out(num_shards):
      together = max(1, min(most // len(task.splits), _READ_TOGETHER))
      for first in range(0, num_shards, together):
        if group := [shard for shard in of_task if first <= shard.index < first + together]:
          yield group
    else:
      yield from ([shard] for shard in of_task)


def _write_shards(partial: pathlib.Path, group: list[builder.Shard], num_shards: int, vocab_size: int) -> list[dict]:
  """Does one unit of work: shards of one split, of the same reading."""
  task, split = seqio.TaskRegistry.get(group[0].task), group[0].split
  if tokenizing.is_direct(task):
    return _write_directly(partial, group, num_shards, vocab_size)
  (shard,) = group
  examples = _examples(task, split, shard.index, num_shards).as_numpy_iterator()
  try:
    return [builder.write_shard(partial, shard, _documents(examples), vocab_size)]
  except tf.errors.OpError as error:
    raise _plain_error(error) from None


def _write_directly(partial: pathlib.Path, group: list[builder.Shard], num_shards: int, vocab_size: int) -> list[dict]:
  """Writes the shards of a task whose strings are encoded without TensorFlow."""
  task = seqio.TaskRegistry.get(group[0].task)
  if not task.source.deals_out(num_shards):
    (shard,) = group
    examples = task.source.examples(shard.split, seqio.ShardInfo(shard.index, num_shards))
    return [builder.write_shard(partial, shard, tokenizing.documents(task, examples), vocab_size)]
  with contextlib.ExitStack() as stack:
    writers = {
      (shard.split, shard.index): stack.enter_context(builder.writing_shard(partial, shard, vocab_size))
      for shard in group
    }
    destinations: collections.deque[shard_writer.ShardWriter] = collections.deque()

    def wanted() -> Iterator[tokenizing.Strings]:
      """Yields the examples of these shards, and notes where each one's document goes."""
      seen = collections.Counter[str]()
      for split, example in task.source.all_examples():
        if writer := writers.get((split, seen[split] % num_shards)):
          destinations.append(writer)
          yield example
        seen[split] += 1

    for document in tokenizing.documents(task, wanted()):
      destinations.popleft().add(document)
  return [writer.record for writer in writers.values()]


def _plain_error(error: tf.errors.OpError) -> Exception:
  """Turns an error inside tf.data into one that other processes can read: the InputError it began as, if it did."""
  message = error.message or str(error)
  for line in message.splitlines():
    _, marker, text = line.partition("InputError: ")
    if marker:
      return errors.InputError(text)
  return RuntimeError(message)
