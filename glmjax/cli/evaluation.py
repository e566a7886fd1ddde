"""The evaluate command with --tasks, and compare: tasks put to a model, and what came of it."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import glmjax
from glmjax import errors, ranges
from glmjax.cli import hosts, inference
from glmjax.io import folders, lock, paths, progress, publish

if TYPE_CHECKING:
  from glmjax import tokenizer as tokenizer_lib
  from glmjax.checkpoint import folder as folder_lib
  from glmjax.harness import asking
  from glmjax.harness import task as task_lib

_TOKENS = 1 << 16  # of the items that are put to the model before their records are written


@dataclasses.dataclass(frozen=True)
class Items:
  """Which items are asked."""

  limit: int | None = None  # the first so many of each file
  skip: bool = False  # what has no file, or no room in the model, is left out, and said; else it is a mistake

  def __post_init__(self) -> None:
    if self.limit is not None:
      ranges.whole("limit", self.limit, 1)


def evaluate(
  checkpoint: paths.Named,
  tasks: Sequence[paths.Named],
  data: paths.Named,
  out: paths.Named,
  overwrite: bool = False,
  items: Items = Items(),
  devices: inference.Devices = inference.Devices(),
) -> dict[str, Any]:
  """Puts tasks to a model, and writes what came of it: each item's record, and a report.

  Args:
    checkpoint: a training run's or an exported model's folder.
    tasks: names of tasks that come with glmjax, YAML files of tasks, and folders of such.
    data: folder in which the tasks' paths are.
    out: folder for items.jsonl, run.json, report.json and report.md. One that a stopped run left is gone on with.
    overwrite: whether the records there are dropped.
    items: which are asked.
    devices: where the model lies.

  Returns:
    what report.json holds.

  Raises:
    errors.InputError: for what is wrong with tasks, data or `out`, before the model is loaded.
  """
  from glmjax.checkpoint import load
  from glmjax.harness import asking, gathering, task as task_lib

  devices.prepare()
  folder, target = inference.model_folder(checkpoint), _local(out)
  found = task_lib.find(tasks)
  config, tokenizer = _read(folder)
  asked = gathering.gather(config.model, tokenizer, found, _local(data), items.limit, items.skip)
  data_fingerprint = gathering.fingerprint(asked)
  hosts.check_same(data_fingerprint, "the tasks and their data")
  run = {
    "model": _called(folder, devices.adapter),
    "checkpoint": str(folder),
    "weights": load.fingerprint(folder),
    "tokenizer": tokenizer.fingerprint,
    "dtype": config.model.dtype,
    "bits": config.export.get("bits"),
    **devices.noted(),
    "glmjax": glmjax.__version__,
    "limit": items.limit,
    "skip": items.skip,
    "tasks": {task.name: dataclasses.asdict(task) | {"metrics": list(task.metrics)} for task in found},
    "data": data_fingerprint,
  }  # so that a number can be made again
  with contextlib.ExitStack() as stack:
    writer = stack.enter_context(_Writer.opened(target, run, overwrite)) if hosts.is_first() else None
    if left := hosts.from_first(lambda: [i for i, each in enumerate(asked) if each.key not in writer.records]):
      model = devices.load(folder)
      _ask(asking.Asker(model), [asked[i] for i in left], writer)
    return hosts.from_first(lambda: writer.report(found, asked))


def _local(path: paths.Named) -> pathlib.Path:
  """Returns a folder on a disk.

  Raises:
    errors.InputError: for one in a bucket.
  """
  found = paths.named(path)
  if not isinstance(found, pathlib.Path):
    raise errors.InputError(f"{path}: tasks' data and records are on a disk: name a folder there")
  return found


def _read(folder: paths.Path) -> "tuple[folder_lib.FolderConfig, tokenizer_lib.Tokenizer]":
  """Returns what a model's folder says of it, and its tokenizer; without its weights."""
  from glmjax import tokenizer as tokenizer_lib
  from glmjax.checkpoint import folder as folder_lib

  config = folder_lib.read_config(folder)
  folder_lib.check_tokenizer(folder, config)
  if not (folder / folder_lib.TOKENIZER).is_dir():
    raise errors.InputError(f"{folder} has no tokenizer: copy there, as tokenizer/, the one that it was trained with")
  return config, tokenizer_lib.Tokenizer.load(folder / folder_lib.TOKENIZER)


def _called(folder: paths.Path, adapter: paths.Named | None) -> str:
  """Returns what tables call a model: its folder's name, and its adapter's."""
  name = folders.called(folder, "--checkpoint")
  return name if adapter is None else f"{name} with {folders.called(adapter, '--adapter')}"


def _ask(asker: "asking.Asker", left: "Sequence[asking.Asked]", writer: "_Writer | None") -> None:
  """Puts items to the model, those of like length together, and writes their records as they come.

  How far it is a bar says, or where that is not shown a line a minute.
  """
  told, tokens = progress.Progress(len(left), "items asked", seconds=60), sum(each.tokens for each in left)
  done = read = 0
  with progress.bar(total=len(left), desc="evaluate", unit=" items", disable=None) as bar:
    for some in _portions(left):
      records = asker.ask(some)
      if writer is not None:
        writer.write(records)
      bar.update(len(some))
      done, read = done + len(some), read + sum(each.tokens for each in some)
      if bar.disable and writer is not None:
        told.at(done, read / tokens)


def _portions(asked: "Sequence[asking.Asked]") -> "Iterator[list[asking.Asked]]":
  """Yields items of like length, the longest first, _TOKENS tokens or so at a time."""
  some, tokens = [], 0
  for each in sorted(asked, key=lambda each: -each.tokens):
    some.append(each)
    tokens += each.tokens
    if tokens >= _TOKENS:
      yield some
      some, tokens = [], 0
  if some:
    yield some


class _Writer:
  """The folder of a run that this process writes."""

  def __init__(self, folder: pathlib.Path, run: Mapping[str, Any], records: dict[Any, dict[str, Any]], file: Any):
    self.records = records
    self._folder, self._run, self._file = folder, run, file

  @classmethod
  @contextlib.contextmanager
  def opened(cls, folder: pathlib.Path, run: Mapping[str, Any], overwrite: bool) -> "Iterator[_Writer]":
    """Yields the writer of a folder that no other process writes."""
    from glmjax.harness import results

    folder = folder.absolute()
    with publish.parent(folder), lock.held(lock.beside(folder), f"another process is writing {folder}"):
      records = results.begin(folder, run, overwrite)
      with (folder / results.ITEMS).open("ab", buffering=0) as file:
        yield cls(folder, run, records, file)

  def write(self, records: Sequence[dict[str, Any]]) -> None:
    """Adds records to the run's file.

    Raises:
      errors.InputError: when it cannot be written; the records before stay.
    """
    from glmjax.harness import results

    try:
      results.append(self._file, records)
    except OSError as error:
      raise errors.InputError(
        f"cannot write {self._file.name}: {errors.reason(error)}; the same command goes on"
      ) from error
    self.records |= {results.key(record): results.counted(record) for record in records}

  def report(self, tasks: "Sequence[task_lib.Task]", asked: "Sequence[asking.Asked]") -> dict[str, Any]:
    """Writes the report of all items, and returns it."""
    from glmjax.harness import report, results

    found = report.make(tasks, [self.records[each.key] for each in asked])
    whole = {"run": {**self._run, "items": len(asked)}, "tasks": found}
    publish.write_json(self._folder / results.REPORT, whole)
    publish.write_text(self._folder / results.PAGE, report.markdown(whole["run"], found, tasks))
    return whole


def show(result: Mapping[str, Any]) -> None:
  """Prints a table of the figures."""
  print("task                            metric          value   95 % interval      items")
  for task, own in result["tasks"].items():
    for metric, figure in own["figures"].items():
      interval = f"{figure['low']:.2f} to {figure['high']:.2f}"
      print(f"{task:<31} {metric:<13} {figure['value']:>7.2f}   {interval:<18} {figure['items']:,}")


def show_comparison(result: Mapping[str, Any]) -> None:
  """Prints a comparison as a table in Markdown."""
  from glmjax.harness import compare

  print(compare.markdown(result))
