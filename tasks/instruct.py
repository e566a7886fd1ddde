"""Instruction tasks: pairs of inputs and targets from JSONL files, a task for each data set."""

from collections.abc import Mapping, Sequence
import fnmatch
import functools
import glob
import os
import pathlib
import re

import seqio

from glmjax import errors
from glmjax.io import paths as paths_lib
from glmjax.data import instructions
from glmjax.data import text
from glmjax.data import tokenizing
from glmjax.tasks import preprocessors
from glmjax.tasks import sources
from glmjax.tasks import vocabulary as vocabulary_lib

MIXTURE = "instruct"
# GLM-130B cut each T0 data set to so many samples (paper, appendix C.1); one set must not drown the others.
MAX_EXAMPLES = 100_000

Sets = Mapping[str, text.Patterns] | text.Patterns


def register(
  files: Sets,
  tokenizer: str | os.PathLike,
  rates: Mapping[str, float] | None = None,
  max_examples: Mapping[str, int] | int = MAX_EXAMPLES,
  fields: Sequence[Sequence[str]] = instructions.FIELDS,
  mixture: str = MIXTURE,
) -> str:
  """Registers instruct_<name> for every data set, and a mixture of them; returns the mixture's name.

  Args:
    files: the sets, as `named_sets` takes them.
    tokenizer: tokenizer folder.
    rates: shares of the samples by name; None: by size, after the caps.
    max_examples: pairs taken of each set, or that by name or pattern ("deepstruct_*"), the first that fits.
    fields: (inputs field, targets field) pairs; the first that a record has is taken.
    mixture: the mixture's name.
  """
  sets = named_sets(files)
  if rates is not None and set(rates) != set(sets):
    raise errors.InputError(
      f"instruct.register: rates are given for {sorted(rates)}, and the files are for {sorted(sets)}; give one for each"
    )
  sizes = register_sets(sets, vocabulary_lib.GLMVocabulary(tokenizer), max_examples, fields)
  seqio.MixtureRegistry.remove(mixture)
  seqio.MixtureRegistry.add(
    mixture, [(f"instruct_{name}", rates[name] if rates else float(size)) for name, size in sizes.items()]
  )
  return mixture


def named_sets(files: Sets) -> dict[str, text.Patterns]:
  """Returns the data sets by name.

  Args:
    files: for each name its .jsonl files, folders or globs; or a list of files and folders, each a set that
      bears its name (a glob: each of its matches); or one folder, each file and folder in it a set.

  Raises:
    errors.InputError: when there is none, or two of one name; when one that is named (no glob's match) is not there.
  """
  advice = "give .jsonl files, one JSON object a line, or folders of them"
  if isinstance(files, Mapping):
    for name, patterns in files.items():
      if not isinstance(name, str) or not re.fullmatch(r"[\w.]{1,100}", name):
        raise errors.InputError(
          f"instruction set {str(name)[:60]!r}: use up to 100 letters, digits, _ and . in its name"
        )
      if not text.are_patterns(patterns):
        raise errors.InputError(f"instruction set {name}: its files are {str(patterns)[:60]!r}: {advice}")
    return dict(files)
  if not text.are_patterns(files):
    raise errors.InputError(f"the instruction sets are {str(files)[:60]!r}: {advice}")
  if isinstance(files, (str, os.PathLike)):
    folder = paths_lib.local(files, "the folder of the instruction sets")
    files = [folder / "*"] if folder.is_dir() else [folder]
  paths: list[pathlib.Path] = []
  for pattern in (paths_lib.local(each, "the path of an instruction set") for each in files):
    if glob.has_magic(str(pattern)):
      paths += filter(_is_set, sorted(map(pathlib.Path, glob.glob(str(pattern)))))
    elif pattern.exists() and _is_set(pattern):
      paths.append(pattern)
    else:
      wrong = "is neither" if pattern.exists() else "does not exist"
      raise errors.InputError(f"instruction set {pattern} {wrong}: {advice}")
  if not paths:
    raise errors.InputError(f"no instruction set among {', '.join(map(str, files))[:200] or 'no files'}: {advice}")
  sets: dict[str, text.Patterns] = {}
  for path in paths:
    name = re.sub(r"\W", "_", path.stem if path.suffix == ".jsonl" else path.name)[:100]
    if sets.setdefault(name, str(path)) != str(path):
      raise errors.InputError(f"two instruction sets have the name {name}: {sets[name]} and {path}; rename one")
  return sets


def _is_set(path: pathlib.Path) -> bool:
  return path.is_dir() or path.suffix == ".jsonl"


def register_sets(
  sets: Mapping[str, text.Patterns],
  vocabulary: vocabulary_lib.GLMVocabulary,
  max_examples: Mapping[str, int] | int = MAX_EXAMPLES,
  fields: Sequence[Sequence[str]] = instructions.FIELDS,
) -> dict[str, int]:
  """Registers instruct_<name> for each set, in place of any before it; returns how many pairs each has."""
  caps = _caps(list(sets), max_examples)
  sizes = {}
  for name, patterns in sets.items():
    task = f"instruct_{name}"
    seqio.TaskRegistry.remove(task)
    source = sources.FileSource(
      patterns, ["inputs", "targets"], functools.partial(instructions.file_instructions, fields=fields), caps[name]
    )
    sizes[name] = source.num_input_examples("train")
    if not sizes[name]:
      raise errors.InputError(f"instruction set {name} ({source.files[0]}) holds no pair; remove it, or fill it")
    seqio.TaskRegistry.add(
      task,
      source=source,
      preprocessors=[tokenizing.tokenize, seqio.CacheDatasetPlaceholder(), preprocessors.fill_features],
      output_features=preprocessors.output_features(vocabulary),
    )
  return sizes


def _caps(names: list[str], max_examples: Mapping[str, int] | int) -> dict[str, int]:
  """Returns how many examples of each set are taken at most."""
  if not isinstance(max_examples, Mapping):
    max_examples = {"*": max_examples}
  fits = {name: [cap for pattern, cap in max_examples.items() if fnmatch.fnmatchcase(name, pattern)] for name in names}
  without = [name for name, caps in fits.items() if not caps]
  unknown = [name for name in max_examples if name not in names and not glob.has_magic(name)]
  if without or unknown:
    what = f"there is no set {unknown[0]!r}" if unknown else f"none fits {without[0]!r}"
    raise errors.InputError(
      f"max_examples are given for {sorted(max_examples)}, and {what}; the sets are {sorted(names)}"
    )
  if any(cap < 1 for caps in fits.values() for cap in caps):
    raise errors.InputError(f"max_examples {dict(max_examples)}: give 1 or more")
  return {name: caps[0] for name, caps in fits.items()}
