"""A run under way: its state, and the order of what is done with every step."""

import dataclasses
import itertools
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from glmjax import errors
from glmjax.models import params as params_lib
from glmjax.parallel import host
from glmjax.train import compute
from glmjax.train import divergence
from glmjax.train import evaluation as evaluation_lib
from glmjax.train import feed as feed_lib
from glmjax.train import interventions
from glmjax.train import layers as layers_lib
from glmjax.train import metrics as metrics_lib
from glmjax.train import probe as probe_lib
from glmjax.train import profile
from glmjax.train import runtime as runtime_lib
from glmjax.train import saving as saving_lib
from glmjax.train import schedules
from glmjax.train import spikes as spikes_lib
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib
from glmjax.train import stopping
from glmjax.train import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Samples:
  """What a run is to be trained on."""

  data: feed_lib.DataSource
  batches: schedules.Batches
  total: int  # samples
  stop_at_step: int | None

  def steps(self, step: int, samples: int) -> Iterator[tuple[int, int]]:
    """Yields (first sample, batch size) of what follows so many steps and samples."""
    plan = itertools.takewhile(lambda at: at[0] < self.total, self.batches.plan(samples))
    return plan if self.stop_at_step is None else itertools.islice(plan, max(self.stop_at_step - step, 0))


class Start:
  """The state that a run begins with, and whether it is a checkpoint's."""

  def __init__(self, state: state_lib.TrainState, resumed: bool):
    self.state, self.resumed = state, resumed
    self.step, self.samples_seen = int(state.step), int(state.samples_seen)


@dataclasses.dataclass(frozen=True)
class Hooks:
  """What is done besides the steps, each by an object of its own that knows when."""

  saving: saving_lib.Saving
  evaluation: evaluation_lib.Evaluation
  probe: probe_lib.Probe | None  # None: nobody asks what is forgotten
  trace: profile.Trace
  console: metrics_lib.Console
  log_every: int  # steps; 0: no lines
  writer: metrics_lib.Writer | None  # the first process's
  detector: spikes_lib.Detector | None  # None: nothing is watched
  journal: interventions.Journal
  layers: layers_lib.Layers | None  # None: nobody asks how they fare
  session: compute.Session  # of all ways back; closed by who made it

  def close(self) -> None:
    """Ends the trace and closes the files."""
    self.stop_trace()
    self.trace.close()
    self.console.close()
    for file in (self.writer, self.layers):
      if file is not None:
        file.close()

  def stop_trace(self) -> None:
    """Ends the trace, if one is running."""
    if self.trace.stop():
      self.console.say(f"profile of steps {self.trace.steps} written to {self.trace.folder}")


class Run:
  """Trains a state on samples; `folder` is the run's."""

  def __init__(
    self,
    runtime: runtime_lib.Runtime,
    recipe: step_lib.Recipe,
    samples: Samples,
    folder: workdir_lib.Workdir,
    hooks: Hooks,
    start: Start,
  ):
    self._runtime, self._recipe, self._samples, self._folder = runtime, recipe, samples, folder
    self._hooks, self._state, self._resumed = hooks, start.state, start.resumed
    self._step, self._seen = start.step, start.samples_seen  # of the state, once its step is read
    self._last_samples = self._seen, self._seen  # first and last of the step before, once there is one
    trained, config = params_lib.flatten(start.state.params), runtime.objective.config
    self._flops_per_token = params_lib.train_flops_per_token(
      config, runtime.layout.length, lambda path, param: path in trained
    )
    self._record: metrics_lib.Record = {}
    self._feed: feed_lib.Feed | None = None
    self._asked: jax.Array | None = None  # of all processes, with the newest step

  @property
  def step(self) -> int:
    """The steps that the state has behind it."""
    return self._step

  @property
  def resumed_at(self) -> int | None:
    """The step of the checkpoint that it begins with; None: it has begun without one, or done a step."""
    return self._step if self._resumed else None

  def compile(self, train_step: Any) -> Any:
    """Compiles the step, so that the first one is as quick as any; returns its program."""
    layout, began = self._runtime.layout, time.perf_counter()
    scalar = jax.ShapeDtypeStruct(
      (), np.uint32, sharding=jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec())
    )
    detector = self._hooks.detector
    info = step_lib.StepInfo(scalar, scalar, scalar, detector and detector.abstract())
    self._train_step = train_step.lower(self._state, layout.abstract(), info).compile()
    if self._hooks.layers is not None:
      self._hooks.layers.compile(self._state, layout.abstract(), scalar)
    if jax.default_backend() == "cpu":
      host.reserve_huge_pages(self._train_step.memory_analysis().temp_size_in_bytes * 5 // 4)
    of_all = ""
    if self._state.frozen:
      of_all = f"{sum(x.size for x in jax.tree.leaves(self._state.params)):,} trained of "
    self._hooks.console.say(
      f"{of_all}{params_lib.count(self._runtime.objective.config):,} parameters on {layout.mesh.size} x "
      f"{jax.devices()[0].device_kind}; {'resumed at' if self._resumed else 'starting at'} step {self._step:,}, "
      f"sample {self._seen:,} of {self._samples.total:,}; compiled in {time.perf_counter() - began:.1f} s"
      f"{_advice()}"
    )
    return self._train_step

  def use(self, program: Any, spike: spikes_lib.Spike, resumed_at: int | None) -> None:
    """Takes the program of the run that a spike has ended, instead of compiling it again.

    A way back is no stop; but where it undoes all that followed one, the line that told of that is written once more.

    Args:
      program: what `compile` returned.
      spike: where the run was sent back.
      resumed_at: the step from which this process has gone on with a run that was stopped; None: it began one.
    """
    self._train_step, self._resumed = program, resumed_at is not None and self._step <= resumed_at
    self._hooks.console.say(f"{spike}; back to step {self._step:,}, these samples are left out")

  def close(self) -> None:
    """Stops the feed, closes what the hooks have open, and gives up the state."""
    self._state = None
    if self._feed is not None:
      self._feed.close()
    self._hooks.close()

  def _note(self, error: errors.Diverged) -> None:
    """Writes how the run ended as the last line of metrics.jsonl."""
    if self._hooks.writer is not None:
      self._hooks.writer.write(
        {
          "step": error.step,
          "samples_seen": self._seen,
          "loss": None,
          "diverged": error.part,
          "first_sample": error.samples[0],
          "last_sample": error.samples[1],
          **({"above": error.above} if error.above else {}),  # of a spike: it is no line of interventions.jsonl
        }
      )

  def run(self, stop: stopping.Stopping) -> dict[str, Any]:
    """Does steps until the samples are seen, the step is reached, or a signal comes; returns the last step's figures.

    Raises:
      errors.Diverged: which metrics.jsonl tells of too.
      spikes.GoBack: when it is to go on from its newest checkpoint, without the samples of a spike.
    """
    try:
      self._steps(stop)
      return self._end(stop)
    except errors.Diverged as error:
      self._note(error)
      raise
    except spikes_lib.GoBack:
      # The step behind the spike is under way: programs that meet other processes must not run beside those to come.
      jax.block_until_ready((self._state, self._asked))
      raise

  def _steps(self, stop: stopping.Stopping) -> None:
    hooks = self._hooks
    pending: tuple[feed_lib.Item, step_lib.Metrics, float] | None = None
    answer: jax.Array | None = None
    self._clock = time.perf_counter()
    for item, waited in self._items():
      step = self._step + (pending is not None) + 1
      hooks.trace.before(step)
      self._runtime.peers.at(step)
      item = self._limited(item, step)
      if hooks.layers is not None:
        item = hooks.layers.before(step, self._state, item)
      self._state, metrics = self._train_step(self._state, item.batch, item.info)
      self._asked = asked = stop.ask(metrics["loss"])
      if pending:  # the device works on this step while the last one's figures are read
        self._finish(*pending)
      stop.hear(answer)
      pending, answer = (item, metrics, waited), asked
      if self._is_due(step, stop):
        self._finish(*pending)
        pending = None
        if hooks.trace.ends_with(step):
          hooks.stop_trace()
        if stop.agreed:
          break
    if pending:
      self._finish(*pending)
    stop.hear(answer)

  def _items(self) -> Iterator[tuple[feed_lib.Item, float]]:
    """Yields the batches still to be trained on, and the seconds waited for each."""
    plan = self._samples.steps(self._step, self._seen)
    self._feed = feed_lib.Feed(self._samples.data, plan, self._seen, self._runtime.layout)
    items = iter(self._feed)
    while True:
      began = time.perf_counter()
      item = next(items, None)
      if item is None:
        return
      yield item, time.perf_counter() - began

  def _limited(self, item: feed_lib.Item, step: int) -> feed_lib.Item:
    """Returns the item with the limits of its step, if it has any."""
    detector = self._hooks.detector
    if detector is None:
      return item
    info = dataclasses.replace(item.info, limits=detector.limits(step, item.first, item.size))
    return item._replace(info=info)

  def _is_due(self, step: int, stop: stopping.Stopping) -> bool:
    """Tells whether something is to be done with the state right after this step."""
    hooks = self._hooks
    return (
      hooks.saving.is_due(step)
      or hooks.evaluation.is_due(step)
      or stop.agreed is not None
      or hooks.trace.ends_with(step)
    )

  def _finish(self, item: feed_lib.Item, metrics: step_lib.Metrics, waited: float) -> None:
    """Reads a step's figures, saves and evaluates when it is time to, and writes the figures."""
    hooks, metrics = self._hooks, jax.device_get(metrics)
    now = time.perf_counter()
    seconds, self._clock = now - self._clock, now
    if not metrics["advanced"]:
      raise self._diverged(item, metrics)
    self._step, self._seen = self._step + 1, item.first + item.size
    self._last_samples = item.first, item.first + item.size - 1
    self._record = record = self._figures(item, metrics, seconds, waited)
    hooks.session.add(record, item.size)
    if hooks.detector is not None:
      self._look_for_spike(hooks.detector, bool(metrics["held"]))
    saves, failure = hooks.saving.is_due(self._step), None
    if hooks.evaluation.is_due(self._step):
      try:
        record |= hooks.evaluation.evaluate(self._state)
      except Exception as error:  # what there is of the step is written all the same
        failure = error
        saves |= jax.process_count() == 1  # the others of several would not come to save with this one
    if hooks.writer is not None:  # before the checkpoint, from which a run may go on
      hooks.writer.write(record, is_saved=saves)
    if hooks.layers is not None:
      hooks.layers.after(record, metrics["layers"], is_saved=saves)
    if saves:
      hooks.saving.save(self._state, record, self._last_samples)
      hooks.session.save()
    if failure is not None:
      hooks.saving.wait()
      raise failure
    shown = bool(hooks.log_every) and self._step % hooks.log_every == 0 or "eval_loss" in record
    hooks.console.step(record, seconds, item.size, show=shown)
    if "eval_loss" in record or hooks.saving.is_saved(self._step):
      self._clock = time.perf_counter()  # evaluating and saving are no part of a step's time

  def _look_for_spike(self, detector: spikes_lib.Detector, held: bool) -> None:
    """Records a spike in the last step's figures; `held`: its update was not applied for its limits.

    Raises:
      spikes.GoBack: before anything of the step is written or saved.
      errors.Diverged: when nothing is left to be done about it.
    """
    hooks, guard = self._hooks, detector.guard
    spike = detector.find(self._record, *self._last_samples, held)
    if spike is None:
      return
    if guard.action in ("skip", "roll_back") and spike.action == guard.action:
      can_go_back = guard.action == "skip" or hooks.saving.has_begun
      if not can_go_back or hooks.journal.count(self._step, guard.window) >= guard.most:
        hooks.saving.settle()
        raise spikes_lib.diverged(spike, guard, can_go_back, self._folder.checkpoints)
    if spike.action == "roll_back":
      raise spikes_lib.GoBack(spike)
    with self._runtime.peers.patient():
      hooks.journal.add(spike)
    hooks.console.say(f"{spike}; {spike.done}")

  def _figures(
    self, item: feed_lib.Item, metrics: step_lib.Metrics, seconds: float, waited: float
  ) -> metrics_lib.Record:
    """Returns the line of a step in metrics.jsonl."""
    length = self._runtime.layout.length
    tokens = item.size * length
    rate = tokens / seconds
    record = {
      "step": self._step,
      "samples_seen": self._seen,
      "tokens_seen": self._seen * length,
      **metrics_lib.record_of(metrics),
      "tokens": tokens,
      "seconds": seconds,
      "data_wait_seconds": waited,
      "tokens_per_second": rate,
      "model_flops_per_second": rate * self._flops_per_token,
    }
    if self._resumed:
      record["resumed"], self._resumed = True, False
    return record

  def _diverged(self, item: feed_lib.Item, metrics: step_lib.Metrics) -> errors.Diverged:
    """Returns the end at a step that could not be done: the state, its step's number and its loss scale are what
    they were before.
    """
    self._hooks.saving.settle()
    finding = divergence.find(self._runtime, self._recipe, self._state, item, metrics)
    finding = finding or divergence.run_again(self._train_step, self._state, item)
    return divergence.of_step(self._step + 1, item.first, item.size, metrics, finding, self._folder.checkpoints)

  def _end(self, stop: stopping.Stopping) -> dict[str, Any]:
    """Saves the last step; where it is the run's, tells what was forgotten.

    Raises:
      SystemExit: 128 + the number of the signal that has stopped the run.
    """
    hooks = self._hooks
    if self._record:
      hooks.saving.save(self._state, self._record, self._last_samples)
    else:
      hooks.console.say(f"nothing to do: the run is at step {self._step:,}, sample {self._seen:,}")
    hooks.saving.wait()
    if stop.agreed:
      name = signal.Signals(stop.agreed).name
      hooks.console.say(f"{name}: stopped and saved at step {self._step:,}; the same command goes on from there")
      raise SystemExit(128 + stop.agreed)
    if hooks.probe is not None and self._seen >= self._samples.total:
      hooks.console.say(hooks.probe.end(self._state))
    return {"step": self._step, "samples_seen": self._seen, **self._record}


def _advice() -> str:
  """Says what to know of a run of several processes."""
  count = jax.process_count()
  if count == 1:
    return ""
  return (
    f"; {count} processes: should one die, all end, those that JAX ends in its own words; "
    "the same command then goes on from the last checkpoint"
  )
