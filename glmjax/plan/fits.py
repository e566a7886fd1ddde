"""`glmjax plan --fits`: the smallest set of each GPU that runs each model, at each precision and context.

Weights and cache are exact arithmetic, and rule out most sets. Of the rest, what reading a prompt and adding a token
take besides is read from the compiled programs: of a few of the layers at their full width, as temporaries hardly grow
with depth, and of all layers where a set fits or fails by a hair.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm

from glmjax import errors
from glmjax import ranges
from glmjax.io import bucket_path, folders, paths, user_text
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import devices as devices_lib
from glmjax.plan import estimate
from glmjax.plan import memory
from glmjax.plan import programs
from glmjax.plan import targets

GPUS = tuple(name for name, chip in targets.CHIPS.items() if chip.platform == "cuda")
_DOUBT = 0.03  # of a device's room: nearer to it, all layers are compiled


def smallest(
  models: Mapping[str, config_lib.GLMConfig],
  bits: Sequence[int] = (16, 8, 4),
  contexts: Sequence[int] = (512, 1024, 2048),
  gpus: Sequence[str] = GPUS,
  layers: int = 8,
  out: paths.Named | None = None,
) -> list[dict[str, Any]]:
  """Finds for each model, precision, context and GPU how many, of 1, 2, 4, ..., hold one row of so many tokens.

  Args:
    bits: 16 computes and keeps weights in float16; 8 and 4 keep them quantized.
    layers: of the programs that are compiled; 0: all.
    out: JSON lines file of what was compiled. Another run takes from it the programs that are the same.

  Raises:
    errors.InputError: when the compiler is missing.
  """
  for gpu in gpus:
    if gpu not in GPUS:
      raise errors.InputError(f"gpus: {gpu!r} is not known; there are {', '.join(GPUS)}")
  for context in contexts:
    ranges.whole("contexts", context, 1)
  for size in bits:
    if size not in (16, 8, 4):
      raise errors.InputError(f"bits: {size} is not known; there are 16, 8, 4")
  ranges.whole("layers", layers)
  compiler, rows = _Compiler(layers, None if out is None else folders.claim_file(out, "--out")), []
  cells = [(name, size, gpu) for name in models for size in bits for gpu in gpus]
  for name, size, gpu in tqdm.tqdm(cells, desc="models x bits x GPUs", disable=None):
    config = dataclasses.replace(models[name], dtype="float16", param_dtype="float16")
    rows += [
      {"model": name, "bits": size, "gpu": gpu} | row
      for row in _of(config, None if size == 16 else size, contexts, targets.CHIPS[gpu], gpu, compiler)
    ]
  return rows


def _of(
  config: config_lib.GLMConfig,
  bits: int | None,
  contexts: Sequence[int],
  chip: targets.Chip,
  gpu: str,
  compiler: "_Compiler",
) -> Iterator[dict[str, Any]]:
  """Answers from the longest context on: its set holds the shorter too, and is their answer where arithmetic rules out
  less.
  """
  longest: dict[str, Any] = {"count": None}
  for context in sorted(contexts, reverse=True):
    workload = programs.Decode(context=context, bits=bits)
    if context > config.max_length:
      yield {"context": context, "count": None, "why": f"the model ends at {config.max_length} tokens"}
      continue
    counts = [n for n in memory.sets(config) if held(config, workload, n) <= targets.room(chip)]
    if counts and counts[0] == longest["count"]:
      yield longest | {"context": context}
      continue
    fitting = ((n, peak) for n in counts if (peak := compiler.peak(config, workload, gpu, n)) <= targets.room(chip))
    count, peak = next(fitting, (None, None))
    longest = {"count": count, "peak_bytes_per_device": peak, "compiled_context": context}
    if count is None:
      longest = {"count": None, "why": f"{memory.sets(config)[-1]} do not hold it, and its heads do not split further"}
    yield longest | {"context": context}


def held(config: config_lib.GLMConfig, workload: programs.Decode, count: int) -> int:
  """Returns the bytes of weights and cache on each of so many devices, exactly."""
  return round(memory.decoding(config, workload, mesh_lib.MeshConfig(data=1, tensor=count)).total)


@functools.cache
def _mesh(gpu: str, count: int) -> jax.sharding.Mesh:
  return mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, tensor=count), devices_lib.of(targets.parse(f"{gpu}:{count}")))


class _Compiler:
  """Compiles programs, each once for all cards of one architecture, and remembers their peaks in a file."""

  def __init__(self, layers: int, path: paths.Path | None) -> None:
    self._layers, self._path, self._peaks = layers, path, {}
    self._known: dict[str, int] = {}
    for _, line in user_text.lines(path) if path and path.exists() else ():
      try:
        program = json.loads(line)
        self._known[program["program"]] = program["peak_bytes_per_device"]
      except (ValueError, KeyError, TypeError) as error:
        if line.startswith("{") and isinstance(error, json.JSONDecodeError):
          continue  # cut off as the run was stopped
        raise errors.InputError(f"{path} is not a file of --fits: name another with --out") from error

  def peak(self, config: config_lib.GLMConfig, workload: programs.Decode, gpu: str, count: int) -> int:
    """Returns a device's bytes at most: while a prompt as long as the context is read, or while a token is added behind
    it.
    """
    room = targets.room(targets.CHIPS[gpu])
    layers = min(self._layers or config.num_layers, config.num_layers)
    peak = self._of_layers(config, workload, gpu, count, layers)
    if abs(peak - room) < _DOUBT * room:
      peak = self._of_layers(config, workload, gpu, count, config.num_layers)
    return peak

  def _of_layers(
    self, config: config_lib.GLMConfig, workload: programs.Decode, gpu: str, count: int, layers: int
  ) -> int:
    """Returns a device's bytes at most with all layers, read from the programs of so many."""
    key = (config, workload, targets.CHIPS[gpu].compute_capability, count, layers)
    if key not in self._peaks:
      fewer = dataclasses.replace(config, num_layers=layers)
      peak = max(
        self._compile(fewer, program, gpu, count)
        for program in (workload, dataclasses.replace(workload, prompt=workload.context))
      )
      self._peaks[key] = peak + held(config, workload, count) - held(fewer, workload, count)
    return self._peaks[key]

  def _compile(self, config: config_lib.GLMConfig, workload: programs.Decode, gpu: str, count: int) -> int:
    chip = targets.CHIPS[gpu]
    program = workload.program(config, _mesh(gpu, count))
    lowered = program.traced.lower()
    what = f"{jax.__version__} {chip.compute_capability} {lowered.as_text()}"
    key = hashlib.sha256(what.encode()).hexdigest()
    if key not in self._known:
      peak = estimate.peak_memory(lowered.compile(), program.parts, chip)["peak_bytes_per_device"]
      self._note(
        {
          "program": key,
          "peak_bytes_per_device": peak,
          "gpu": gpu,
          "count": count,
          "layers": config.num_layers,
          "work": dataclasses.asdict(workload),
        }
      )
      self._known[key] = peak
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
