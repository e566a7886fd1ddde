"""The training loop: the one place that knows time, steps, evaluation, saving and stopping."""

import contextlib
import dataclasses
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from glmjax import errors
from glmjax import ranges
from glmjax.checkpoint import manager as manager_lib
from glmjax.checkpoint import recorded
from glmjax.models import config as config_lib
from glmjax.parallel import host
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.parallel import peers as peers_lib
from glmjax.parallel import processes
from glmjax.train import diagnose
from glmjax.train import divergence
from glmjax.train import feed as feed_lib
from glmjax.train import initial
from glmjax.train import losses
from glmjax.train import metrics as metrics_lib
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import pipeline as pipeline_lib
from glmjax.train import profile
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib
from glmjax.train import stopping
from glmjax.train import workdir as workdir_lib
from glmjax.train.pipeline import stage_layout


@dataclasses.dataclass(frozen=True)
class Intervals:
  """How often a run does what, in steps; 0: never."""

  log: int = 10  # a line on the console
  evaluate: int = 0  # loss on the validation source
  save: int = 500  # a checkpoint; one is always written at the end
  keep: int = 3  # newest checkpoints kept, and the one with the best validation loss
  eval_samples: int = 256  # first samples of the validation source that are evaluated
  profile: Sequence[int] = ()  # (first, last) steps traced into WORKDIR/profile

  def __post_init__(self) -> None:
    for name in ("log", "evaluate", "save"):
      ranges.whole(f"Intervals.{name}", getattr(self, name), 0)
    for name in ("keep", "eval_samples"):
      ranges.whole(f"Intervals.{name}", getattr(self, name), 1)
    for i, step in enumerate(ranges.several("Intervals.profile", self.profile)):
      ranges.whole(f"Intervals.profile[{i}]", step, 0)
    if self.profile and (len(self.profile) != 2 or not 1 <= self.profile[0] <= self.profile[1]):
      raise errors.InputError(f"Intervals.profile is {self.profile}: give (first, last) steps with 1 <= first <= last")


def train(
  model: config_lib.GLMConfig,
  data: feed_lib.DataSource,
  workdir: str | os.PathLike,
  batches: schedules.Batches,  # rows of a step, as a function of samples seen
  total_samples: int,
  learning_rate: schedules.Schedule,
  optimizer: optimizer_lib.AdamW | optimizer_lib.Muon = optimizer_lib.AdamW(),
  embedding_alpha: schedules.Schedule = schedules.Constant(1.0),  # the embedding gradient shrink's factor; 1: none
  loss_scale: state_lib.DynamicLossScale = state_lib.DynamicLossScale(),  # of float16 models
  validation: feed_lib.DataSource | None = None,  # evaluated every intervals.evaluate steps
  intervals: Intervals = Intervals(),
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig(),
  strategy: str = "fsdp",  # what is split over the mesh's data and fsdp, one of partitioning.STRATEGIES
  pipeline: pipeline_lib.PipelineConfig = pipeline_lib.PipelineConfig(),  # how rows flow through a mesh's stages
  micro_batch: int | None = None,  # rows computed at a time, over all devices; None: the whole batch
  loss_chunk: int = 1024,  # tokens of a batch shard whose logits exist at a time
  loss_mean_of: str = "tokens",  # what weighs the same in the loss, one of objective.MEANS
  watch: peers_lib.Watch = peers_lib.Watch(),  # how long a process may be silent, or a step take, among several
  weights: str | os.PathLike | None = None,  # an export, import or run that a new run begins with; None: random
  seed: int = 0,
  stop_at_step: int | None = None,  # save and return there, as if interrupted
  overwrite: bool = False,  # delete the run found in workdir and start anew
  on_start: Callable[[], None] | None = None,  # called once workdir is this run's; the command line writes there
) -> dict[str, Any]:
  """Trains a model until it has seen `total_samples`, resuming the run found in `workdir`; the last step's figures.

  Raises:
    errors.InputError: for what the user can mend.
    errors.Diverged: when a loss, a gradient or the state is not finite; nothing of that is saved.
    SystemExit: 128 + the signal's number, after SIGTERM or Ctrl-C in any process: the step was finished and saved.
  """
  _check(model, data, loss_mean_of)
  _check_numbers(batches, total_samples, micro_batch, loss_chunk, seed, stop_at_step)
  folder = workdir_lib.Workdir.named(workdir, weights)
  if weights is not None and overwrite:  # before anything is deleted
    initial.check(weights, model, data.describe())
  with watch.on() as peers, contextlib.ExitStack() as stack:  # before JAX looks for devices: it asks all processes
    device_mesh, rules = mesh_lib.make_mesh(mesh), partitioning.strategy(strategy)
    stack.enter_context(partitioning.use(device_mesh, rules))
    layout = _layout(model, data, batches, micro_batch, intervals.eval_samples, device_mesh, rules)
    evaluated = []  # read before anything is deleted or trained, so that a run that could not evaluate never starts
    if validation is not None and intervals.evaluate:
      evaluated = feed_lib.read_validation(validation, layout, intervals.eval_samples)
    tx = optimizer.make()
    recipe = step_lib.Recipe(optimizer, learning_rate, embedding_alpha, loss_scale)
    objective = objective_lib.Objective(
      model, loss_chunk, loss_mean_of, pipeline_lib.make(pipeline, model, device_mesh, layout.rows)
    )
    stages = stage_layout.make(model, tx, device_mesh, rules, objective.pipeline)
    processes.on_first(lambda: _begin(stack, folder, model, data, overwrite, on_start))
    processes.check_same_filesystem(folder.seen, str(folder.root))
    manager = manager_lib.Manager(folder.checkpoints, intervals.keep, keep_best="eval_loss" if evaluated else None)
    stack.callback(manager.close)
    restored = manager.restore(stages.stored)
    state = (
      restored[0] if restored else initial.create(model, tx, seed, stages.stored, weights, data.describe(), loss_scale)
    )
    run = Run(
      objective,
      recipe,
      layout,
      folder,
      manager,
      intervals,
      data,
      evaluated,
      batches,
      total_samples,
      stages.hold(state),
      stages,
      resumed=restored is not None,
      peers=peers,
    )
    stack.callback(run.close)
    run.check_start(weights)
    run.compile(step_lib.compile_train_step(objective, recipe, tx, jax.tree.map(lambda x: x.sharding, stages.held)))
    with stopping.Stopping(device_mesh) as stop:
      try:
        return run.run(stop_at_step, stop)
      except errors.Diverged as error:
        run.note(error)
        raise


def _advice() -> str:
  count = jax.process_count()
  return (
    ""
    if count == 1
    else (
      f"; {count} processes: should one die, all end, those that JAX ends in its own words; "
      "the same command then goes on from the last checkpoint"
    )
  )


def _begin(
  stack: contextlib.ExitStack,
  folder: workdir_lib.Workdir,
  model: config_lib.GLMConfig,
  data: feed_lib.DataSource,
  overwrite: bool,
  on_start: Callable[[], None] | None,
) -> None:
  stack.enter_context(folder.locked())
  folder.open(model, data, overwrite)
  if on_start is not None:
    on_start()


def _check(model: config_lib.GLMConfig, data: feed_lib.DataSource, loss_mean_of: str) -> None:
  if data.seq_length > model.max_length:
    raise errors.InputError(
      f"the data's rows have {data.seq_length} tokens, the model's max_length is {model.max_length}: change either"
    )
  if loss_mean_of not in objective_lib.MEANS:
    raise errors.InputError(f"loss_mean_of is {loss_mean_of!r}: use one of {', '.join(objective_lib.MEANS)}")


def _check_numbers(
  batches: schedules.Batches,
  total_samples: int,
  micro_batch: int | None,
  loss_chunk: int,
  seed: int,
  stop_at_step: int | None,
) -> None:
  ranges.whole("loop.train.total_samples", total_samples, 1, ranges.MOST_SAMPLES - batches.size)
  ranges.whole("loop.train.loss_chunk", loss_chunk, 1)
  ranges.whole("loop.train.seed", seed, 0, 2**32 - 1)
  for name, value in (("micro_batch", micro_batch), ("stop_at_step", stop_at_step)):
    if value is not None:
      ranges.whole(f"loop.train.{name}", value, 1)


def _layout(
  model: config_lib.GLMConfig,
  data: feed_lib.DataSource,
  batches: schedules.Batches,
  micro_batch: int | None,
  eval_samples: int,
  mesh: jax.sharding.Mesh,
  rules: partitioning.Rules,
) -> feed_lib.Layout:
  """How batches lie on the devices; every size that the run will come to fits."""
  layout = feed_lib.Layout.make(
    mesh,
    rules,
    batches.size,
    micro_batch,
    data.seq_length,
    model.position_kind,
    model.vocab_size,
    None if model.position_kind.rotary_parts else model.max_length + 1,
  )
  layout.check_sizes("batch size", range(batches.ramp_start or batches.size, batches.size + 1, batches.ramp_increment))
  layout.check_sizes("Intervals.eval_samples", [eval_samples])
  return layout


class Run:
  """A run under way: the state, and everything that is fed by it or tells about it."""

  def __init__(
    self,
    objective: objective_lib.Objective,
    recipe: step_lib.Recipe,
    layout: feed_lib.Layout,
    folder: workdir_lib.Workdir,
    manager: manager_lib.Manager,
    intervals: Intervals,
    data: feed_lib.DataSource,
    evaluated: list[feed_lib.Evaluated],
    batches: schedules.Batches,
    total_samples: int,
    state: state_lib.TrainState,
    stages: stage_layout.Stages,
    resumed: bool,
    peers: peers_lib.Peers,
  ):
    self.objective, self.recipe, self.layout, self.folder = objective, recipe, layout, folder
    self.manager, self.intervals, self.data, self.evaluated = manager, intervals, data, evaluated
    self.batches, self.total_samples, self.state = batches, total_samples, state
    self.step, self.samples = int(state.step), int(state.samples_seen)  # of the state, once its step is read
    self._stages, self._resumed, self._peers = stages, resumed, peers
    self._record: metrics_lib.Record = {}
    self._saved_step = self.step if resumed else None
    self._last_samples = self.samples, self.samples  # first and last of the step before, once there is one
    self._eval_step = step_lib.compile_eval_step(objective)
    first = jax.process_index() == 0
    self._writer = metrics_lib.Writer(folder.metrics, folder.tensorboard, self.step) if first else None
    self.console = metrics_lib.Console(total_samples, self.samples, silent=not first)
    self._trace = profile.Trace(intervals.profile, folder.root / "profile")
    self._feed: feed_lib.Feed | None = None

  def compile(self, train_step: Any) -> None:
    """Compiles the step, so that the first one is as quick as any."""
    model = self.objective.config
    began = time.perf_counter()
    scalar = jax.ShapeDtypeStruct(
      (), np.uint32, sharding=jax.sharding.NamedSharding(self.layout.mesh, jax.sharding.PartitionSpec())
    )
    info = step_lib.StepInfo(scalar, scalar, scalar)
    self._train_step = train_step.lower(self.state, self.layout.abstract(), info).compile()
    if jax.default_backend() == "cpu":
      host.reserve_huge_pages(self._train_step.memory_analysis().temp_size_in_bytes * 5 // 4)
    self.console.say(
      f"{model.num_parameters():,} parameters on {self.layout.mesh.size} x "
      f"{jax.devices()[0].device_kind}; {'resumed at' if self._resumed else 'starting at'} step {self.step:,}, "
      f"sample {self.samples:,} of {self.total_samples:,}; compiled in {time.perf_counter() - began:.1f} s"
      f"{_advice()}"
    )

  def check_start(self, weights: str | os.PathLike | None) -> None:
    """Raises an error where what the run begins with is not finite; `weights`: what a new one was given."""
    part = self._bad_part()
    if part is not None and self._resumed:
      raise divergence.of_checkpoint(self.step, self.samples, part, self.folder.checkpoints)
    if part is not None and weights is not None:
      raise errors.NotFiniteError(
        f"{weights} is no model to begin with: not finite in {part}; give an older checkpoint, or another model"
      )
    if part is not None:
      raise errors.NotFiniteError(f"a new model would not be finite in {part}: give a smaller GLMConfig.init_std")

  def note(self, error: errors.Diverged) -> None:
    """Writes how the run ended as the last line of metrics.jsonl."""
    if self._writer is not None:
      self._writer.write(
        {
          "step": error.step,
          "samples_seen": self.samples,
          "loss": None,
          "diverged": error.part,
          "first_sample": error.samples[0],
          "last_sample": error.samples[1],
        }
      )

  def close(self) -> None:
    """Stops the feed and closes the files."""
    if self._feed is not None:
      self._feed.close()
    self._stop_trace()
    self.console.close()
    if self._writer is not None:
      self._writer.close()

  def run(self, stop_at_step: int | None, stop: stopping.Stopping) -> dict[str, Any]:
    """Steps until the samples are seen, the step is reached, or a signal comes."""
    pending: tuple[feed_lib.Item, step_lib.Metrics, float] | None = None
    answer: jax.Array | None = None
    self._clock = time.perf_counter()
    for item, waited in self._items(stop_at_step):
      step = self.step + (pending is not None) + 1
      self._trace.before(step)
      self._peers.at(step)
      self.state, metrics = self._train_step(self.state, item.batch, item.info)
      asked = stop.ask(metrics["loss"])
      if pending:  # the device works on this step while the last one's figures are read
        self._finish(*pending)
      stop.hear(answer)
      pending, answer = (item, metrics, waited), asked
      if self._is_due(step, stop):
        self._finish(*pending)
        pending = None
        if self._trace.ends_with(step):
          self._stop_trace()
        if stop.agreed:
          break
    if pending:
      self._finish(*pending)
    stop.hear(answer)
    if not self._record:
      self.console.say(f"nothing to do: the run is at step {self.step:,}, sample {self.samples:,}")
    self._save()
    with self._peers.patient():
      self.manager.wait()
    if stop.agreed:
      name = signal.Signals(stop.agreed).name
      self.console.say(f"{name}: stopped and saved at step {self.step:,}; the same command goes on from there")
      raise SystemExit(128 + stop.agreed)
    return {"step": self.step, "samples_seen": self.samples, **self._record}

  def _items(self, stop_at_step: int | None) -> Iterator[tuple[feed_lib.Item, float]]:
    """The batches still to be trained on, and the seconds waited for each."""
    plan = itertools.takewhile(lambda at: at[0] < self.total_samples, self.batches.plan(self.samples))
    if stop_at_step is not None:
      plan = itertools.islice(plan, max(stop_at_step - self.step, 0))
    self._feed = feed_lib.Feed(self.data, plan, self.samples, self.layout)
    items = iter(self._feed)
    while True:
      began = time.perf_counter()
      item = next(items, None)
      if item is None:
        return
      yield item, time.perf_counter() - began

  def _is_due(self, step: int, stop: stopping.Stopping) -> bool:
    """Whether something is to be done with the state right after this step."""
    every = lambda interval: bool(interval) and step % interval == 0
    return (
      every(self.intervals.save)
      or bool(self.evaluated and every(self.intervals.evaluate))
      or stop.agreed is not None
      or self._trace.ends_with(step)
    )

  def _finish(self, item: feed_lib.Item, metrics: step_lib.Metrics, waited: float) -> None:
    """Reads a step's figures, saves and evaluates when it is time to, and writes the figures."""
    metrics = jax.device_get(metrics)
    now = time.perf_counter()
    seconds, self._clock = now - self._clock, now
    if not metrics["advanced"]:
      raise self._diverged(item, metrics)
    self.step, self.samples = self.step + 1, item.first + item.size
    self._last_samples = item.first, item.first + item.size - 1
    tokens = item.size * self.layout.length
    rate = tokens / seconds
    record = {
      "step": self.step,
      "samples_seen": self.samples,
      "tokens_seen": self.samples * self.layout.length,
      **metrics_lib.record_of(metrics),
      "tokens": tokens,
      "seconds": seconds,
      "data_wait_seconds": waited,
      "tokens_per_second": rate,
      "model_flops_per_second": rate * self.objective.config.train_flops_per_token(self.layout.length),
    }
    if self._resumed:
      record["resumed"], self._resumed = True, False
    self._record = record
    try:  # its line is written whatever becomes of these
      if self.intervals.save and self.step % self.intervals.save == 0:
        self._save()
      if self.evaluated and self.step % self.intervals.evaluate == 0:
        record |= self._evaluate()
    finally:
      if self._writer is not None:
        self._writer.write(record)
    self.console.step(
      record,
      seconds,
      item.size,
      show=bool(self.intervals.log) and self.step % self.intervals.log == 0 or "eval_loss" in record,
    )
    if "eval_loss" in record or self._saved_step == self.step:
      self._clock = time.perf_counter()  # evaluating and saving are no part of a step's time

  def _save(self) -> None:
    """Starts saving the state, unless that was done already.

    Raises:
      errors.Diverged: instead, where it is not finite: what is saved can be gone on from.
    """
    if self._saved_step == self.step or self.step == 0:
      return
    if (part := self._bad_part()) is not None:
      self._settle()
      raise divergence.of_state(
        self.step, self._last_samples, part, self._record["learning_rate"], self.folder.checkpoints
      )
    numbers = {name: self._record[name] for name in ("loss", "eval_loss") if name in self._record}
    with self._peers.patient():
      self.manager.save(
        self.step,
        self._stages.store(self.state),
        {
          "samples_seen": self.samples,
          "data": self.data.describe(),
          "metrics": numbers,
          **recorded.of(self.objective.config),
        },
      )
    self._saved_step = self.step

  def _bad_part(self) -> str | None:
    return diagnose.bad_part(self._stages, self.state, self.objective.config.dtype)

  def _evaluate(self) -> metrics_lib.Record:
    """Mean loss on the validation source, and per objective; a step that could not be evaluated is saved first."""
    try:
      with self._peers.patient():
        total = self._validation_sums()
    except Exception:
      if jax.process_count() == 1:  # the others of several would not come to save with this one
        self._save()
        self.manager.wait()
      raise
    record = {"eval_loss": float(total.loss.sum() / max(total.weight.sum(), 1.0))}
    if self._saved_step == self.step:
      self.manager.note(self.step, record)
    return record | metrics_lib.objective_losses(total.loss, total.weight, "eval_loss_")

  def _validation_sums(self) -> losses.Sums:
    layout = dataclasses.replace(self.layout, num_micro=1)
    total = losses.Sums(np.zeros(losses.NUM_OBJECTIVES), np.zeros(losses.NUM_OBJECTIVES))
    for part in self.evaluated:
      sums = jax.device_get(self._eval_step(self.state.params, self.state.frozen, layout.put(part.rows)))
      total = jax.tree.map(np.add, total, sums)
    return total

  def _stop_trace(self) -> None:
    if self._trace.stop():
      self.console.say(f"profile of steps {self._trace.steps} written to {self._trace.folder}")

  def _diverged(self, item: feed_lib.Item, metrics: step_lib.Metrics) -> errors.Diverged:
    """Of a step that could not be done: the state, its step's number and its loss scale are what they were before."""
    self._settle()
    rng = jax.random.fold_in(jax.random.wrap_key_data(self.state.rng), self.state.step)
    with self._peers.patient():
      finding = diagnose.first_not_finite(
        self.objective,
        self._stages.store(self.state).params,
        item.batch,
        -(-item.size // self.layout.rows),
        self.recipe.embedding_alpha(item.first),
        rng,
        metrics.get("loss_scale", 1.0),
      )
      finding = finding or divergence.in_the_norm(metrics) or self._again(item)
    return divergence.of_step(self.step + 1, item.first, item.size, metrics, finding, self.folder.checkpoints)

  def _again(self, item: feed_lib.Item) -> diagnose.Finding:
    """Whether the very same program comes to the same end: only if it does not are machines at fault."""
    self.state, metrics = self._train_step(self.state, item.batch, item.info)
    if jax.device_get(metrics["advanced"]):
      return diagnose.Finding("machine", "nothing that shows when it is run again")
    return diagnose.Finding("rounding", "nothing that shows when its parts are run one by one, which rounds otherwise")

  def _settle(self) -> None:
    """Waits for the checkpoint that is being written, so that it counts as one that is there."""
    with self._peers.patient(), contextlib.suppress(errors.InputError):
      self.manager.wait()
