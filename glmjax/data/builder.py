"""Builds a token cache so that its folder appears complete or not at all.

Work goes on in `CACHE.partial`; `progress/` in it holds the plan and one record for each finished shard. The
manifest is written when all shards are done, and then the folder gets its name. A killed run leaves a partial
folder from which the same command goes on; an existing cache is replaced only at the very end.
"""

import fcntl
import json
import os
import pathlib
import shutil
import typing
from collections.abc import Iterable

from glmjax.io import publish
from glmjax.io import seal
from glmjax import errors
from glmjax.data import shards


class Shard(typing.NamedTuple):
  """One unit of work: shard `index` of a task's split."""

  task: str
  split: str
  index: int
  stem: str  # its path inside the cache, without the ending


def make_plan(mixture: str, num_shards: int, tokenizer: dict, tasks: dict[str, dict]) -> dict:
  """What a cache will hold: the manifest without its results.

  Args:
    mixture: name of the mixture.
    num_shards: shards of each split.
    tokenizer: "fingerprint", "vocab_size" and "specials" (ids by name).
    tasks: for each name "kind" (text or instruction), "rate", and "splits": split -> {"source": fingerprint}.
  """
  return {"format": shards.FORMAT, "mixture": mixture, "num_shards": num_shards, "tokenizer": tokenizer,
          "tasks": tasks, "dtype": shards.token_dtype(tokenizer["vocab_size"])}


def all_shards(plan: dict) -> list[Shard]:
  """Every shard of the plan, in order."""
  count = plan["num_shards"]
  return [Shard(task, split, i, f"{task}/{split}-{i:05d}-of-{count:05d}")
          for task, about in sorted(plan["tasks"].items()) for split in sorted(about["splits"])
          for i in range(count)]


def write_shard(partial: pathlib.Path, shard: Shard, documents: Iterable[shards.Document],
                vocab_size: int) -> dict:
  """Writes one shard and then its record; any process may do it."""
  record = shards.write_shard(partial, shard.stem, documents, vocab_size)
  publish.write_json(_record_path(partial, shard), seal.seal(record))
  return record


class CacheBuilder:
  """One cache in the making, locked while open: write_shard what is `missing()`, then `finish()`."""

  def __init__(self, directory: str | os.PathLike, plan: dict, overwrite: bool = False) -> None:
    self.directory = pathlib.Path(directory).absolute()
    self.plan = json.loads(json.dumps(plan))  # as it will be read back
    self.partial = self.directory.with_name(self.directory.name + ".partial")
    self._old = self.directory.with_name(f".{self.directory.name}.replaced")
    self._overwrite = overwrite
    self.finished = False  # the folder already held what the plan asks for

  def __enter__(self) -> "CacheBuilder":
    try:
      self.partial.mkdir(parents=True, exist_ok=True)
      self._lock = os.open(self.partial, os.O_RDONLY)
    except OSError as error:
      raise errors.InputError(f"{self.directory}: cannot be made ({error.strerror}); "
                              "choose another folder") from error
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      self._prepare()
    except BlockingIOError:
      os.close(self._lock)
      raise errors.InputError(
          f"{self.directory}: another process is making this cache; wait for it") from None
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *unused: object) -> None:
    if self.partial.is_dir() and not any(self.partial.iterdir()):
      self.partial.rmdir()
    os.close(self._lock)

  def missing(self) -> list[Shard]:
    """The shards that are not there yet; those that are have been checked against their checksums."""
    if self.finished or (self.partial / shards.MANIFEST).exists():
      return []
    return [
        shard for shard in all_shards(self.plan) if _read_record(self.partial, shard, contents=True) is None
    ]

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
    if self._old.exists() and not self.directory.exists():
      os.rename(self._old, self.directory)
    self._check_existing()
    if self.finished:
      return
    progress = self.partial / "progress"
    if any(self.partial.iterdir()):
      if not progress.is_dir() and not (self.partial / shards.MANIFEST).exists():
        raise errors.InputError(f"{self.partial}: is in the way and not ours; move it away")
      found = _read_plan(self.partial)
      if found is not None and _describe(found) != _describe(self.plan) and not self._overwrite:
        raise errors.InputError(f"{self.partial}: an unfinished cache of {_describe(found)}, not of "
                                f"{_describe(self.plan)}; finish it, delete it, or pass --overwrite")
      if found is None or not _same(found, self.plan):  # of text that has changed since, say
        _empty(self.partial)
    progress.mkdir(exist_ok=True)
    for leftover in self.partial.rglob("*.tmp"):
      leftover.unlink(missing_ok=True)
    publish.write_json(progress / "plan.json", seal.seal(self.plan))

  def _check_existing(self) -> None:
    """Refuses a folder that holds something else; notes one that already holds what is asked for."""
    if not self.directory.exists() or (self.directory.is_dir() and not any(self.directory.iterdir())):
      return
    if not (self.directory / shards.MANIFEST).exists():
      raise errors.InputError(f"{self.directory}: exists and is not a token cache; choose another folder")
    if self._overwrite:
      return
    manifest = shards.read_manifest(self.directory)
    found = _plan_of(manifest)
    if not _same(found, self.plan):
      raise errors.InputError(
          f"{self.directory}: already a cache of {_describe(found)}, not of "
          f"{_describe(self.plan)} on the same text; choose another folder, or pass --overwrite")
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
        with shards.replacing(folder / path.name) as file:
          file.write(path.read_bytes())
        records.append(file.record)
    return records

  def _swap(self) -> None:
    """Puts the finished folder in place of whatever has its name."""
    try:
      if self.directory.exists():
        shutil.rmtree(self._old, ignore_errors=True)
        os.rename(self.directory, self._old)
      os.rename(self.partial, self.directory)
    except OSError as error:  # a mount point, say
      raise errors.InputError(f"{self.directory}: cannot be replaced ({error.strerror}); all is done and "
                              f"kept in {self.partial}: rename that to where you want it") from error
    publish.sync(self.directory.parent)
    shutil.rmtree(self._old, ignore_errors=True)


def _record_path(partial: pathlib.Path, shard: Shard) -> pathlib.Path:
  return partial / "progress" / (shard.stem.replace("/", "--") + ".json")


def _read_record(partial: pathlib.Path, shard: Shard, contents: bool) -> dict | None:
  """A finished shard's entry for the manifest, None if unfinished or damaged; `contents` reads it all."""
  try:
    record = seal.unseal(json.loads(_record_path(partial, shard).read_bytes()))
  except (OSError, ValueError, AttributeError):  # an older glmjax's have no seal
    return None
  folder = (partial / shard.stem).parent
  return None if any(shards.check_file(folder, file, contents) for file in shards.shard_files(record)) else record


def _empty(folder: pathlib.Path) -> None:
  for path in folder.iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _plan_of(manifest: dict) -> dict:
  """The plan that a manifest was made from."""
  tasks = {}
  for name, task in manifest["tasks"].items():
    splits = {split: {"source": about["source"]} for split, about in task["splits"].items()}
    tasks[name] = {**task, "splits": splits}
  tokenizer = {key: value for key, value in manifest["tokenizer"].items() if key != "files"}
  return {**manifest, "tasks": tasks, "tokenizer": tokenizer}


def _read_plan(partial: pathlib.Path) -> dict | None:
  """The plan of an unfinished folder; None if it has none yet."""
  try:
    if (partial / shards.MANIFEST).exists():
      return _plan_of(shards.read_manifest(partial))
    plan = seal.unseal(json.loads((partial / "progress" / "plan.json").read_bytes()), required=False)
    _describe(plan)
    return plan
  except (OSError, ValueError, AttributeError, KeyError, TypeError):
    return None


def _same(a: dict, b: dict) -> bool:
  """Whether two plans give the same tokens: rates do not matter."""
  def without_rates(plan: dict) -> dict:
    return {**plan, "tasks": {name: {**task, "rate": None} for name, task in plan["tasks"].items()}}
  return without_rates(a) == without_rates(b)


def _describe(plan: dict) -> str:
  return (f"mixture {plan['mixture']} (tokenizer {plan['tokenizer']['fingerprint'][:8]}, "
          f"{plan['num_shards']} shards, tasks {', '.join(sorted(plan['tasks']))})")
