"""Tasks: what is asked of a model, and how it is scored, as GLM-130B's evaluation writes it down in YAML.

Keys may be written with underscores or hyphens; those that are not known are left out, and said. `module` may name one
of the original's own classes. A task's files are those that its patterns match, in groups that are reported apart.
"""

import dataclasses
import difflib
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from glmjax import errors
from glmjax import ranges
from glmjax.harness import reading
from glmjax.harness import template
from glmjax.io import paths
from glmjax.io import user_yaml

_SUFFIXES = (".yaml", ".yml")
_log = logging.getLogger("glmjax")

CHOICES, GENERATION, LANGUAGE_MODEL = "mul", "gen", "lm"


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a type or a module of the original's means."""

  type: str
  metrics: tuple[str, ...]  # unless the task names others
  own_metrics: bool = False  # whatever the task names
  by_length: bool = False  # the best choice is that of the best mean over its tokens (StereoSet)
  overall: bool = False  # all files together are reported, too (MMLU)
  first_word: bool = False  # what is generated counts up to its first word's end (LAMBADA)
  by_record: bool = False  # a text is a record of a JSON lines file, not a whole file (Pile)
  needs: tuple[str, ...] = ()  # fields of each record that its metric reads


KINDS = {
  CHOICES: Kind(CHOICES, ("Accuracy",)),
  GENERATION: Kind(GENERATION, ("EM", "F1")),
  LANGUAGE_MODEL: Kind(LANGUAGE_MODEL, ("PPL",)),
  "tasks.mmlu.task.MMLU": Kind(CHOICES, ("Accuracy",), overall=True),
  "tasks.ethnic.stereoset.tasks.StereoSetTask": Kind(
    CHOICES, ("SS_ICAT",), own_metrics=True, by_length=True, needs=("bias_type", "goal_label")
  ),
  "tasks.ethnic.crows-pair.tasks.CrowsPairTask": Kind(
    CHOICES, ("CP",), own_metrics=True, needs=("bias_type", "pair_ID", "sent_ID")
  ),
  "tasks.lambada.task.LAMBADA": Kind(GENERATION, ("Accuracy",), own_metrics=True, first_word=True),
  "tasks.language-modeling.pile.Pile": Kind(LANGUAGE_MODEL, ("BPB",), own_metrics=True, by_record=True),
}
METRICS = {
  CHOICES: ("Accuracy", "F1_mul", "Precision", "Recall"),
  GENERATION: ("EM", "F1", "ROUGE-1", "ROUGE-2", "ROUGE-L"),
  LANGUAGE_MODEL: ("PPL",),
}  # those that a task may name; a module's own are its own


@dataclasses.dataclass(frozen=True)
class Task:
  """One task. Defaults are the original's (evaluation/configs.py)."""

  name: str
  type: str
  path: str
  module: str | None = None
  metrics: tuple[str, ...] = ()
  use_task_mask: bool = False  # [gMASK] in place of [MASK]
  use_multitask_encoding: bool = False
  unidirectional: bool = False
  max_seq_length: int = 2048
  file_pattern: str | Mapping[str, str | Sequence[str]] = "**/*.json*"
  micro_batch_size: int = 1  # what its beams' lengths depend on
  sampling_strategy: str = "BaseStrategy"
  num_beams: int = 4
  length_penalty: float = 1.0
  no_repeat_ngram_size: int = 3
  min_gen_length: int = 0
  max_gen_length: int = 128
  generation_length: int = 256
  num_samples: int = 0  # continuations that are drawn of each text; 0: the likeliest one alone
  top_p: float = 1.0  # of these: only the likeliest tokens that together reach this probability
  version: int | str = 0  # of prompts and data, for the record
  reader: str | Mapping[str, Any] = "jsonl"  # harness/reading.py
  prompt: Mapping[str, Any] | None = None  # harness/template.py; None: records are questions already
  num_shots: int = 0  # examples with their answers before each question
  # The files that they are drawn from; None: the question's own. A table: what to replace in the name of that.
  shots_pattern: str | Mapping[str, str] | None = None
  shots_seed: int = 0
  shots_separator: str = "\n\n"

  def __post_init__(self) -> None:
    _check(self)

  @property
  def kind(self) -> Kind:
    """What the task's type or module means."""
    return KINDS[self.module or self.type]

  @property
  def searches(self) -> bool:
    """Whether answers are found by beam search."""
    return self.sampling_strategy == "BeamSearchStrategy"

  @property
  def patterns(self) -> dict[str, list[str]]:
    """The patterns of each group."""
    groups = {"all": self.file_pattern} if isinstance(self.file_pattern, str) else self.file_pattern
    return {name: list(own) if isinstance(own, list | tuple) else [own] for name, own in groups.items()}

  def files(self, data: pathlib.Path, skip: bool = False) -> dict[str, list[pathlib.Path]]:
    """Returns the files of each group, in the order of their names; `skip`: groups without one are left out.

    Raises:
      errors.InputError: for a folder or a group that has none, unless they are to be left out.
    """
    folder, found, missing = data / self.path, {}, []
    for group, patterns in self.patterns.items():
      files: set[pathlib.Path] = set()
      for pattern in patterns:
        try:
          matches = {path for path in folder.glob(pattern) if path.is_file()}
        except (ValueError, NotImplementedError) as error:
          raise errors.InputError(f"task {self.name}: file_pattern {pattern!r}: {errors.one_line(error)}") from None
        if not matches:
          missing.append(f"nothing in {folder} is called {pattern} (group {group})")
        files |= matches
      if files:
        found[group] = sorted(files)
    if not folder.is_dir():
      missing = [f"there is no folder {folder}: give --data the folder that holds it"]
    for each in missing:
      if not skip:
        raise errors.InputError(f"task {self.name}: {each}")
      _log.warning("task %s: left out: %s", self.name, each)
    return found


def read(path: paths.Named) -> Task:
  """Reads a task's file.

  Raises:
    errors.InputError: for a file that is no task.
  """
  path = pathlib.Path(path)
  return of(user_yaml.read(path, "the task", "name: lambada"), str(path))


def of(content: Mapping[Any, Any], where: str) -> Task:
  """Returns the task that a YAML file's content describes; `where` begins errors.

  Raises:
    errors.InputError: for a key that is missing, and values of other types or out of range.
  """
  values = {str(key).replace("-", "_"): value for key, value in content.items()}
  known = {field.name: field for field in dataclasses.fields(Task)}
  if unknown := sorted({*values} - {*known}):
    _log.warning("%s: no key of a task: %s; left out", where, ", ".join(unknown)[:200])
  for name in ("name", "type", "path"):
    if name not in values:
      raise errors.InputError(f"{where}: the key {name} is missing")
  metrics = values.get("metrics")
  if metrics is not None:
    values["metrics"] = tuple(metrics) if isinstance(metrics, list) else metrics
  own = {name: value for name, value in values.items() if name in known and value is not None}
  try:
    json.dumps(own, allow_nan=False)
  except (TypeError, ValueError) as error:
    raise errors.InputError(f"{where}: what JSON cannot say: {errors.one_line(error)}; put dates in quotes") from None
  try:
    return Task(**own)
  except errors.InputError as error:
    raise errors.InputError(f"{where}: {error}") from None


def _check(task: Task) -> None:
  """Raises InputError for values of other types, or that go with no task."""
  for field in dataclasses.fields(Task):
    value = getattr(task, field.name)
    wanted = _TYPES.get(field.type)
    if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
      raise errors.InputError(f"{field.name} is {value!r}: {field.type} is needed")
  if task.type not in METRICS:
    raise errors.InputError(f"type is {task.type!r}: one of {', '.join(METRICS)} is needed")
  if task.module is not None and task.module not in KINDS:
    raise errors.InputError(f"module {task.module!r} is none of the original's: {', '.join(_modules())}")
  if task.kind.type != task.type:
    raise errors.InputError(f"type is {task.type} and module {task.module} one of {task.kind.type}")
  if task.kind.own_metrics or not task.metrics:
    object.__setattr__(task, "metrics", task.kind.metrics)
  if unknown := [name for name in task.metrics if not task.kind.own_metrics and name not in METRICS[task.type]]:
    raise errors.InputError(f"no metric of type {task.type}: {unknown[0]!r}; there are {', '.join(METRICS[task.type])}")
  if task.unidirectional and not task.use_task_mask:
    raise errors.InputError("unidirectional goes with [gMASK] alone: add use_task_mask: true")
  if task.sampling_strategy not in ("BaseStrategy", "BeamSearchStrategy"):
    raise errors.InputError(f"sampling_strategy is {task.sampling_strategy!r}: BaseStrategy or BeamSearchStrategy")
  if task.num_samples and (task.type != GENERATION or task.searches or task.kind.first_word):
    raise errors.InputError("num_samples is of texts that are drawn: of type gen, without beams, and not LAMBADA's")
  ranges.number("top_p", task.top_p, above=0, most=1)
  for names, least in (_FROM_ONE, 1), (_FROM_ZERO, 0):
    for name in names:
      ranges.whole(name, getattr(task, name), least)
  if isinstance(task.shots_pattern, Mapping) and not all(
    isinstance(text, str) for item in task.shots_pattern.items() for text in item
  ):
    raise errors.InputError("shots_pattern is a pattern, or a table of what to replace in a file's name, and by what")
  reading.Reader.of(task.reader)
  if task.prompt is not None:
    template.Prompt.of(task.prompt)
  patterns = [text for group, own in task.patterns.items() for text in (group, *own)]
  if not patterns or not all(isinstance(text, str) for text in patterns):
    raise errors.InputError("file_pattern is a pattern, or a table of groups and their patterns")


_FROM_ONE = ("max_seq_length", "micro_batch_size", "num_beams", "max_gen_length", "generation_length")
_FROM_ZERO = ("num_samples", "num_shots", "shots_seed", "min_gen_length", "no_repeat_ngram_size")
_TYPES = {
  str: (str,),
  int: (int,),
  int | str: (int, str),
  float: (int, float),
  bool: (bool,),
  tuple[str, ...]: (tuple,),
  str | None: (str, type(None)),
  str | Mapping[str, str | Sequence[str]]: (str, Mapping),
  str | Mapping[str, str] | None: (str, Mapping, type(None)),
  str | Mapping[str, Any]: (str, Mapping),
  Mapping[str, Any] | None: (Mapping, type(None)),
}


def _modules() -> Sequence[str]:
  return [name for name in KINDS if "." in name]


def shipped() -> dict[str, pathlib.Path]:
  """Returns the files of the tasks that come with glmjax, by their names."""
  folder = paths.shipped("tasks", "tasks") / "evaluation"
  return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _shipped(name: str) -> list[pathlib.Path]:
  """Returns the file of a name, or those whose names begin with it: clue_en_afqmc of clue and of clue_en.

  Raises:
    errors.InputError: where there is none.
  """
  known = shipped()
  if found := [known[name]] if name in known else [known[each] for each in known if each.startswith(f"{name}_")]:
    return found
  groups = {"_".join(parts[:i]) for parts in (each.split("_") for each in known) for i in range(1, len(parts) + 1)}
  near = difflib.get_close_matches(name, groups, 3) or sorted({each.split("_")[0] for each in known})
  raise errors.InputError(f"no task, file or folder {name}; of tasks there are {', '.join(near)}")


def find(named: Sequence[paths.Named]) -> list[Task]:
  """Returns the tasks that are named, in the order of their names; each once.

  A name is a file's, a folder's, for all tasks below it, or that of a task that comes with glmjax, or the beginning of
  several's, as clue.

  Raises:
    errors.InputError: for a name that is none of these, and two tasks of one name.
  """
  files: dict[pathlib.Path, None] = {}
  for each in map(pathlib.Path, named):
    inside = sorted(path for path in each.rglob("*") if path.suffix in _SUFFIXES) if each.is_dir() else []
    if inside:
      files |= dict.fromkeys(inside)
    elif len(each.parts) == 1 and not each.is_file() and each.suffix not in _SUFFIXES:
      files |= dict.fromkeys(_shipped(each.name))
    elif each.is_dir():
      raise errors.InputError(f"there is no task (*.yaml) in {each}")
    else:
      files[each] = None
  tasks = [read(path) for path in files]
  names = [task.name for task in tasks]
  for path, name in zip(files, names):
    if names.count(name) > 1:
      raise errors.InputError(f"{path}: there is another task called {name}: rename one")
  return tasks
