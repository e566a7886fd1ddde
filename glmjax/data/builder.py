"""Builds a token cache so that its folder appears complete or not at all.

Work goes on in `CACHE.partial`; `progress/` in it holds the plan and one record for each finished shard. The
manifest is written when all shards are done, and then the folder gets its name. A killed run leaves a partial
folder from which the same command goes on; an existing cache is replaced only at the very end.
"""

import contextlib
import json
import os
import pathlib
import shutil
import typing
from collections.abc import Iterable, Iterator

from glmjax import errors
from glmjax.data import shard_writer
from glmjax.data import shards
from glmjax.io import folders
from glmjax.io import lock
from glmjax.io import publish
from glmjax.io import seal


class Shard(typing.NamedTuple):
  """One unit of work: shard `index` of a task's split."""

  task: str
  split: str
  index: int
  stem: str  # its path inside the cache, without the ending


def make_plan(mixture: str, num_shards: int, tokenizer: dict, tasks: dict[str, dict]) -> dict:
  """Plans what a cache will hold: returns the manifest without its results.

  Args:
    mixture: name of the mixture.
    num_shards: shards of each split.
    tokenizer: "fingerprint", "vocab_size" and "specials" (ids by name).
    tasks: for each name "kind" (text or instruction), "rate", and "splits": split -> {"source": fingerprint}.
  """
  return {
    "format": shards.FORMAT,
    "mixture": mixture,
    "num_shards": num_shards,
    "tokenizer": tokenizer,
    "tasks": tasks,
    "dtype": shards.token_dtype(tokenizer["vocab_size"]),
  }


def all_shards(plan: dict) -> list[Shard]:
  """Returns every shard of the plan, in order."""
  count = plan["num_shards"]
  return [
    Shard(task, split, i, f"{task}/{split}-{i:05d}-of-{count:05d}")
    for task, about in sorted(plan["tasks"].items())
    for split in sorted(about["splits"])
    for i in range(count)
  ]


@contextlib.contextmanager
def writing_shard(partial: pathlib.Path, shard: Shard, vocab_size: int) -> Iterator[shard_writer.ShardWriter]:
  """Yields a writer of one shard, and then writes its record; any process may do it."""
  with shard_writer.writing_shard(partial, shard.stem, vocab_size) as writer:
    yield writer
  publish.write_json(_record_path(partial, shard), seal.seal(writer.record))


def write_shard(partial: pathlib.Path, shard: Shard, documents: Iterable[shards.Document], vocab_size: int) -> dict:
  """Writes one shard and then its record, which is returned."""
  with writing_shard(partial, shard, vocab_size) as writer:
    for document in documents:
      writer.add(document)
  return writer.record


class CacheBuilder:
  """One cache in the making, locked while open: write_shard what is `missing()`, then `finish()`."""

  def __init__(self, directory: str | os.PathLike, plan: dict, overwrite: bool = False) -> None:
    self.directory = folders.claim(directory, folders.Kind.CACHE, "directory")
    self.plan = json.loads(json.dumps(plan))  # as it will be read back
    self.partial = self.directory.with_name(self.directory.name + ".partial")
    self._overwrite = overwrite
    self._open = contextlib.ExitStack()
    self.finished = False  # the folder already held what the plan asks for

  def __enter__(self) -> "CacheBuilder":
    with contextlib.ExitStack() as stack:
      stack.enter_context(publish.parent(self.directory))
      stack.enter_context(
        lock.held(lock.beside(self.directory), f"{self.directory}: another process is making this cache")
      )
      stack.callback(self._leave)
      try:
        self._prepare()
      except OSError as error:
        raise errors.InputError(
          f"{self.directory}: cannot be made ({errors.reason(error)}); choose another folder"
        ) from error
      self._open = stack.pop_all()
    return self

  def __exit__(self, *error: object) -> None:
    self._open.__exit__(*error)

  def _leave(self) -> None:
    """Removes a partial folder that nothing was put into."""
    with contextlib.suppress(OSError):
      self.partial.rmdir()

  def missing(self) -> list[Shard]:
    """Returns the shards that are not there yet; those that are have been checked against their checksums."""
    if self.finished or (self.partial / shards.MANIFEST).exists():
      return []
    return [shard for shard in all_shards(self.plan) if _read_record(self.partial, shard, contents=True) is None]

  def finish(self, tokenizer_folder: pathlib.Path | None = None) -> shards.TokenCache:
    """Writes the manifest over all shards and gives the folder its name."""
    if not self.finished:
      if not (self.partial / shards.MANIFEST).exists():
        shards.write_manifest(self.partial, self._manifest(tokenizer_folder))
      shutil.rmtree(self.partial / "progress", ignore_errors=True)
      self._swap()
    return shards.TokenCache.open(self.directory)

  def _prepare(self) -> None:
    """Settles what is on the disk already: an interrupted swap, a finished cache, an unfinished folder."""
    publish.put_back(self.directory)
    publish.sweep(self.directory)
    self._check_existing()
    if self.finished:
      return
    self.partial.mkdir(exist_ok=True)
    progress = self.partial / "progress"
    if any(self.partial.iterdir()):
      if not progress.is_dir() and not (self.partial / shards.MANIFEST).exists():
        raise errors.InputError(f"{self.partial}: is in the way and not ours; move it away")
      found = _read_plan(self.partial)
      if found is not None and _describe(found) != _describe(self.plan) and not self._overwrite:
        raise errors.InputError(
          f"{self.partial}: an unfinished cache of {_describe(found)}, not of "
          f"{_describe(self.plan)}; finish it, delete it, or pass --overwrite"
        )
      if found is None or not _same(found, self.plan):  # of text that has changed since, say
        _empty(self.partial)
    progress.mkdir(exist_ok=True)
    for leftover in self.partial.rglob(".*"):
      if publish.is_unfinished(leftover.name):
        publish.remove(leftover)
    publish.write_json(progress / "plan.json", seal.seal(self.plan))

  def _check_existing(self) -> None:
    """Refuses a folder that holds something else; notes one that already holds what is asked for."""
    folders.claim(self.directory, folders.Kind.CACHE, "directory", overwrite=self._overwrite)
    if self._overwrite or not self.directory.exists() or not any(self.directory.iterdir()):
      return
    manifest = shards.read_manifest(self.directory)
    found = _plan_of(manifest)
    if not _same(found, self.plan):
      raise errors.InputError(
        f"{self.directory}: already a cache of {_describe(found)}, not of "
        f"{_describe(self.plan)} on the same text; choose another folder, or pass --overwrite"
      )
    if found != self.plan:  # only the rates differ: no token changes
      for task, about in manifest["tasks"].items():
        about["rate"] = self.plan["tasks"][task]["rate"]
      shards.write_manifest(self.directory, manifest)
    self.finished = True

  def _manifest(self, tokenizer_folder: pathlib.Path | None) -> dict:
    manifest = json.loads(json.dumps(self.plan))
    manifest["tokenizer"]["files"] = self._copy_tokenizer(tokenizer_folder)
    for result in (split for task in manifest["tasks"].values() for split in task["splits"].values()):
      result["shards"] = []
    for shard in all_shards(self.plan):
      record = _read_record(self.partial, shard, contents=False)
      assert record is not None, f"{shard.stem} is not there"
      manifest["tasks"][shard.task]["splits"][shard.split]["shards"].append(record)
    for result in (split for task in manifest["tasks"].values() for split in task["splits"].values()):
      utf8_bytes = [record["utf8_bytes"] for record in result["shards"]]
      result["documents"] = sum(record["documents"] for record in result["shards"])
      result["tokens"] = sum(record["tokens"] for record in result["shards"])
      result["utf8_bytes"] = None if None in utf8_bytes else sum(utf8_bytes)
    return manifest

  def _copy_tokenizer(self, source: pathlib.Path | None) -> list[dict]:
    """Copies the tokenizer's files (a few MB) and returns their records."""
    folder = self.partial / "tokenizer"
    folder.mkdir(exist_ok=True)
    records = []
    for path in sorted(pathlib.Path(source).iterdir()) if source else []:
      if path.is_file():
        with shard_writer.replacing(folder / path.name) as file:
          file.write(path.read_bytes())
        records.append(file.record)
    return records

  def _swap(self) -> None:
    """Puts the finished folder in place of whatever has its name."""
    try:
      publish.put_in_place(self.partial, self.directory, self._overwrite)
    except OSError as error:  # a mount point, say
      raise errors.InputError(
        f"{self.directory}: cannot be replaced ({errors.reason(error)}); all is done and "
        f"kept in {self.partial}: rename that to where you want it"
      ) from error


def _record_path(partial: pathlib.Path, shard: Shard) -> pathlib.Path:
  return partial / "progress" / (shard.stem.replace("/", "--") + ".json")


def _read_record(partial: pathlib.Path, shard: Shard, contents: bool) -> dict | None:
  """Reads a finished shard's entry for the manifest, None if unfinished or damaged; `contents` reads it all."""
  try:
    record = seal.unseal(json.loads(_record_path(partial, shard).read_bytes()))
  except (OSError, ValueError, AttributeError):  # an older glmjax's have no seal
    return None
  folder = (partial / shard.stem).parent
  return None if any(shards.check_file(folder, file, contents) for file in shards.shard_files(record)) else record


def _empty(folder: pathlib.Path) -> None:
  """Deletes an unfinished cache's files; raises InputError when others are among them."""
  if strange := next(folders.strangers(folder, folders.Kind.CACHE), None):
    raise errors.InputError(f"{folder} holds {strange}, which is no part of a cache: move it away")
  for path in folder.iterdir():
    publish.remove(path)


def _plan_of(manifest: dict) -> dict:
  """Returns the plan that a manifest was made from."""
  tasks = {}
  for name, task in manifest["tasks"].items():
    splits = {split: {"source": about["source"]} for split, about in task["splits"].items()}
    tasks[name] = {**task, "splits": splits}
  tokenizer = {key: value for key, value in manifest["tokenizer"].items() if key != "files"}
  return {**manifest, "tasks": tasks, "tokenizer": tokenizer}


def _read_plan(partial: pathlib.Path) -> dict | None:
  """Reads the plan of an unfinished folder; None if it has none yet."""
  try:
    if (partial / shards.MANIFEST).exists():
      return _plan_of(shards.read_manifest(partial))
    plan = seal.unseal(json.loads((partial / "progress" / "plan.json").read_bytes()), required=False)
    _describe(plan)
    return plan
  except (OSError, ValueError, AttributeError, KeyError, TypeError):
    return None


def _same(a: dict, b: dict) -> bool:
  """Tells whether two plans give the same tokens: rates do not matter."""

  def without_rates(plan: dict) -> dict:
    return {**plan, "tasks": {name: {**task, "rate": None} for name, task in plan["tasks"].items()}}

  return without_rates(a) == without_rates(b)


def _describe(plan: dict) -> str:
  return (
    f"mixture {plan['mixture']} (tokenizer {plan['tokenizer']['fingerprint'][:8]}, "
    f"{plan['num_shards']} shards, tasks {', '.join(sorted(plan['tasks']))})"
  )
