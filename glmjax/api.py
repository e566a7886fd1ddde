"""The API that people and notebooks call: `glmjax.load`, `glmjax.train`, `glmjax.plan` (docs/api.md)."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glmjax import errors
from glmjax.io import paths

if TYPE_CHECKING:
  from glmjax import display
  from glmjax.infer import engine
  from glmjax.parallel import mesh as mesh_lib


def load(
  folder: str | os.PathLike,
  mesh: "mesh_lib.MeshConfig | str | None" = None,
  offload_layers: int = 0,
  dtype: str | None = None,
) -> "engine.Engine":
  """Reads a model, ready to fill blanks, to continue, chat and score.

  Args:
    folder: an export, an import, or a training run.
    mesh: the devices to split it over, as "tensor=4"; None: the first device alone.
    offload_layers: how many layers, the last, keep their weights in the host's memory. On a GPU, give XLA its
      latency-hiding scheduler before JAX starts, as the command line does: XLA_FLAGS in docs/chat.md.
    dtype: to compute in, where it is not the model's own: "float32", "bfloat16", "float16".

  Raises:
    errors.InputError: for a folder that holds no model, or a damaged one; for devices that it cannot be split over.
  """
  from glmjax.infer import engine

  return engine.Engine.load(folder, dtype, mesh, offload_layers)


@dataclasses.dataclass(frozen=True)
class Training:
  """A training run that has come to its end, or to `stop_at_step`."""

  workdir: pathlib.Path
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
  *gin_files: str, bindings: str | Sequence[str] = (), workdir: str | os.PathLike | None = None, **arguments: Any
) -> Training:
  """Trains a model, or goes on with the run in its workdir, as `glmjax train` does.

  gin's own configuration of this process is replaced. An interrupt is raised once the step under way is saved; the same
  call goes on from there.

  Args:
    *gin_files: searched in the working directory and then among glmjax's own, later ones over earlier; none is needed
      where `arguments` say everything.
    bindings: one or several, as "TOTAL_SAMPLES = 640", over those of the files.
    workdir: the run's folder, where no gin file says it.
    **arguments: Python objects in place of what gin would bind, by the names of `glmjax.train.loop.train`.

  Raises:
    errors.InputError: for what the user can mend.
    errors.Diverged: when a loss, a gradient or the state is not finite; nothing of that is saved.
    KeyboardInterrupt: after Ctrl-C or the notebook's stop button, and after SIGTERM.
  """
  from glmjax.cli import commands, run
  from glmjax.config import gin_files as gin_lib

  command, bound = commands.COMMANDS["train"], _bindings(bindings)
  if workdir is not None and (gin_files or bound):  # by gin, and so in WORKDIR/config.gin
    bound.append(f"{command.target}.workdir = {os.fspath(workdir)!r}")
  elif workdir is not None:
    arguments["workdir"] = workdir
  gin_lib.parse(gin_files, bound, command.target, arguments, commands.targets())
  try:
    figures = run.call(command, arguments)
  except SystemExit as stopped:
    raise KeyboardInterrupt("the run is saved; the same call goes on with it") from stopped
  except Exception as error:
    found = gin_lib.original(error)
    raise found from found.__cause__
  folder = arguments.get("workdir") or gin_lib.binding(gin_lib.configured(command.target), "workdir")
  return Training(paths.local(folder, "workdir"), figures)


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
  command += [f"--gin_file={file}" for file in gin_files] + [f"--gin.{each}" for each in _bindings(bindings)]
  if target is not None:
    command.append(f"--target={target}")
  done = subprocess.run(command, capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL, check=False)
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


def _bindings(given: str | Sequence[str]) -> list[str]:
  return [given] if isinstance(given, str) else list(given)
