"""Instruction tasks in seqio: those of glmjax.data.mixtures.instruction."""

from collections.abc import Mapping, Sequence

from glmjax.data import instruction_sets
from glmjax.data import instructions
from glmjax.data import mixtures
from glmjax.io import paths
from glmjax.tasks import registration


def register(
  files: instruction_sets.Sets,
  tokenizer: paths.Named,
  rates: Mapping[str, float] | None = None,
  max_examples: Mapping[str, int] | int = instruction_sets.MAX_EXAMPLES,
  fields: Sequence[Sequence[str]] = instructions.FIELDS,
  mixture: str = mixtures.INSTRUCTION,
  history: str = instructions.HISTORY,
  stated: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
  """Registers what `mixtures.instruction` makes of these arguments, and returns the mixture's name, `mixture`."""
  made = mixtures.instruction(files, tokenizer, rates, max_examples, fields, mixture, history, stated)
  return registration.register(made, tokenizer)
