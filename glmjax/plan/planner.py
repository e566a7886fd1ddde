"""`glmjax plan`: does it fit, how much of what, and how fast at best, from the program that would run."""

from collections.abc import Mapping
from typing import Any

from glmjax import ranges
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import advice
from glmjax.plan import estimate
from glmjax.plan import programs
from glmjax.plan import search as searching
from glmjax.plan import targets

DAY = 86_400


def plan(
  model: config_lib.GLMConfig,
  workload: programs.Train | programs.Decode,
  target: str,
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig(),
  token_budget: int | None = None,
  search: bool = False,
  tries: int = 8,
) -> dict[str, Any]:
  """Compiles a step for devices that are not there, and says what it takes (docs/hardware.md explains each field).

  Args:
    workload: a training step, a token of decoding, the reading of a prompt, or the scoring of rows.
    target: the devices, as "a100-40:768" or "v5p:4x8x8".
    token_budget: tokens of a whole training or evaluation; gives days and energy.
    search: compiles, instead of `mesh`, up to `tries` meshes, micro-batches and remats, and ranks them.

  Raises:
    errors.InputError: for a target or mesh that does not exist, and when a compiler is missing.
  """
  aim = targets.parse(target)
  ranges.whole("tries", tries, 1)
  if token_budget is not None:
    ranges.whole("token_budget", token_budget, 1, 1 << 60)
  if search:
    return searching.rank(model, workload, aim, mesh, tries)
  result = estimate.step(model, workload, aim, mesh)
  result |= _whole_run(result, aim, token_budget)
  return result if result["fits"] else result | {"advice": advice.changes(model, workload, aim, result)}


def _whole_run(result: Mapping[str, Any], aim: targets.Target, budget: int | None) -> dict[str, Any]:
  tokens = result["tokens_per_second"] * DAY
  if budget is None:
    return {"tokens_per_day": tokens}
  days = budget / tokens
  energy = None if aim.chip.watts is None else days * 24 * aim.devices * aim.chip.watts / 1e6
  return {"tokens_per_day": tokens, "days": days, "megawatt_hours": energy}
