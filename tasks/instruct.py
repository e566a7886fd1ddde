"""Instruction tasks: pairs of inputs and targets from JSONL files."""

from collections.abc import Mapping, Sequence
import functools
import os

import seqio

from glmjax import errors
from glmjax.data import text
from glmjax.tasks import preprocessors
from glmjax.tasks import sources
from glmjax.tasks import vocabulary as vocabulary_lib

MIXTURE = "instruct"
# GLM-130B cut each T0 data set to so many samples (paper, appendix C.1); one set must not drown the others.
MAX_EXAMPLES = 100_000


def register(
    files: Mapping[str, str | Sequence[str]], tokenizer: str | os.PathLike,
    rates: Mapping[str, float] | None = None, max_examples: Mapping[str, int] | int = MAX_EXAMPLES,
    fields: Sequence[Sequence[str]] = text.INSTRUCTION_FIELDS, mixture: str = MIXTURE,
) -> str:
  """Registers instruct_<name> for every set of files, and a mixture of them; returns the mixture's name.

  Args:
    files: for each name its .jsonl files, folders or globs.
    tokenizer: tokenizer folder.
    rates: shares of the samples by name; None: all alike.
    max_examples: pairs taken of each set, or of each by name; every file gives an equal part.
    fields: (inputs field, targets field) pairs; the first that a record has is taken.
    mixture: the mixture's name.
  """
  for given, what in ((rates, "rates"), (max_examples, "max_examples")):
    if isinstance(given, Mapping) and set(given) != set(files):
      raise errors.InputError(f"instruct.register: {what} are given for {sorted(given)}, and the files are "
                              f"for {sorted(files)}; give one for each")
  vocabulary = vocabulary_lib.GLMVocabulary(tokenizer)
  weighted = []
  for name, patterns in files.items():
    cap = max_examples[name] if isinstance(max_examples, Mapping) else max_examples
    task = register_task(name, patterns, vocabulary, cap, fields)
    weighted.append((task, rates[name] if rates else 1.0))
  seqio.MixtureRegistry.remove(mixture)
  seqio.MixtureRegistry.add(mixture, weighted)
  return mixture


def register_task(
    name: str, patterns: str | Sequence[str], vocabulary: vocabulary_lib.GLMVocabulary,
    max_examples: int = MAX_EXAMPLES, fields: Sequence[Sequence[str]] = text.INSTRUCTION_FIELDS,
) -> str:
  """Registers instruct_<name>, in place of any before it, and returns that name."""
  task = f"instruct_{name}"
  seqio.TaskRegistry.remove(task)
  seqio.TaskRegistry.add(
      task,
      source=sources.FileSource(patterns, ["inputs", "targets"],
                                functools.partial(text.file_instructions, fields=fields), max_examples),
      preprocessors=[
          seqio.preprocessors.tokenize,
          seqio.CacheDatasetPlaceholder(),
          preprocessors.fill_features,
      ],
      output_features=preprocessors.output_features(vocabulary))
  return task
