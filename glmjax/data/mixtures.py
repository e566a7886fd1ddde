"""Mixtures for the token cache, and those of text files: a task for each language and each instruction set.

A mixture of text files needs neither seqio nor TensorFlow; glmjax.tasks registers the same with seqio.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import logging
from typing import Protocol

from glmjax import errors
from glmjax import ranges
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import file_tasks
from glmjax.data import filters as filters_lib
from glmjax.data import instruction_sets
from glmjax.data import instructions as instructions_lib
from glmjax.data import preferences
from glmjax.data import shards
from glmjax.data import splits as splits_lib
from glmjax.data import text
from glmjax.data import tokenized
from glmjax.io import paths

PRETRAINING = "pretrain_bilingual"  # names of the mixtures
INSTRUCTION = "instruct"
PREFERENCE = "prefer"
JOINED = "joined"
INSTRUCTION_SHARE = 0.05  # of the samples, where no rates are given; GLM-130B paper, section 2.2
STATED = ("license", "source")  # of the text of a task
_log = logging.getLogger("glmjax")


class Task(Protocol):
  """What the cache asks of a task, be it of files (file_tasks.FileTask) or seqio's (seqio_tasks.SeqioTask)."""

  @property
  def name(self) -> str:
    """Its name, and that of its folder in the cache."""

  @property
  def kind(self) -> str:
    """A key of tokenizing.FEATURES."""

  @property
  def splits(self) -> Sequence[str]:
    """Names of its splits."""

  @property
  def windows(self) -> splits_lib.Windows | None:
    """How documents are cut, where whole ones would leave nothing held out."""

  @property
  def paths(self) -> Sequence[paths.Path]:
    """The files that are not read by TensorFlow."""

  def notes(self) -> Mapping[str, object]:
    """Returns what the manifest has of it beside its splits."""

  def files(self) -> list[str]:
    """Returns the files that it reads."""

  def file_hash(self, name: str) -> str:
    """Returns the sha256 of one of them."""

  def fingerprint(self, split: str, hashes: Mapping[str, str]) -> str:
    """Hashes what the tokens of a split are made from; `hashes` stand for the contents of files."""

  def deals_out(self, num_shards: int) -> bool:
    """Tells whether one reading of `all_examples` serves several shards: example i of a split is in i modulo their
    number.
    """

  def documents(
    self, tokenizer: tokenizer_lib.Tokenizer, split: str, index: int, num_shards: int
  ) -> Iterator[shards.Document]:
    """Yields the documents of shard `index` of a split."""


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Tasks, and the share of the samples that each gives, by its name."""

  name: str
  tokenizer: tokenizer_lib.Tokenizer
  tasks: tuple[Task, ...]
  rates: Mapping[str, float]
  prefers: bool = False  # whether its rows are pairs of answers, for a loss of loop.train.preference

  def task(self, name: str) -> Task:
    """Returns the task of that name."""
    return next(task for task in self.tasks if task.name == name)


def pretraining(
  files: Mapping[str, text.Patterns],
  tokenizer: paths.Named,
  rates: Mapping[str, float] | None = None,
  instructions: instruction_sets.Sets | None = None,
  instruction_share: float = INSTRUCTION_SHARE,
  max_examples: Mapping[str, int] | int = instruction_sets.MAX_EXAMPLES,
  field: str = "text",
  name: str = PRETRAINING,
  filters: Sequence[filters_lib.Filter] = (),
  stated: Mapping[str, Mapping[str, str]] | None = None,
) -> Mixture:
  """Returns the mixture of pretrain_<language> and instruct_<name> for every language and instruction set.

  Args:
    files: for each language ("en", "zh", ...) its .jsonl or .txt files, folders or globs.
    tokenizer: tokenizer folder.
    rates: shares of the samples by language and instruction set; or by language alone, of what the sets
      leave; None: languages alike. They follow the files: a language without one has the mean of the others' rates,
      and those of languages without files are left out, as are those of a rate of 0.
    instructions: the instruction sets, as instruction_sets.named_sets takes them: by name, a list, or a folder.
    instruction_share: of all samples, where `rates` have none for the sets: they share it by size.
    max_examples: pairs taken of each instruction set, or that by name or pattern, the first that fits.
    field: of a .jsonl record, where the text is.
    name: the mixture's name.
    filters: what is done with the documents of each language, in this order; none: nothing.
    stated: for languages and instruction sets what their owners state, "license" and "source"; a cache's manifest has
      it, and nothing depends on it.
  """
  text.check_corpora(files)
  sets = instruction_sets.named_sets(instructions) if instructions else {}
  _check(list(files), list(sets), rates, instruction_share)
  _check_field("pretraining: field", field)
  filters_lib.check(filters)
  stated = _checked_statements("pretraining", stated, [*files, *sets])
  loaded = tokenizer_lib.Tokenizer.load(tokenizer)
  tasks = {
    language: _text_task(language, patterns, field, filters, stated.get(language))
    for language, patterns in files.items()
  }
  pairs = _instruction_tasks(sets, max_examples, instructions_lib.FIELDS, instructions_lib.HISTORY, stated)
  shares = _rates(list(files), {name: task.sizes["train"] for name, task in pairs.items()}, rates, instruction_share)
  return _mixture(name, loaded, tasks | pairs, shares)


def instruction(
  files: instruction_sets.Sets,
  tokenizer: paths.Named,
  rates: Mapping[str, float] | None = None,
  max_examples: Mapping[str, int] | int = instruction_sets.MAX_EXAMPLES,
  fields: Sequence[Sequence[str]] = instructions_lib.FIELDS,
  name: str = INSTRUCTION,
  history: str = instructions_lib.HISTORY,
  stated: Mapping[str, Mapping[str, str]] | None = None,
) -> Mixture:
  """Returns the mixture of instruct_<name> for every instruction set.

  Args:
    files: the sets, as `instruction_sets.named_sets` takes them.
    tokenizer: tokenizer folder.
    rates: shares of the samples by name; None: by size, after the caps. Sets of a rate of 0 are left out.
    max_examples: records taken of each set, or that by name or pattern ("deepstruct_*"), the first that fits.
    fields: (inputs field, targets field) pairs; the first that a record has is taken, else its "messages".
    name: the mixture's name.
    history: field of the rounds before, [[question, answer], ...]; a record may do without.
    stated: as of `pretraining`.
  """
  sets = instruction_sets.named_sets(files)
  if rates is not None:
    _check_rates("mixtures.instruction", rates)
    if set(rates) != set(sets):
      raise errors.InputError(
        f"mixtures.instruction: rates are given for {sorted(rates)}, and the files are for {sorted(sets)}; give one "
        "for each"
      )
    _check_some("mixtures.instruction", rates)
  _check_fields("instruction", fields, instructions_lib.FIELDS[0])
  _check_field("instruction: history", history)
  loaded = tokenizer_lib.Tokenizer.load(tokenizer)
  tasks = _instruction_tasks(sets, max_examples, fields, history, _checked_statements("instruction", stated, [*sets]))
  shares = rates or {name: float(task.sizes["train"]) for name, task in tasks.items()}
  return _mixture(name, loaded, tasks, shares)


def preference(
  files: instruction_sets.Sets,
  tokenizer: paths.Named,
  max_examples: Mapping[str, int] | int = instruction_sets.MAX_EXAMPLES,
  fields: Sequence[Sequence[str]] = preferences.FIELDS,
  history: str = instructions_lib.HISTORY,
  name: str = PREFERENCE,
) -> Mixture:
  """Returns the mixture of prefer_<name> for every set of questions with a chosen and a rejected answer, by size.

  Args:
    files: the sets, as `instruction_sets.named_sets` takes them.
    tokenizer: tokenizer folder.
    max_examples: records taken of each set, or that by name or pattern, the first that fits.
    fields: (question, chosen, rejected) fields; the first that a record has are taken, unless its answers are messages.
    history: field of the rounds before, [[question, answer], ...]; a record may do without.
    name: the mixture's name.
  """
  sets = instruction_sets.named_sets(files)
  _check_fields("preference", fields, preferences.FIELDS[0])
  _check_field("preference: history", history)
  loaded = tokenizer_lib.Tokenizer.load(tokenizer)
  read = functools.partial(preferences.file_preferences, fields=fields, history=history)
  most = instruction_sets.caps(list(sets), max_examples)
  tasks = {
    of_set: file_tasks.FileTask(f"prefer_{of_set}", tokenized.PREFERENCE, patterns, read, most[of_set])
    for of_set, patterns in sets.items()
  }
  for task in tasks.values():
    _check_filled(task)
  shares = {of_set: float(task.sizes["train"]) for of_set, task in tasks.items()}
  return _mixture(name, loaded, tasks, shares, prefers=True)


def joined(parts: Sequence[Mixture], shares: Sequence[float], name: str = JOINED) -> Mixture:
  """Returns one mixture of several: what is to be learned, and some of what is not to be forgotten.

  Args:
    parts: mixtures of one tokenizer, whose tasks have different names.
    shares: of the samples, for each part; within it, its tasks share as they did.
    name: the mixture's name.
  """
  if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(part, Mixture) for part in parts):
    raise errors.InputError(
      f"mixtures.joined: parts are {str(parts)[:100]}: give a list of what mixtures.instruction(...) and "
      "mixtures.pretraining(...) return (in a gin file with () at their ends)"
    )
  if not isinstance(shares, (list, tuple)) or len(shares) != len(parts):
    raise errors.InputError(
      f"mixtures.joined: shares are {str(shares)[:100]}: give a number for each of {len(parts)} parts"
    )
  for part, share in zip(parts, shares):
    ranges.number(f"mixtures.joined: the share of {part.name}", share, 0)
    if part.prefers != parts[0].prefers:
      raise errors.InputError("mixtures.joined: it joins pairs of answers and others: a run learns from either")
    if part.tokenizer != parts[0].tokenizer:
      raise errors.InputError(f"mixtures.joined: {parts[0].name} and {part.name} have different tokenizers")
  tasks, rates = [], {}
  for part, share in zip(parts, shares):
    total = sum(part.rates.values())
    for task in part.tasks:
      if task.name in rates:
        raise errors.InputError(f"mixtures.joined: two tasks are named {task.name}: give one's files another name")
      rates[task.name] = share * part.rates[task.name] / total
      tasks.append(task)
  _check_some("mixtures.joined", rates)
  return _mixture(name, parts[0].tokenizer, {task.name: task for task in tasks}, rates, parts[0].prefers)


def _mixture(
  name: str,
  tokenizer: tokenizer_lib.Tokenizer,
  tasks: Mapping[str, Task],
  rates: Mapping[str, float],
  prefers: bool = False,
) -> Mixture:
  """Returns the mixture of those tasks whose rates are above 0; both by the same names."""
  if not isinstance(name, str) or not name:
    raise errors.InputError(f"the mixture's name is {str(name)[:60]}: give a text")
  taken = {tasks[key]: float(rate) for key, rate in rates.items() if rate}
  return Mixture(name, tokenizer, tuple(taken), {task.name: rate for task, rate in taken.items()}, prefers)


def _text_task(
  language: str,
  patterns: text.Patterns,
  field: str,
  filters: Sequence[filters_lib.Filter],
  stated: Mapping[str, str] | None,
) -> file_tasks.FileTask:
  found = text.find_files(patterns)
  read = text.reader(found, field)
  return file_tasks.FileTask(f"pretrain_{language}", "text", found, read, filters=filters, stated=stated)


def _instruction_tasks(
  sets: Mapping[str, text.Patterns],
  max_examples: Mapping[str, int] | int,
  fields: Sequence[Sequence[str]],
  history: str,
  stated: Mapping[str, Mapping[str, str]],
) -> dict[str, file_tasks.FileTask]:
  """Returns the tasks by their sets' names; none without pairs."""
  if not sets:
    return {}
  most = instruction_sets.caps(list(sets), max_examples)
  other = {} if history == instructions_lib.HISTORY else {"history": history}  # caches of before knew no other
  read = functools.partial(instructions_lib.file_instructions, fields=fields, **other)
  tasks = {}
  for name, patterns in sets.items():
    tasks[name] = task = file_tasks.FileTask(
      f"instruct_{name}", "instruction", patterns, read, most[name], stated=stated.get(name)
    )
    _check_filled(task)
  return tasks


def _check_filled(task: file_tasks.FileTask) -> None:
  if not task.sizes["train"]:
    raise errors.InputError(f"the set {task.name} ({task.paths[0]}) holds no pair; remove it, or fill it")


def _check(languages: list[str], sets: list[str], rates: Mapping[str, float] | None, share: float) -> None:
  names = languages + sets
  if len(set(names)) < len(names):
    raise errors.InputError(f"mixtures.pretraining: {names}: no name twice, of languages and instruction sets")
  ranges.number("mixtures.pretraining: instruction_share", share, above=0, below=1)
  if rates is not None:
    _check_rates("mixtures.pretraining", rates)


def _check_rates(mixture: str, rates: Mapping[str, float]) -> None:
  if not isinstance(rates, Mapping) or not all(isinstance(name, str) for name in rates):
    raise errors.InputError(f"{mixture}: rates are {str(rates)[:100]}: give a number, 0 or more, for each by its name")
  for name, rate in rates.items():
    ranges.number(f"{mixture}: the rate of {name[:100]}", rate, 0)


def _check_some(mixture: str, rates: Mapping[str, float]) -> None:
  if not any(rates.values()):
    raise errors.InputError(f"{mixture}: rates {dict(rates)}: one must be above 0")


def _check_fields(mixture: str, fields: Sequence[Sequence[str]], example: tuple[str, ...]) -> None:
  """Raises InputError where `fields` is no list of as many names as the example has."""
  several = fields if isinstance(fields, (list, tuple)) else []
  if not several or not all(
    isinstance(each, (list, tuple)) and len(each) == len(example) and all(isinstance(name, str) for name in each)
    for each in several
  ):
    raise errors.InputError(
      f"mixtures.{mixture}: fields are {str(fields)[:100]}: give {len(example)} names each, as {[list(example)]}"
    )


def _checked_statements(
  mixture: str, stated: Mapping[str, Mapping[str, str]] | None, names: Sequence[str]
) -> Mapping[str, Mapping[str, str]]:
  """Returns what is stated of languages and sets.

  Raises:
    errors.InputError: where a name is of none, or something else than license and source is stated.
  """
  for name, each in (stated or {}).items():
    if name not in names:
      raise errors.InputError(f"mixtures.{mixture}: stated is something of {name[:60]!r}: there are {', '.join(names)}")
    if not isinstance(each, Mapping) or not all(key in STATED and isinstance(own, str) for key, own in each.items()):
      raise errors.InputError(
        f'mixtures.{mixture}: stated of {name} is {str(each)[:60]}: give {{"license": "...", "source": "..."}}, or one'
      )
  return stated or {}


def _check_field(what: str, name: object) -> None:
  if not isinstance(name, str):
    raise errors.InputError(f"mixtures.{what} is {str(name)[:60]}: give the name of a field")


def _rates(
  languages: list[str], sizes: Mapping[str, int], rates: Mapping[str, float] | None, share: float
) -> dict[str, float]:
  """Returns shares by language and instruction set, whose numbers of pairs are `sizes`."""
  given = {} if rates is None else dict(rates)
  of_sets = {name: given[name] for name in sizes if name in given}
  if of_sets and of_sets.keys() != sizes.keys():
    raise errors.InputError(
      f"mixtures.pretraining: rates are given for the instruction sets {sorted(of_sets)}, and the "
      f"sets are {sorted(sizes)}; give one for each, or for languages alone"
    )
  known = [given[language] for language in languages if language in given]
  of_languages = {language: given.get(language, sum(known) / len(known) if known else 1.0) for language in languages}
  _check_some("mixtures.pretraining", of_languages | of_sets)
  _say_if_other(languages, given, of_languages, sizes)
  if of_sets or given and not sizes:  # as they are given
    return of_languages | of_sets
  text_share = 1 - share if sizes else 1
  total = sum(of_languages.values())
  return {name: text_share * rate / total for name, rate in of_languages.items()} | {
    name: share * size / sum(sizes.values()) for name, size in sizes.items()
  }


def _say_if_other(
  languages: list[str], given: Mapping[str, float], used: Mapping[str, float], sizes: Mapping[str, int]
) -> None:
  """Tells which rates are used where those given are for other names: it may be a misspelling."""
  if given and {*languages} != given.keys() - sizes.keys():
    _log.warning(
      "mixtures.pretraining: the rates are for %s and the text is %s; used are %s",
      ", ".join(given),
      ", ".join(languages),
      ", ".join(f"{name} {rate:g}" for name, rate in used.items()),
    )
