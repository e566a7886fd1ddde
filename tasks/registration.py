"""Registers mixtures of text files with seqio."""

import seqio

from glmjax import errors
from glmjax.data import mixtures
from glmjax.data import seqio_tasks
from glmjax.io import paths
from glmjax.tasks import preprocessors
from glmjax.tasks import sources
from glmjax.tasks import vocabulary as vocabulary_lib


def register(mixture: mixtures.Mixture, tokenizer: paths.Named) -> str:
  """Registers a mixture and its tasks, in place of any before of their names; returns the mixture's name.

  Args:
    mixture: of text files, as `mixtures.pretraining` and `mixtures.instruction` make them.
    tokenizer: the folder that its tokenizer is from, which other processes (Beam's) must reach as well.
  """
  if mixture.prefers:
    raise errors.InputError("pairs of answers are no seqio task: runs read them when they begin (InMemoryMixture)")
  vocabulary = vocabulary_lib.GLMVocabulary(tokenizer)
  for task in mixture.tasks:
    before = [seqio_tasks.tokenize, seqio.CacheDatasetPlaceholder()]
    behind = [preprocessors.fill_features]
    if task.kind == "text":
      before.insert(1, seqio.preprocessors.append_eos)
      behind.insert(0, preprocessors.cut_windows)
    seqio.TaskRegistry.remove(task.name)
    seqio.TaskRegistry.add(
      task.name,
      source=sources.FileSource(task),
      preprocessors=[*before, *behind],
      output_features=preprocessors.output_features(vocabulary),
    )
  seqio.MixtureRegistry.remove(mixture.name)
  seqio.MixtureRegistry.add(mixture.name, list(mixture.rates.items()))
  return mixture.name
