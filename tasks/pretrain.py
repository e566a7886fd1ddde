"""Pretraining tasks: a text task for each language, instruction tasks beside them, and their mixture."""

from collections.abc import Mapping
import logging
import math
import os

import seqio

from glmjax import errors
from glmjax.data import text
from glmjax.data import tokenizing
from glmjax.tasks import instruct
from glmjax.tasks import preprocessors
from glmjax.tasks import sources
from glmjax.tasks import vocabulary as vocabulary_lib

MIXTURE = "pretrain_bilingual"
_log = logging.getLogger("glmjax")
INSTRUCTION_SHARE = 0.05  # of the samples, where no rates are given; GLM-130B paper, section 2.2


def register(
  files: Mapping[str, text.Patterns],
  tokenizer: str | os.PathLike,
  rates: Mapping[str, float] | None = None,
  instructions: instruct.Sets | None = None,
  instruction_share: float = INSTRUCTION_SHARE,
  max_examples: Mapping[str, int] | int = instruct.MAX_EXAMPLES,
  field: str = "text",
  mixture: str = MIXTURE,
) -> str:
  """Registers pretrain_<language> and instruct_<name> for every language and instruction set, and a mixture.

  Args:
    files: for each language ("en", "zh", ...) its .jsonl or .txt files, folders or globs.
    tokenizer: tokenizer folder.
    rates: shares of the samples by language and instruction set; or by language alone, of what the sets
      leave; None: languages alike. They follow the files: a language without one has the mean of the others' rates,
      and those of languages without files are left out.
    instructions: the instruction sets, as instruct.named_sets takes them: by name, a list, or a folder.
    instruction_share: of all samples, where `rates` have none for the sets: they share it by size.
    max_examples: pairs taken of each instruction set, or that by name or pattern, the first that fits.
    field: of a .jsonl record, where the text is.
    mixture: the mixture's name.

  Returns:
    The mixture's name. What was registered under the same names before is replaced.
  """
  text.check_corpora(files)
  sets = instruct.named_sets(instructions) if instructions else {}
  _check(list(files), list(sets), rates, instruction_share)
  vocabulary = vocabulary_lib.GLMVocabulary(tokenizer)
  names = {}
  for language, patterns in files.items():
    names[language] = f"pretrain_{language}"
    found = text.find_files(patterns)
    seqio.TaskRegistry.remove(names[language])
    seqio.TaskRegistry.add(
      names[language],
      source=sources.FileSource(found, ["text"], text.reader(found, field)),
      preprocessors=[
        tokenizing.tokenize,
        seqio.preprocessors.append_eos,
        seqio.CacheDatasetPlaceholder(),
        preprocessors.cut_windows,
        preprocessors.fill_features,
      ],
      output_features=preprocessors.output_features(vocabulary),
    )
  sizes = instruct.register_sets(sets, vocabulary, max_examples) if sets else {}
  names |= {name: f"instruct_{name}" for name in sizes}
  rates = _rates(list(files), sizes, rates, instruction_share)
  seqio.MixtureRegistry.remove(mixture)
  seqio.MixtureRegistry.add(mixture, [(names[name], rate) for name, rate in rates.items() if rate])
  return mixture


def _check(languages: list[str], sets: list[str], rates: Mapping[str, float] | None, share: float) -> None:
  names = languages + sets
  if len(set(names)) < len(names):
    raise errors.InputError(f"pretrain.register: {names}: no name twice, of languages and instruction sets")
  if not 0 < share < 1:
    raise errors.InputError(f"pretrain.register: instruction_share is {share}: give a number between 0 and 1")
  if rates is None:
    return
  if not isinstance(rates, Mapping) or not all(
    isinstance(rate, (int, float)) and math.isfinite(rate) and rate >= 0 for rate in rates.values()
  ):
    raise errors.InputError(f"pretrain.register: rates {str(rates)[:100]}: give a number, 0 or more, for each language")


def _rates(
  languages: list[str], sizes: Mapping[str, int], rates: Mapping[str, float] | None, share: float
) -> dict[str, float]:
  """Returns shares by language and instruction set, whose numbers of pairs are `sizes`."""
  given = {} if rates is None else dict(rates)
  of_sets = {name: given[name] for name in sizes if name in given}
  if of_sets and of_sets.keys() != sizes.keys():
    raise errors.InputError(
      f"pretrain.register: rates are given for the instruction sets {sorted(of_sets)}, and the "
      f"sets are {sorted(sizes)}; give one for each, or for languages alone"
    )
  known = [given[language] for language in languages if language in given]
  of_languages = {language: given.get(language, sum(known) / len(known) if known else 1.0) for language in languages}
  if not any((of_languages | of_sets).values()):
    raise errors.InputError(f"pretrain.register: rates {given}: one must be above 0")
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
      "pretrain.register: the rates are for %s and the text is %s; used are %s",
      ", ".join(given),
      ", ".join(languages),
      ", ".join(f"{name} {rate:g}" for name, rate in used.items()),
    )
