"""Builds a token cache so that its folder appears complete or not at all.

Work goes on in `CACHE.partial`; `progress/` in it holds the plan and one record for each finished shard. The
manifest is written when all shards are done, and then the folder gets its name. A killed run leaves a partial
folder from which the same command goes on; an existing cache is replaced only at the very end.

In a bucket, where nothing can be renamed, all this is in the folder itself, which is no cache until the manifest, its
last object, is there. A cache that is replaced loses its manifest first.
"""

import contextlib
import functools
import json
import pathlib
import typing
from collections.abc import Iterable, Iterator

from glmjax import errors
from glmjax.data import shard_writer
from glmjax.data import shards
from glmjax.io import together
from glmjax.io import bucket_path
from glmjax.io import folders
from glmjax.io import lease
from glmjax.io import lock
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import seal


_STATED = ("rate", "license", "source")  # of a task: what no token depends on


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
    tasks: for each name "kind" (text or instruction), "rate", where they are stated "license" and "source", where
      there are any "filters", and "splits": split -> {"source": fingerprint}.
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
def writing_shard(partial: paths.Path, shard: Shard, vocab_size: int) -> Iterator[shard_writer.ShardWriter]:
  """Yields a writer of one shard, and then writes its record; any process may do it."""
  with shard_writer.writing_shard(partial, shard.stem, vocab_size) as writer:
    yield writer
    lease.check()  # before the shard's files take their names
  publish.write_json(_record_path(partial, shard), seal.seal(writer.record))


def write_shard(partial: paths.Path, shard: Shard, documents: Iterable[shards.Document], vocab_size: int) -> dict:
  """Writes one shard and then its record, which is returned."""
  with writing_shard(partial, shard, vocab_size) as writer:
    for document in documents:
      writer.add(document)
  return writer.record


class CacheBuilder:
  """One cache in the making, locked while open: write_shard what is `missing()`, then `finish()`."""

  def __init__(self, directory: paths.Named, plan: dict, overwrite: bool = False) -> None:
    self.directory = folders.claim(directory, folders.Kind.CACHE, "directory")
    self.plan = json.loads(json.dumps(plan))  # as it will be read back
    self._in_bucket = isinstance(self.directory, bucket_path.BucketPath)
    self.partial = (
      self.directory if self._in_bucket else self.directory.with_name(self.directory.name + ".partial")
    )  # where work goes on
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
    if isinstance(self.partial, pathlib.Path):
      with contextlib.suppress(OSError):
        self.partial.rmdir()

  def missing(self) -> list[Shard]:
    """Returns the shards that are not there yet; those that are have been checked against their checksums.

    In a bucket against their sizes, of one listing, and their records' seals: an object is there whole or not at all,
    its bytes were compared with a checksum when it was sent, and the reader compares each block.
    """
    if self.finished or (self.partial / shards.MANIFEST).exists():
      return []
    every = all_shards(self.plan)
    return [shard for shard, record in zip(every, self._records(every, contents=True)) if record is None]

  def finish(self, tokenizer_folder: pathlib.Path | None = None) -> shards.TokenCache:
    """Writes the manifest over all shards and gives the folder its name."""
    if not self.finished and not (self.partial / shards.MANIFEST).exists():
      shards.write_manifest(self.partial, self._manifest(tokenizer_folder))
    if self._in_bucket or not self.finished:  # whose writer may have been killed behind the manifest
      publish.remove(self.partial / "progress")
    if not self._in_bucket and not self.finished:
      self._swap()
    return shards.TokenCache.open(self.directory)

  def _records(self, every: list[Shard], contents: bool) -> list[dict | None]:
    """Returns the entries for the manifest of shards, as `_read_record` does."""
    if not self._in_bucket:
      return [_read_record(self.partial, shard, contents) for shard in every]
    sizes = shards.sizes_below(self.partial)
    read = functools.partial(_read_record, self.partial, contents=False, sizes=sizes)
    there = [shard for shard in every if _record_path(self.partial, shard) in sizes]
    found = dict(zip(there, together.each(read, there)))
    return [found.get(shard) for shard in every]

  def _prepare(self) -> None:
    """Settles what is on the disk already: an interrupted swap, a finished cache, an unfinished folder."""
    publish.put_back(self.directory)
    publish.sweep(self.directory)
    self._check_existing()
    if self.finished:
      return
    self.partial.mkdir(exist_ok=True)
    progress = self.partial / "progress"
    if self.partial.is_dir() and any(self.partial.iterdir()):
      if not progress.is_dir() and not (self.partial / shards.MANIFEST).exists():
        raise errors.InputError(f"{self.partial}: is in the way and not ours; move it away")
      replaces = self._in_bucket and (self.partial / shards.MANIFEST).exists()
      found = None if replaces else _read_plan(self.partial)
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
    publish.write_json(_plan_path(self.partial), seal.seal(self.plan))

  def _check_existing(self) -> None:
    """Refuses a folder that holds something else; notes one that already holds what is asked for."""
    folders.claim(self.directory, folders.Kind.CACHE, "directory", overwrite=self._overwrite)
    if self._overwrite or not self.directory.exists() or not any(self.directory.iterdir()):
      return
    path = self.directory / shards.MANIFEST
    version = {}
    if isinstance(path, bucket_path.BucketPath):
      if (there := path.bucket.find(path.key)) is None:  # a cache in the making
        return
      version = there.version
    manifest = shards.read_manifest(self.directory)
    found = _plan_of(manifest)
    if not _same(found, self.plan):
      raise errors.InputError(
        f"{self.directory}: already a cache of {_describe(found)}, not of "
        f"{_describe(self.plan)} on the same text; choose another folder, or pass --overwrite"
      )
    if found != self.plan:  # only what is stated differs: no token changes
      for task, about in manifest["tasks"].items():
        stated = {key: value for key, value in self.plan["tasks"][task].items() if key in _STATED}
        manifest["tasks"][task] = {key: value for key, value in about.items() if key not in _STATED} | stated
      publish.replace_json(path, seal.seal(manifest), version)
    self.finished = True

  def _manifest(self, tokenizer_folder: pathlib.Path | None) -> dict:
    manifest = json.loads(json.dumps(self.plan))
    manifest["tokenizer"]["files"] = self._copy_tokenizer(tokenizer_folder)
    for result in (split for task in manifest["tasks"].values() for split in task["splits"].values()):
      result["shards"] = []
    every = all_shards(self.plan)
    for shard, record in zip(every, self._records(every, contents=False)):
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


def _plan_path(partial: paths.Path) -> paths.Path:
  return partial / "progress" / "plan.json"


def _record_path(partial: paths.Path, shard: Shard) -> paths.Path:
  return partial / "progress" / (shard.stem.replace("/", "--") + ".json")


def _read_record(partial: paths.Path, shard: Shard, contents: bool, sizes: shards.Sizes | None = None) -> dict | None:
  """Reads a finished shard's entry for the manifest, None if unfinished or damaged; `contents` reads it all."""
  path = _record_path(partial, shard)
  try:
    record = seal.unseal(json.loads(path.read_bytes()))
  except (OSError, ValueError, AttributeError) as error:  # an older glmjax's have no seal
    if isinstance(error, OSError) and sizes is not None:
      raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error
    return None
  folder = (partial / shard.stem).parent
  files = shards.shard_files(record)
  return None if any(shards.check_file(folder, file, contents, sizes) for file in files) else record


def _empty(folder: paths.Path) -> None:
  """Deletes an unfinished cache's files; raises InputError when others are among them."""
  if strange := next(folders.strangers(folder, folders.Kind.CACHE), None):
    raise errors.InputError(f"{folder} holds {strange}, which is no part of a cache: move it away")
  if isinstance(folder, bucket_path.BucketPath):
    kept = _plan_path(folder)
    publish.write_json(kept, {})  # says of what a kill leaves that it is a cache's, and of no plan
    (folder / shards.MANIFEST).unlink()  # nobody takes for whole what is half deleted
    folder.bucket.delete([path.key for path in folder.rglob("*") if path != kept])
    return
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


def _read_plan(partial: paths.Path) -> dict | None:
  """Reads the plan of an unfinished folder; None if it has none yet."""
  try:
    if (partial / shards.MANIFEST).exists():
      return _plan_of(shards.read_manifest(partial))
    plan = seal.unseal(json.loads(_plan_path(partial).read_bytes()), required=False)
    _describe(plan)
    return plan
  except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
    if errors.may_pass(error):  # what cannot be read just now is not to be deleted
      raise
    return None


def _same(a: dict, b: dict) -> bool:
  """Tells whether two plans give the same tokens: rates, and what is stated of the text, do not matter."""

  def without_stated(plan: dict) -> dict:
    tasks = {
      name: {key: value for key, value in task.items() if key not in _STATED} for name, task in plan["tasks"].items()
    }
    return {**plan, "tasks": tasks}

  return without_stated(a) == without_stated(b)


def _describe(plan: dict) -> str:
  return (
    f"mixture {plan['mixture']} (tokenizer {plan['tokenizer']['fingerprint'][:8]}, "
    f"{plan['num_shards']} shards, tasks {', '.join(sorted(plan['tasks']))})"
  )
