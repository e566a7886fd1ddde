"""The API that people and notebooks call: `glmjax.load`, `train`, `run`, `plan` (docs/api.md)."""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glmjax import errors
from glmjax.io import paths

if TYPE_CHECKING:
  from glmjax import display
  from glmjax.cli import flags as flags_lib
  from glmjax.infer import engine
  from glmjax.parallel import mesh as mesh_lib


def load(
  folder: str | os.PathLike,
  mesh: "mesh_lib.MeshConfig | str | None" = None,
  offload_layers: int = 0,
  dtype: str | None = None,
  kv_cache_dtype: str | None = None,
  activation_bits: int | None = None,
  head_bits: int | None = None,
  adapter: str | os.PathLike | Mapping[str, str | os.PathLike] | None = None,
) -> "engine.Engine":
  """Reads a model, ready to fill blanks, to continue, chat and score.

  Args:
    folder: an export, an import, or a training run.
    mesh: the devices to split it over, as "tensor=4"; None: the first device alone.
    offload_layers: how many layers, the last, keep their weights in the host's memory. On a GPU, give XLA its
      latency-hiding scheduler before JAX starts, as the command line does: XLA_FLAGS in docs/chat.md.
    dtype: to compute in, where it is not the model's own: "float32", "bfloat16", "float16".
    kv_cache_dtype: of the keys and values that decoding keeps: "int8", which takes half of bfloat16's memory; None: as
      what is computed.
    activation_bits: 8 rounds what INT4 and INT8 weights are multiplied with, a scale for each token, which is faster on
      CPUs; None: it stays as computed.
    head_bits: 8 or 4 quantizes the head as it is loaded, which is faster on CPUs; None: it stays as it is.
    adapter: a run that trained one beside this model, LoRA or P-Tuning v2, or its export, which is always on; or
      several by name, LoRA's, as {"mine": "runs/lora"}, of which each prompt may have its own; None: the model alone.

  Raises:
    errors.InputError: for a folder that holds no model, or a damaged one; for devices that it cannot be split over.
  """
  from glmjax.infer import engine, placement

  return engine.Engine.load(
    folder,
    placement.Precision(dtype, kv_cache_dtype, activation_bits, head_bits),
    mesh,
    offload_layers,
    adapter=adapter,
  )


@dataclasses.dataclass(frozen=True)
class Training:
  """A training run that has come to its end, or to `stop_at_step`."""

  workdir: paths.Path
  figures: dict[str, Any]  # of the last step

  @property
  def metrics(self) -> list[dict[str, Any]]:
    """The figures of each step so far, read from metrics.jsonl; earlier sittings of the run included."""
    from glmjax.evaluate import report
    from glmjax.train import workdir

    return report.read_metrics(workdir.Workdir(self.workdir).metrics)

  def plot(self) -> "display.Picture":
    """Draws the loss of each objective over the steps, and where the run was taken up again."""
    from glmjax.evaluate import report

    return report.loss_picture(self.metrics)

  def _repr_html_(self) -> str:
    from glmjax import display

    rows = [(name, f"{value:,.6g}" if isinstance(value, float) else value) for name, value in self.figures.items()]
    return display.table(("last step", str(self.workdir)), rows)


def train(
  *gin_files: str,
  bindings: str | Sequence[str] = (),
  workdir: str | os.PathLike | None = None,
  live: bool = False,
  **arguments: Any,
) -> Training:
  """Trains a model, or goes on with the run in its workdir, as `glmjax train` does.

  gin's own configuration of this process is replaced. An interrupt is raised once the step under way is saved; the same
  call goes on from there.

  Args:
    *gin_files: searched in the working directory and then among glmjax's own, later ones over earlier; none is needed
      where `arguments` say everything.
    bindings: one or several, as "TOTAL_SAMPLES = 640", over those of the files.
    workdir: the run's folder, where no gin file says it.
    live: in a notebook, draw the loss so far every few seconds, as `Training.plot` does.
    **arguments: Python objects in place of what gin would bind, by the names of `glmjax.train.loop.train`.

  Raises:
    errors.InputError: for what the user can mend.
    errors.Diverged: when a loss, a gradient or the state is not finite; nothing of that is saved.
    KeyboardInterrupt: after Ctrl-C or the notebook's stop button, and after SIGTERM.
  """
  from glmjax.config import gin_files as gin_lib
  from glmjax.evaluate import live as live_lib
  from glmjax.train import workdir as workdir_lib

  command, given = _settled("train", gin_files, bindings, {"workdir": workdir, **arguments})
  folder = paths.named(gin_lib.binding(gin_lib.configured(command.target), "workdir"), "workdir")
  try:
    with live_lib.curve(workdir_lib.Workdir(folder).metrics) if live else contextlib.nullcontext():
      return Training(folder, _called(command, given))
  except SystemExit as stopped:
    raise KeyboardInterrupt("the run is saved; the same call goes on with it") from stopped


def run(command: str, *gin_files: str, bindings: str | Sequence[str] = (), **arguments: Any) -> Any:
  """Does what a command of glmjax does, in this process, and returns its result.

  gin's own configuration of this process is replaced. What answers people has methods of a loaded model, training and
  plans have functions of their own.

  Args:
    command: "text", "tokenizer", "cache", "study", "evaluate" (with `tasks` it puts tasks to the model), "compare",
      "weights", "export", "import", "inspect", "card", "launch", "doctor" or "report".
    *gin_files: searched in the working directory and then among glmjax's own, later ones over earlier.
    bindings: one or several, as "VOCAB_SIZE = 4096", over those of the files.
    **arguments: the command's flags by their names, without dashes; and Python objects in place of what gin would bind,
      by the names of the command's function.

  Returns:
    What the command's function returns: a tokenizer, or figures, which a notebook shows as a table.

  Raises:
    errors.InputError: for what the user can mend.
  """
  if isinstance(command, str) and command in _ELSEWHERE:
    raise errors.InputError(f'glmjax.run("{command}"): call {_ELSEWHERE[command]}(...) instead')
  result = _called(*_settled(command, gin_files, bindings, arguments))
  if not isinstance(result, dict):
    return result
  from glmjax import display

  return display.Figures(result)


_ELSEWHERE = {
  "generate": "glmjax.load(folder).generate",
  "score": "glmjax.load(folder).score",
  "chat": "glmjax.load(folder).chat",
  "train": "glmjax.train",
  "plan": "glmjax.plan",
}  # commands that are no business of `run` -> what to call


def _settled(
  name: str, gin_files: Sequence[str], bindings: str | Sequence[str], arguments: Mapping[str, Any]
) -> "tuple[flags_lib.Command, dict[str, Any]]":
  """Has gin know what a command is to do, as the command line does; returns it, and the arguments of its call."""
  from glmjax.cli import hosts
  from glmjax.cli import run as run_lib
  from glmjax.config import signatures

  command = run_lib.command_named(name)
  chosen = {each for each, value in arguments.items() if value is not False}
  command = next((mode for mode in command.modes if mode.name.partition("--")[2] in chosen), command)
  module, _, function = command.target.rpartition(".")
  flags = {flag.parameter: flag for flag in command.flags if flag not in hosts.FLAGS}
  switch = command.name.partition("--")[2]  # that chose it; some are flags of it as well
  arguments = {each: value for each, value in arguments.items() if each in flags or each != switch}
  names = {*flags, *inspect.signature(getattr(importlib.import_module(module), function)).parameters}
  if unknown := [argument for argument in arguments if argument not in names]:
    close = signatures.nearest(unknown[0], names)
    advice = f"did you mean {close}?" if close else f"there are {', '.join(sorted(names)) or 'none'}"
    raise errors.InputError(f"glmjax {name} has no argument {unknown[0]}; {advice}")
  options = argparse.Namespace(gin_file=list(gin_files), gin=_listed(bindings))
  for flag in command.flags:
    setattr(options, flag.parameter, None)
  for parameter in flags.keys() & arguments.keys():
    setattr(options, parameter, flags[parameter].read_value(arguments[parameter]))
  rest = {argument: value for argument, value in arguments.items() if argument not in flags}
  return command, run_lib.settle(command, options, rest)


def _called(command: "flags_lib.Command", given: dict[str, Any]) -> Any:
  """Calls a command's function; its errors are its own, without gin's words."""
  from glmjax.cli import run as run_lib
  from glmjax.config import gin_files as gin_lib

  try:
    return run_lib.call(command, given)
  except Exception as error:
    found = gin_lib.original(error)
    raise found from found.__cause__


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step takes on devices that are elsewhere; `figures` are those of `glmjax plan --json` (docs/hardware.md)."""

  figures: dict[str, Any]

  @property
  def fits(self) -> bool:
    """Whether a device's memory suffices."""
    return self.figures["fits"]

  def plot(self) -> "display.Picture":
    """Draws the memory of a device by what it is for, in GiB, and what is usable of it."""
    from glmjax.plan import picture

    return picture.draw(self.figures)

  def _repr_html_(self) -> str:
    from glmjax import display
    from glmjax.cli import plans

    return display.table(("", ""), plans.lines(self.figures))


def plan(
  *gin_files: str,
  bindings: str | Sequence[str] = (),
  target: str | None = None,
  python: str | os.PathLike | None = None,
) -> Plan:
  """Compiles a step for hardware that is elsewhere, and says what it takes, as `glmjax plan` does.

  That runs in a process of its own: JAX must not have started the devices that are here. The working directory and the
  environment variables are this process's.

  Args:
    *gin_files: the plan, searched in the working directory and then among glmjax's own.
    bindings: one or several, as "TENSOR = 8", over those of the files.
    target: the devices, as "rtx3090:4" or "v5p:4x8x8", where the files' are not wanted.
    python: the interpreter of an environment that has the compilers (pip install '.[plan]') and this glmjax;
      None: the one that runs this.

  Raises:
    errors.InputError: for what the user can mend, a compiler that is not installed among it.
  """
  command = [os.fspath(python or sys.executable), "-m", "glmjax", "plan", "--json"]
  command += [f"--gin_file={file}" for file in gin_files] + [f"--gin.{each}" for each in _listed(bindings)]
  if target is not None:
    command.append(f"--target={target}")
  try:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL, check=False)
  except OSError as error:
    raise errors.InputError(f"python: cannot start {command[0]}: {errors.reason(error)}") from error
  if done.returncode:
    said = done.stderr.strip().splitlines() or ["it said nothing"]
    kind = errors.InputError if done.returncode == 2 else RuntimeError
    raise kind(said[-1].removeprefix("glmjax: "))
  figures = json.loads(done.stdout)
  if "memory" not in figures:
    raise errors.InputError(
      "the gin files ask for a search of meshes: run `glmjax plan`, or bind planner.plan.search = False"
    )
  return Plan(figures)


def _listed(given: str | Sequence[str]) -> list[str]:
  listed = [given] if isinstance(given, str) else given
  if not isinstance(listed, (list, tuple)) or not all(isinstance(each, str) for each in listed):
    raise errors.InputError(f'bindings is {repr(given)[:60]}: give text, as "TOTAL_SAMPLES = 640", or a list of such')
  return list(listed)
