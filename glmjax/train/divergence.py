"""What is said of a run whose numbers are not finite: where, since when, how to go back, and what to change."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from glmjax import errors
from glmjax.checkpoint import manager as manager_lib
from glmjax.io import paths
from glmjax.train import diagnose
from glmjax.train import feed as feed_lib
from glmjax.train import runtime as runtime_lib
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib

_RATE = "lower the learning rate"


def of_step(
  step: int, first: int, size: int, metrics: step_lib.Metrics, finding: diagnose.Finding, checkpoints: paths.Path
) -> errors.Diverged:
  """Returns the end of a run at a step that could not be done; the state is what it was before.

  Args:
    step: its number.
    first, size: of its samples.
    metrics: the step's, on the host.
    finding: where it first shows.
    checkpoints: folder of the run's.
  """
  last = first + size - 1
  samples = f"samples {first} to {last}"
  scale = f", at the smallest loss scale ({float(metrics['loss_scale']):g})" if "loss_scale" in metrics else ""
  skip = _ranges([first + row for row in finding.rows]) if finding.rows else [(first, last)]
  shown = f" of samples {_listed(skip)}" if finding.rows and len(finding.rows) < size else ""
  advice = {
    "state": f"{_RATE}: the state itself was not finite before this step, whatever its samples",
    "data": f"mend these samples, or leave them out with Batches.skip = {skip}",
    "machine": "run the same command again, on another machine if it recurs: the same step, run again, was finite, "
    "so that memory or processors make mistakes",
  }.get(finding.kind, f"{_RATE}, or leave these samples out with Batches.skip = {skip}")
  return errors.Diverged(
    f"step {step} ({samples}) is not finite, first seen in {finding.part}{shown}{scale}; "
    f"{going_back(checkpoints)}; {advice}",
    step,
    (first, last),
    finding.part,
  )


def of_state(
  step: int, samples: tuple[int, int], part: str, learning_rate: float, checkpoints: paths.Path
) -> errors.Diverged:
  """Returns the end of a run whose state a step has made not finite, found before it was saved."""
  return errors.Diverged(
    f"step {step} (samples {samples[0]} to {samples[1]}, learning rate {learning_rate:.3g}) has left the state not "
    f"finite, first seen in {part}, and is not saved; {going_back(checkpoints)}; {_RATE}",
    step,
    samples,
    part,
  )


def of_checkpoint(step: int, samples: int, part: str, checkpoints: paths.Path) -> errors.Diverged:
  """Returns the end of a run that would have begun with a state saved while it was not finite, by an earlier
  version.
  """
  older = [each for each in manager_lib.steps(checkpoints) if each < step]
  advice = (
    f"rename {checkpoints / str(step)} to {_aside(checkpoints, step)}, and the same command goes on from step "
    f"{older[-1]}"
    if older
    else "it has no older one: start anew with --overwrite"
  ) + f"; {_RATE}"
  return errors.Diverged(
    f"the checkpoint of step {step} ({checkpoints}) is not finite, first seen in {part}: {advice}",
    step,
    (samples, samples),
    part,
  )


def going_back(checkpoints: paths.Path) -> str:
  """Says from where the same command goes on, and how to begin further back."""
  steps = manager_lib.steps(checkpoints)
  if not steps:
    return "no checkpoint is there yet, so that the same command begins anew"
  last = steps[-1]
  text = f"the last checkpoint is step {last}, from which the same command goes on"
  if len(steps) > 1:
    text += f" (from step {steps[-2]} once {checkpoints / str(last)} is renamed to {_aside(checkpoints, last)})"
  return text


def _aside(checkpoints: paths.Path, step: int) -> str:
  """Returns a name, not taken yet, under which a step counts no more."""
  name = f"{step}.aside"
  while (checkpoints / name).exists():
    name += "+"
  return name


def find(
  runtime: runtime_lib.Runtime,
  recipe: step_lib.Recipe,
  state: state_lib.TrainState,
  item: feed_lib.Item,
  metrics: step_lib.Metrics,
) -> diagnose.Finding | None:
  """Finds where a step that was not done is first not finite; None: its parts are finite, run one by one."""
  with runtime.peers.patient():
    finding = diagnose.first_not_finite(
      runtime.objective,
      runtime.stages.put_back(state),
      item.batch,
      -(-item.size // runtime.layout.rows),
      recipe.embedding_alpha(item.first),
      metrics.get("loss_scale", 1.0),
    )
  return finding or in_the_norm(metrics)


def run_again(train_step: Callable[..., Any], state: state_lib.TrainState, item: feed_lib.Item) -> diagnose.Finding:
  """Says whether the very same program comes to the same end: only if it does not are machines at fault. Takes the
  state.
  """
  _, metrics = train_step(state, item.batch, item.info)
  if jax.device_get(metrics["advanced"]):
    return diagnose.Finding("machine", "nothing that shows when it is run again")
  return diagnose.Finding("rounding", "nothing that shows when its parts are run one by one, which rounds otherwise")


def in_the_norm(metrics: step_lib.Metrics) -> diagnose.Finding | None:
  """Returns what the step's figures tell where every gradient is finite, but the sum of their squares is not."""
  if np.isfinite(metrics["grad_norm"]) or not np.isfinite(metrics["loss"]):
    return None
  parts = [
    name.removeprefix("grad_norm_")
    for name, value in metrics.items()
    if name.startswith("grad_norm_") and not np.isfinite(value)
  ]
  return diagnose.Finding("norm", f"the gradients' norm ({', '.join(parts) or 'all'}), which is too large for float32")


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
  """Returns sorted numbers as (first, last) of the runs among them."""
  found: list[tuple[int, int]] = []
  for number in sorted(numbers):
    if found and number == found[-1][1] + 1:
      found[-1] = found[-1][0], number
    else:
      found.append((number, number))
  return found


def _listed(ranges: Sequence[tuple[int, int]]) -> str:
  texts = [str(first) if first == last else f"{first} to {last}" for first, last in ranges]
  return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")
