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
    rates: Mapping[str, float] | None = None, instructions: instruct.Sets | None = None,
    instruction_share: float = INSTRUCTION_SHARE,
    max_examples: Mapping[str, int] | int = instruct.MAX_EXAMPLES,
    field: str = "text", mixture: str = MIXTURE,
) -> str:
  """Registers pretrain_<language> and instruct_<name> for every language and instruction set, and a mixture.

  Args:
    files: for each language ("en", "zh", ...) its .jsonl or .txt files, folders or globs.
    tokenizer: tokenizer folder.
    rates: shares of the samples by language and instruction set; or by language alone, of what the sets
      leave; None: languages alike.
    instructions: the instruction sets, as instruct.named_sets takes them: by name, a list, or a folder.
    instruction_share: of all samples, where `rates` have none for the sets: they share it by size.
    max_examples: pairs taken of each instruction set, or that by name or pattern, the first that fits.
    field: of a .jsonl record, where the text is.
    mixture: the mixture's name.

  Returns:
    The mixture's name. What was registered under the same names before is replaced.
  """
  sets = instruct.named_sets(instructions) if instructions else {}
  _check(list(files), list(sets), rates, instruction_share)
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
  sizes = instruct.register_sets(sets, vocabulary, max_examples) if sets else {}
  names |= {name: f"instruct_{name}" for name in sizes}
  rates = _rates(list(files), sizes, rates, instruction_share)
  seqio.MixtureRegistry.remove(mixture)
  seqio.MixtureRegistry.add(mixture, [(names[name], rate) for name, rate in rates.items() if rate])
  return mixture


def _check(
    languages: list[str], instructions: list[str], rates: Mapping[str, float] | None, share: float
) -> None:
  names = languages + instructions
  if not languages or len(set(names)) < len(names):
    raise errors.InputError(f"pretrain.register: {names}: give at least one language, and no name twice")
  if not 0 < share < 1:
    raise errors.InputError(f"pretrain.register: instruction_share is {share}: give a number between 0 and 1")
  if rates is None:
    return
  if set(rates) not in (set(names), set(languages)):
    raise errors.InputError(f"pretrain.register: rates are given for {sorted(rates)}, and the files are for "
                            f"{sorted(names)}; give one rate for each, or for each language")
  if any(rate < 0 for rate in rates.values()) or not any(rates.values()):
    raise errors.InputError(
        f"pretrain.register: rates {dict(rates)}: each must be 0 or more, and one above 0")


def _rates(
    languages: list[str], sizes: Mapping[str, int], rates: Mapping[str, float] | None, share: float
) -> dict[str, float]:
  """Shares by language and instruction set, whose numbers of pairs are `sizes`."""
  if rates is not None and set(rates) == {*languages, *sizes}:
    return dict(rates)
  of_languages = rates or dict.fromkeys(languages, 1.0)
  text_share = 1 - share if sizes else 1
  return ({name: text_share * rate / sum(of_languages.values()) for name, rate in of_languages.items()}
          | {name: share * size / sum(sizes.values()) for name, size in sizes.items()})
