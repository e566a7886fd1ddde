"""Pretraining tasks in seqio: those of glmjax.data.mixtures.pretraining."""

from collections.abc import Mapping, Sequence

from glmjax.data import filters as filters_lib
from glmjax.data import instruction_sets
from glmjax.data import mixtures
from glmjax.data import text
from glmjax.io import paths
from glmjax.tasks import registration


def register(
  files: Mapping[str, text.Patterns],
  tokenizer: paths.Named,
  rates: Mapping[str, float] | None = None,
  instructions: instruction_sets.Sets | None = None,
  instruction_share: float = mixtures.INSTRUCTION_SHARE,
  max_examples: Mapping[str, int] | int = instruction_sets.MAX_EXAMPLES,
  field: str = "text",
  mixture: str = mixtures.PRETRAINING,
  filters: Sequence[filters_lib.Filter] = (),
  stated: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
  """Registers what `mixtures.pretraining` makes of these arguments, and returns the mixture's name, `mixture`."""
  made = mixtures.pretraining(
    files, tokenizer, rates, instructions, instruction_share, max_examples, field, mixture, filters, stated
  )
  return registration.register(made, tokenizer)
