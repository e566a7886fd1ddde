"""Builds a token cache so that its folder appears complete or not at all.

Work goes on in `CACHE.partial`; `progress/` in it holds the plan and one record for each finished shard. The manifest is
written when all shards are done, and then the folder gets its name. A killed run leaves a partial folder from which the
same command goes on; an existing cache is replaced only at the very end.
"""

import fcntl
import json
import os
import pathlib
import shutil
import typing

from glmjax import errors
from glmjax.data import shards


class Shard(typing.NamedTuple):
  """One unit of work: shard `index` of a task's split."""

  task: str
  split: str
  index: int
  stem: str


def make_plan(mixture: str, num_shards: int, tokenizer: dict, tasks: dict[str, dict]) -> dict:
  """What a cache will hold: the manifest without its results.

  Args:
    mixture: name of the mixture.
    num_shards: shards of each split.
    tokenizer: "fingerprint", "vocab_size" and "specials" (ids by name).
    tasks: for each name "kind" (text or instruction), "rate", and "splits": split name -> {"source": fingerprint}.
  """
  return {"format": shards.FORMAT, "mixture": mixture, "num_shards": num_shards, "tokenizer": tokenizer, "tasks": tasks,
          "dtype": shards.token_dtype(tokenizer["vocab_size"])}


class CacheBuilder:
  """One cache in the making: `missing()`, `write()` each, `finish()`. Hold it open while working (it locks)."""

  def __init__(self, directory: str | os.PathLike, plan: dict, overwrite: bool = False):
    self.directory = pathlib.Path(directory)
    self.plan = json.loads(json.dumps(plan))  # as it will be read back
    self.partial = self.directory.with_name(self.directory.name + ".partial")
    self._old = self.directory.with_name(self.directory.name + ".old")
    self._overwrite = overwrite

  def __enter__(self) -> "CacheBuilder":
    try:
      self.partial.parent.mkdir(parents=True, exist_ok=True)
      self._lock = open(self.directory.with_name(self.directory.name + ".lock"), "w")
    except OSError as error:
      raise errors.InputError(f"{self.directory}: cannot be made ({error.strerror}); choose another folder") from error
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._lock.close()
      raise errors.InputError(f"{self.directory}: another process is making this cache; wait for it") from error
    try:
      self._prepare()
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *unused: object) -> None:
    os.unlink(self._lock.name)
    self._lock.close()

  @property
  def finished(self) -> bool:
    """Whether the folder already holds what the plan asks for."""
    return (self.directory / shards.MANIFEST).exists() and _same(_plan_of(shards.read_manifest(self.directory)), self.plan)

  def missing(self) -> list[Shard]:
    """The shards that are not there yet, the finished ones having been checked against their checksums."""
    return [shard for shard in self.all_shards() if self._record(shard) is None]

  def all_shards(self) -> list[Shard]:
    """Every shard of the plan, in order."""
    count = self.plan["num_shards"]
    return [Shard(task, split, i, shards.shard_stem(task, split, i, count))
            for task, about in sorted(self.plan["tasks"].items()) for split in sorted(about["splits"]) for i in range(count)]

  def finish(self, tokenizer_folder: pathlib.Path | None) -> shards.TokenCache:
    """Writes the manifest over all shards and gives the folder its name."""
    if not (self.partial / shards.MANIFEST).exists():
      manifest = json.loads(json.dumps(self.plan))
      manifest["tokenizer"]["files"] = self._copy_tokenizer(tokenizer_folder)
      for task, about in manifest["tasks"].items():
        for split, result in about["splits"].items():
          records = [self._record(shard, contents=False) for shard in self.all_shards()
                     if (shard.task, shard.split) == (task, split)]
          assert all(records), f"{task} {split}: shards are missing"
          known = [record["utf8_bytes"] for record in records]
          result.update(shards=records, documents=sum(record["documents"] for record in records),
                        tokens=sum(record["tokens"] for record in records),
                        utf8_bytes=None if None in known else sum(known))
      shards.write_json(self.partial / shards.MANIFEST, manifest)
    shutil.rmtree(self.partial / "progress", ignore_errors=True)
    self._swap()
    return shards.TokenCache.open(self.directory)

  def _prepare(self) -> None:
    """Settles what is on the disk already: a finished cache, an interrupted swap, an unfinished folder."""
    if self._old.exists() and not self.directory.exists():
      os.rename(self._old, self.directory)
    if self.directory.exists() and not self._overwrite:
      _refuse_other(self.directory, self.plan)
    if self.directory.exists() and self.finished:
      return
    progress = self.partial / "progress"
    if self.partial.exists():
      found = _read_plan(self.partial)
      if found is not None and not _same(found, self.plan) and not self._overwrite:
        raise errors.InputError(f"{self.partial}: an unfinished cache of {_describe(found)}, not of "
                                f"{_describe(self.plan)}; finish it, delete it, or pass --overwrite")
      if found is None or not _same(found, self.plan):
        shutil.rmtree(self.partial)
    progress.mkdir(parents=True, exist_ok=True)
    for leftover in self.partial.rglob("*.tmp-*"):
      leftover.unlink(missing_ok=True)
    shards.write_json(progress / "plan.json", self.plan)

  def _record(self, shard: Shard, contents: bool = True) -> dict | None:
    """The entry of a finished shard; None if it is unfinished or damaged."""
    try:
      record = json.loads(self._record_path(shard).read_bytes())
    except (OSError, ValueError):
      return None
    folder = (self.partial / shard.stem).parent
    problems = [shards.check_file(folder, file, contents) for file in record["files"]]
    return None if any(problems) else record

  def _record_path(self, shard: Shard) -> pathlib.Path:
    return self.partial / "progress" / (shard.stem.replace("/", "--") + ".json")

  def write(self, shard: Shard, documents: typing.Iterable[shards.Document]) -> dict:
    """Writes one shard; any process may do it."""
    record = shards.write_shard(self.partial, shard.stem, documents, self.plan["tokenizer"]["vocab_size"])
    shards.write_json(self._record_path(shard), record)
    return record

  def _copy_tokenizer(self, source: pathlib.Path | None) -> list[dict]:
    folder = self.partial / "tokenizer"
    folder.mkdir(exist_ok=True)
    records = []
    for path in sorted(pathlib.Path(source).iterdir()) if source else []:
      if path.is_file():
        with shards.replacing(folder / path.name) as file:
          file.write(path.read_bytes())
        records.append(file.record)
    return records

  def _swap(self) -> None:
    """Puts the finished folder in place of whatever has its name."""
    if self.directory.exists():
      shutil.rmtree(self._old, ignore_errors=True)
      os.rename(self.directory, self._old)
    os.rename(self.partial, self.directory)
    shards.sync_folder(self.directory.parent)
    shutil.rmtree(self._old, ignore_errors=True)


def _plan_of(manifest: dict) -> dict:
  """The plan that a manifest was made from."""
  tasks = {name: {**task, "splits": {split: {"source": about["source"]} for split, about in task["splits"].items()}}
           for name, task in manifest["tasks"].items()}
  tokenizer = {key: value for key, value in manifest["tokenizer"].items() if key != "files"}
  return {**manifest, "tasks": tasks, "tokenizer": tokenizer}


def _read_plan(partial: pathlib.Path) -> dict | None:
  """The plan of an unfinished folder; None if it has none yet."""
  try:
    if (partial / shards.MANIFEST).exists():
      return _plan_of(shards.read_manifest(partial))
    return json.loads((partial / "progress" / "plan.json").read_bytes())
  except (OSError, ValueError):
    return None


def _same(a: dict, b: dict) -> bool:
  return a == b


def _describe(plan: dict) -> str:
  return (f"mixture {plan['mixture']} (tokenizer {plan['tokenizer']['fingerprint'][:8]}, {plan['num_shards']} shards, "
          f"tasks {', '.join(sorted(plan['tasks']))})")


def _refuse_other(directory: pathlib.Path, plan: dict) -> None:
  """Raises unless the folder is empty or holds a cache made from `plan`."""
  if directory.is_dir() and not any(directory.iterdir()):
    return
  if not (directory / shards.MANIFEST).exists():
    raise errors.InputError(f"{directory}: exists and is not a token cache; choose another folder")
  found = _plan_of(shards.read_manifest(directory))
  if not _same(found, plan):
    raise errors.InputError(f"{directory}: already a cache of {_describe(found)}, not of {_describe(plan)} on the same "
                            "text; choose another folder, or pass --overwrite")
