"""Pretraining tasks: a text task for each language, instruction tasks beside them, and their mixture."""

from collections.abc import Mapping, Sequence
import functools
import os

import seqio

from glmjax import errors
from glmjax.data import text
from glmjax.tasks import instruct
from glmjax.tasks import preprocessors
from glmjax.tasks import sources
from glmjax.tasks import vocabulary as vocabulary_lib

MIXTURE = "pretrain_bilingual"
INSTRUCTION_SHARE = 0.05  # of the samples, where no rates are given; GLM-130B paper, section 2.2


def register(
    files: Mapping[str, str | Sequence[str]], tokenizer: str | os.PathLike,
    rates: Mapping[str, float] | None = None, instructions: Mapping[str, str | Sequence[str]] | None = None,
    field: str = "text", mixture: str = MIXTURE,
) -> str:
  """Registers pretrain_<language> and instruct_<name> for every language and instruction set, and a mixture.

  Args:
    files: for each language ("en", "zh", ...) its .jsonl or .txt files, folders or globs.
    tokenizer: tokenizer folder.
    rates: shares of the samples by language and instruction set; None: languages alike, instructions 5 %.
    instructions: for each instruction set its .jsonl files.
    field: of a .jsonl record, where the text is.
    mixture: the mixture's name.

  Returns:
    The mixture's name. What was registered under the same names before is replaced.
  """
  instructions = instructions or {}
  rates = _rates(list(files), list(instructions), rates)
  vocabulary = vocabulary_lib.GLMVocabulary(tokenizer)
  names = {}
  for language, patterns in files.items():
    names[language] = f"pretrain_{language}"
    seqio.TaskRegistry.remove(names[language])
    seqio.TaskRegistry.add(
        names[language],
        source=sources.FileSource(patterns, ["text"], functools.partial(text.file_documents, field=field)),
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
            seqio.CacheDatasetPlaceholder(),
            preprocessors.cut_windows,
            preprocessors.fill_features,
        ],
        output_features=preprocessors.output_features(vocabulary))
  for name, patterns in instructions.items():
    names[name] = instruct.register_task(name, patterns, vocabulary)
  seqio.MixtureRegistry.remove(mixture)
  seqio.MixtureRegistry.add(mixture, [(names[name], rate) for name, rate in rates.items() if rate])
  return mixture


def _rates(
    languages: list[str], instructions: list[str], rates: Mapping[str, float] | None
) -> dict[str, float]:
  names = languages + instructions
  if not languages or len(set(names)) < len(names):
    raise errors.InputError(f"pretrain.register: {names}: give at least one language, and no name twice")
  if rates is None:
    share = INSTRUCTION_SHARE if instructions else 0
    return ({name: (1 - share) / len(languages) for name in languages}
            | {name: share / len(instructions) for name in instructions})
  if set(rates) != set(names):
    raise errors.InputError(f"pretrain.register: rates are given for {sorted(rates)}, and the files are for "
                            f"{sorted(names)}; give one rate for each")
  if any(rate < 0 for rate in rates.values()) or not any(rates.values()):
    raise errors.InputError(
        f"pretrain.register: rates {dict(rates)}: each must be 0 or more, and one above 0")
  return dict(rates)
