"""Inference's programs, compiled for cards that are elsewhere: each once for all cards of one architecture.

What was compiled is kept in a file, by a hash of the program, so that a run that was stopped, or that asks for more,
compiles only what is new.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax

from glmjax import errors
from glmjax.io import bucket_path, paths, user_text
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import compiled
from glmjax.plan import devices as devices_lib
from glmjax.plan import estimate
from glmjax.plan import memory
from glmjax.plan import programs
from glmjax.plan import targets

# Of a device's room: nearer to it, all layers are compiled. Temporaries of few layers and of all differed by half of
# that on the smallest card (docs/hardware.md).
_DOUBT = 0.01
_PEAK = "peak_bytes_per_device"
_COSTS = ("flops_per_device", "moved_bytes_per_device", "waited_exchange_seconds")  # of a program that adds tokens


def held(config: config_lib.GLMConfig, workload: programs.Decode, count: int) -> int:
  """Returns the bytes of weights and cache on each of so many devices, exactly."""
  return round(memory.decoding(config, workload, mesh_lib.MeshConfig(data=1, tensor=count)).total)


@functools.cache
def mesh(gpu: str, count: int) -> jax.sharding.Mesh:
  """Returns a mesh of so many of a GPU, which need not be here."""
  return mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, tensor=count), devices_lib.of(targets.parse(f"{gpu}:{count}")))


class Compiler:
  """Compiles programs, and remembers what they take in a file.

  Args:
    layers: of the programs; 0: all. Where a set fits or fails by a hair all are compiled.
    path: JSON lines file; None: none.

  Raises:
    errors.InputError: where the file is of another kind.
  """

  def __init__(self, layers: int, path: paths.Path | None) -> None:
    self._layers, self._path = layers, path
    self._known: dict[str, Mapping[str, float]] = {}  # by the programs' hashes,
    self._found: dict[tuple[Any, ...], Mapping[str, float]] = {}  # and by what they are of
    for _, line in user_text.lines(path) if path and path.exists() else ():
      try:
        program = json.loads(line)
        self._known[program["program"]] = {_PEAK: program[_PEAK]} | {
          name: program[name] for name in _COSTS if name in program
        }
      except (ValueError, KeyError, TypeError) as error:
        if line.startswith("{") and isinstance(error, json.JSONDecodeError):
          continue  # cut off as the run was stopped
        raise errors.InputError(f"{path} is not a file of --fits: name another with --out") from error

  def peak(self, config: config_lib.GLMConfig, workload: programs.Decode, gpu: str, count: int) -> int:
    """Returns a device's bytes at most: while a prompt as long as the context is read, or while a token is added behind
    it.
    """
    _, *besides = self._besides(config, workload, gpu, count)
    return held(config, workload, count) + max(besides)

  def point(self, config: config_lib.GLMConfig, workload: programs.Decode, gpu: str, count: int) -> compiled.Point:
    """Returns what the programs take besides weights and cache, and the seconds of a token on each card of the GPU's
    architecture: as far as half of the layers and all that were compiled tell, as each layer takes the same.
    """
    layers, decode, prompt = self._besides(config, workload, gpu, count)
    some = min(max(self._layers or config.num_layers, 2), config.num_layers)  # two depths tell what a layer takes
    fewer = max(some // 2, 1)
    costs = [
      self._program(dataclasses.replace(config, num_layers=depth), workload, gpu, count) for depth in (fewer, some)
    ]
    little, more = ([cost[name] for name in _COSTS] for cost in costs)
    each = [(b - a) / max(some - fewer, 1) for a, b in zip(little, more, strict=True)]
    flops, moved, waited = (b + (config.num_layers - some) * one for b, one in zip(more, each, strict=True))
    exchanged = [{"seconds": waited, "axes": ["tensor"]}]
    name = compiled.architecture(gpu)
    seconds = {
      card: float(f"{estimate.roofline(flops, moved, exchanged, targets.CHIPS[card])['step_seconds']:.6g}")
      for card in targets.CHIPS
      if compiled.architecture(card) == name
    }
    return compiled.Point(workload.batch, workload.context, layers, decode, prompt, seconds)

  def _besides(
    self, config: config_lib.GLMConfig, workload: programs.Decode, gpu: str, count: int
  ) -> tuple[int, int, int]:
    """Returns the layers that were compiled, and what adding a token and reading a prompt take besides."""
    room = targets.room(targets.CHIPS[gpu])
    layers = min(self._layers or config.num_layers, config.num_layers)
    besides = self._of_layers(config, workload, gpu, count, layers)
    if layers < config.num_layers and abs(held(config, workload, count) + max(besides) - room) < _DOUBT * room:
      layers = config.num_layers
      besides = self._of_layers(config, workload, gpu, count, layers)
    return layers, *besides

  def _of_layers(
    self, config: config_lib.GLMConfig, workload: programs.Decode, gpu: str, count: int, layers: int
  ) -> tuple[int, int]:
    """Returns what a device takes besides weights and cache, read from the programs of so many layers."""
    fewer = dataclasses.replace(config, num_layers=layers)
    return tuple(
      int(self._program(fewer, program, gpu, count)[_PEAK]) - held(fewer, workload, count)
      for program in (workload, dataclasses.replace(workload, prompt=workload.context))
    )

  def _program(
    self, config: config_lib.GLMConfig, workload: programs.Decode, gpu: str, count: int
  ) -> Mapping[str, float]:
    """Returns what a program takes, compiled at the first card of its architecture that asks."""
    key = (config, workload, compiled.architecture(gpu), count)
    if key not in self._found:
      self._found[key] = self._compile(config, workload, gpu, count)
    return self._found[key]

  def _compile(
    self, config: config_lib.GLMConfig, workload: programs.Decode, gpu: str, count: int
  ) -> Mapping[str, float]:
    """Returns the bytes of a device at the program's peak and, of one that adds tokens, what a token costs."""
    aim = targets.parse(f"{gpu}:{count}")
    program = workload.program(config, mesh(gpu, count))
    lowered = program.traced.lower()
    what = f"{jax.__version__} {aim.chip.compute_capability} {lowered.as_text()}"
    key = hashlib.sha256(what.encode()).hexdigest()
    costs = _COSTS if workload.prompt == 1 else ()
    if not self._known.get(key, {}).keys() >= {_PEAK, *costs}:
      compiled_program = lowered.compile()
      figures = {_PEAK: estimate.peak_memory(compiled_program, program.parts, aim.chip)[_PEAK]}
      if costs:
        cost = estimate.cost_of(program, compiled_program, aim, mesh(gpu, count))
        waited = sum(exchange["seconds"] for exchange in cost.exchanged)
        figures |= dict(zip(costs, (cost.flops / count, cost.moved, waited), strict=True))
      work = {"gpu": gpu, "count": count, "layers": config.num_layers, "work": dataclasses.asdict(workload)}
      self._note({"program": key} | figures | work)
      self._known[key] = figures
    jax.clear_caches()  # a run may compile thousands
    return self._known[key]

  def _note(self, program: Mapping[str, Any]) -> None:
    if self._path is None:
      return
    line = json.dumps(program).encode() + b"\n"
    if isinstance(self._path, bucket_path.BucketPath):
      self._path.append(line)
      return
    with open(self._path, "a+b") as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(0, size - 1))
      cut = file.read(1) not in (b"", b"\n")  # a line, as an earlier run was stopped
      file.write(b"\n" * cut + line)
      file.flush()
      os.fsync(file.fileno())
