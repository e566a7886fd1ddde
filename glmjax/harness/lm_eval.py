"""lm_eval's tasks with a model in the same process.

  python -m glmjax.harness.lm_eval --model glmjax --model_args checkpoint=runs/mine --tasks ...

takes all that `lm_eval` takes. Log-likelihoods are those that `glmjax serve` gives it: of a text that is read from left
to right. With `both_sides=True` in --model_args a context is seen from both sides, and what follows fills the blank at
its end, as GLMs are evaluated: that is another, and mostly a better, figure.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api import model as model_lib
from lm_eval.api import registry

from glmjax import errors
from glmjax.infer import engine as engine_lib
from glmjax.infer import sampling as sampling_lib
from glmjax.infer import score as score_lib

_NEW_TOKENS = 256  # where a task does not say: lm_eval's own


class GLM(model_lib.LM):
  """A model as lm_eval asks it."""

  def __init__(self, checkpoint: str, mesh: str | None = None, both_sides: bool = False, **of_lm_eval: Any) -> None:
    """Loads a model.

    Args:
      checkpoint: a training run's or an exported model's folder.
      mesh: devices to split it over, as "tensor=4"; None: the first alone.
      both_sides: whether contexts are seen from both sides.
      **of_lm_eval: its batch size and device, which are settled here.
    """
    super().__init__()
    del of_lm_eval
    self._engine, self._both_sides = engine_lib.Engine.load(checkpoint, mesh=mesh), both_sides

  def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """Returns of each (context, continuation) the continuation's log-likelihood, and whether it is what greedy decoding
    would say.
    """
    del disable_tqdm
    rows, firsts = zip(*(self._row(*request.args) for request in requests), strict=True)
    found = self._engine.score_rows(rows)
    return [
      (float(score.log_probs[first:].sum()), bool(score.correct[first:].all())) for score, first in zip(found, firsts)
    ]

  def _row(self, context: str, continuation: str) -> tuple[score_lib.Row, int]:
    """Returns what is read, and where in its targets the continuation begins."""
    engine = self._engine
    before = len(engine.tokenizer.encode(context)) if context else 0
    ids = engine.tokenizer.encode(context + continuation)
    specials, kind, length = engine.tokenizer.specials, engine.config.position_kind, engine.config.max_length
    if len(ids) <= before:
      raise errors.InputError(f"a continuation adds no token ({continuation[:40]!r})")
    dropped = max(0, len(ids) + 1 - length)  # of the context, the oldest
    ids, before = ids[dropped:], max(0, before - dropped)
    if self._both_sides and before:
      blank = score_lib.with_blank(ids[:before], specials.gmask, specials, kind)
      blank = blank[max(0, len(blank) + len(ids) - before - length) :]
      return score_lib.target_row(blank, ids[before:], specials, kind), 0
    [row] = score_lib.window_rows(ids, specials, kind, max(len(ids) + 1, 2))
    return row, before

  def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
    """Returns each text's log-likelihood; one longer than the model is read in windows, as `glmjax score` has them."""
    del disable_tqdm
    return [score.total for score in self._engine.score([request.args[0] for request in requests])]

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
    """Returns what the model says behind each context, up to the first of the task's stop texts."""
    del disable_tqdm
    alike: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      alike.setdefault(repr(request.args[1]), []).append(i)
    found = [""] * len(requests)
    for members in alike.values():
      settings = requests[members[0]].args[1]
      limit = min(settings.get("max_gen_toks", _NEW_TOKENS), self._engine.config.max_length // 2)
      rows = [self._context(requests[i].args[0], limit) for i in members]
      answers = self._engine.fill_rows(rows, limit, _sampling(settings), range(len(rows)))
      stops = settings.get("until") or []
      for i, answer in zip(members, answers, strict=True):
        text = self._engine.tokenizer.decode(answer.pieces[0])
        found[i] = _cut(text, [stops] if isinstance(stops, str) else stops)
    return found

  def _context(self, text: str, limit: int) -> list[int]:
    """Returns a context as the model's family wants it, without its oldest tokens where there is no room for them."""
    engine = self._engine
    kind, specials = engine.config.position_kind, engine.tokenizer.specials
    framed = len(kind.frame([], specials)) + 1  # sop
    ids = engine.tokenizer.encode(text)
    return kind.frame(ids[max(0, len(ids) + framed + limit - engine.config.max_length) :], specials)


def _sampling(settings: Mapping[str, Any]) -> sampling_lib.Sampling:
  """Returns how a task wants answers drawn; greedy unless it says so."""
  if not settings.get("do_sample"):
    return sampling_lib.Sampling(0.0)
  return sampling_lib.Sampling(float(settings.get("temperature", 1.0)), top_p=float(settings.get("top_p", 1.0)))


def _cut(text: str, stops: Sequence[str]) -> str:
  return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def main() -> None:
  """Runs lm_eval, which knows this model then."""
  registry.register_model("glmjax")(GLM)
  from lm_eval import __main__ as command

  command.cli_evaluate()


if __name__ == "__main__":
  main()
