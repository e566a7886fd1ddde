"""What a step takes on the devices that are here, or on virtual ones: compiled for them, and not run."""

import dataclasses
from typing import Any

import jax

from glmjax.infer import placement as placement_lib
from glmjax.models import config as config_lib
from glmjax.parallel import collectives
from glmjax.parallel import hlo
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import estimate
from glmjax.plan import programs


@dataclasses.dataclass(frozen=True)
class Exchange:
  """All collectives of one kind over the same mesh axes, in a run of the program."""

  kind: str  # one of collectives.KINDS
  axes: tuple[str, ...]
  times: int
  bytes: float  # that a device sends

  @property
  def name(self) -> str:
    """As "all-gather over data x fsdp"."""
    return f"{self.kind} over {' x '.join(self.axes)}"


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled step on a mesh."""

  mesh: dict[str, int]  # size of each axis
  parameters: Any  # the model's, as jax.ShapeDtypeStruct with their shardings
  memory: dict[str, int]  # bytes of one device by what they are for; "temporaries": what XLA sets aside
  exchanges: list[Exchange]  # those that send most first

  def sent(self) -> dict[str, float]:
    """Returns the bytes that a device sends in a step, by the mesh axes that they go over."""
    sums = dict.fromkeys((" x ".join(each.axes) for each in self.exchanges), 0.0)
    for each in self.exchanges:
      sums[" x ".join(each.axes)] += each.bytes
    return sums


def step(
  model: config_lib.GLMConfig, workload: programs.Train | programs.Decode, mesh: mesh_lib.MeshConfig | str
) -> Step:
  """Compiles a workload for a mesh of the first devices that are here, as many as it takes.

  Args:
    model: its sizes and variant.
    workload: what is computed in a step.
    mesh: as "data=2,tensor=4".

  Raises:
    errors.InputError: for a mesh that does not fit the devices or the model.
  """
  device_mesh = placement_lib.on_mesh(mesh).mesh
  program = workload.program(model, device_mesh)
  compiled = program.traced.lower().compile()
  memory = {name: sum(map(estimate.shard_bytes, jax.tree.leaves(arrays))) for name, arrays in program.parts.items()}
  memory["temporaries"] = compiled.memory_analysis().temp_size_in_bytes
  found: dict[tuple[str, ...], Exchange] = {}
  for each in collectives.of(hlo.read(compiled.as_text()), device_mesh):
    key, times = (each.kind, *each.axes), estimate.times(each, program.trips)
    before = found.get(key, Exchange(each.kind, each.axes, 0, 0.0))
    found[key] = Exchange(each.kind, each.axes, before.times + times, before.bytes + each.sent * times)
  exchanges = sorted(found.values(), key=lambda each: -each.bytes)
  return Step(dict(device_mesh.shape), program.parts["parameters"], memory, exchanges)
