"""Training as users set it up: what is checked, read and locked before the first step (run.py has the steps)."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from glmjax import errors
from glmjax import ranges
from glmjax.checkpoint import manager as manager_lib
from glmjax.io import paths
from glmjax.io import publish
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.parallel import peers as peers_lib
from glmjax.parallel import processes
from glmjax.train import base as base_lib
from glmjax.train import checks
from glmjax.train import compute
from glmjax.train import diagnose
from glmjax.train import divergence
from glmjax.train import evaluation
from glmjax.train import feed as feed_lib
from glmjax.train import initial
from glmjax.train import interventions
from glmjax.train import layers as layers_lib
from glmjax.train import metrics as metrics_lib
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import pipeline as pipeline_lib
from glmjax.train import preference as preference_lib
from glmjax.train import probe as probe_lib
from glmjax.train import profile
from glmjax.train import run as run_lib
from glmjax.train import runtime as runtime_lib
from glmjax.train import saving as saving_lib
from glmjax.train import schedules
from glmjax.train import spikes as spikes_lib
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib
from glmjax.train import stopping
from glmjax.train import trainable as trainable_lib
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
  layers: int = 0  # how each layer fares, a line of WORKDIR/layers.jsonl
  profile: Sequence[int] = ()  # (first, last) steps traced into WORKDIR/profile

  def __post_init__(self) -> None:
    for name in ("log", "evaluate", "save", "layers"):
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
  workdir: paths.Named,
  batches: schedules.Batches,  # rows of a step, as a function of samples seen
  total_samples: int,
  learning_rate: schedules.Schedule,
  optimizer: optimizer_lib.AdamW | optimizer_lib.Muon = optimizer_lib.AdamW(),
  embedding_alpha: schedules.Schedule = schedules.Constant(1.0),  # the embedding gradient shrink's factor; 1: none
  loss_scale: state_lib.DynamicLossScale = state_lib.DynamicLossScale(),  # of float16 models
  validation: feed_lib.DataSource | None = None,  # evaluated every intervals.evaluate steps
  probe: feed_lib.DataSource | None = None,  # evaluated before the first step and at the end: what is forgotten
  intervals: Intervals = Intervals(),
  spikes: spikes_lib.Guard | None = None,  # what is done about steps that are far above those before; None: nothing
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig(),
  strategy: str = "fsdp",  # what is split over the mesh's data and fsdp, one of partitioning.STRATEGIES
  pipeline: pipeline_lib.PipelineConfig = pipeline_lib.PipelineConfig(),  # how rows flow through a mesh's stages
  micro_batch: int | None = None,  # rows computed at a time, over all devices; None: the whole batch
  loss_chunk: int = 1024,  # tokens of a batch shard whose logits exist at a time
  loss_mean_of: str = "tokens",  # what weighs the same in the loss, one of objective.MEANS
  preference: preference_lib.Preference | None = None,  # the loss of data that are pairs of answers
  watch: peers_lib.Watch = peers_lib.Watch(),  # how long a process may be silent, or a step take, among several
  weights: paths.Named | None = None,  # an export, import or run that a new run begins with; None: random
  trainable: trainable_lib.Trainable | None = None,  # an adapter of `weights`, which stay as they are; None: all trains
  seed: int = 0,
  stop_at_step: int | None = None,  # save and return there, as if interrupted
  overwrite: bool = False,  # delete the run found in workdir and start anew
  on_start: Callable[[paths.Path], None] | None = None,  # called with workdir once that is this run's
) -> dict[str, Any]:
  """Trains a model until it has seen `total_samples`, resuming the run found in `workdir`; returns the last step's
  figures.

  Raises:
    errors.InputError: for what the user can mend.
    errors.Diverged: when a loss, a gradient or the state is not finite, of which nothing is saved; when a spike is one
      too many.
    SystemExit: 128 + the signal's number, after SIGTERM or Ctrl-C in any process: the step was finished and saved.
  """
  given = dict(locals())  # of each process, to be compared
  # 1. What the settings tell by themselves, before anything is deleted.
  checks.rows(model, data, loss_mean_of)
  checks.numbers(batches, total_samples, micro_batch, loss_chunk, seed, stop_at_step)
  folder = workdir_lib.Workdir.named(workdir, weights)
  base = base_lib.Base.of(trainable, weights, model, data.describe())
  checks.preference(preference, data, base, mesh)
  checks.embedding(embedding_alpha, base)
  own, reference = model, model if preference is not None and preference.compares else None
  if base is not None:
    model = base.trainable.adapt(model)
  elif weights is not None and (overwrite or not manager_lib.steps(folder.checkpoints)):
    base_lib.check(weights, model, data.describe())
  # 2. The processes meet, before JAX looks for devices: it asks all of them.
  with watch.on() as peers, contextlib.ExitStack() as stack:
    device_mesh, rules = mesh_lib.make_mesh(mesh), partitioning.strategy(strategy)
    stack.enter_context(partitioning.use(device_mesh, rules))
    layout = _layout(model, data, batches, micro_batch, intervals.eval_samples, device_mesh, rules)
    # 3. The rows to be evaluated, so that a run that could not evaluate deletes nothing and never starts.
    evaluates = validation is not None and intervals.evaluate
    evaluated = feed_lib.read_held_out(validation, layout, intervals.eval_samples, "validation") if evaluates else []
    if evaluates:
      checks.kind("validation", validation, preference)
    text = probe_lib.Text.read(probe, layout, intervals.eval_samples)
    tx = optimizer.make()
    recipe = step_lib.Recipe(optimizer, learning_rate, embedding_alpha, loss_scale, tells_layers=bool(intervals.layers))
    flow = pipeline_lib.make(pipeline, model, device_mesh, layout.rows)
    checks.layers(intervals.layers, flow)
    objective = objective_lib.Objective(model, loss_chunk, loss_mean_of, flow, preference, reference)
    stages = _stages(model, tx, device_mesh, rules, flow, base)
    runtime = runtime_lib.Runtime(objective, layout, stages, peers)
    _check_same(given | {"validation": validation if evaluates else None})
    # 4. The first process locks the folder, and opens it, or deletes what is there; all see the same one.
    described = {} if base is None else base.describe()  # by all processes, which then know that they adapt one model
    processes.check_same({"the model in loop.train.weights": described.get("fingerprint", "none is adapted")})
    loss = "" if preference is None else type(preference).__name__
    opened = functools.partial(folder.open, model, data, overwrite, described, loss)
    processes.on_first(lambda: _begin(stack, folder, opened, on_start))
    folder.check_shared()
    manager = manager_lib.Manager(folder.checkpoints, intervals.keep, keep_best="eval_loss" if evaluated else None)
    stack.callback(manager.close)
    # 5. The steps, from the newest undamaged checkpoint or a new state on.
    beginning = initial.Beginning(weights, base, data.describe(), seed, loss_scale)
    samples = run_lib.Samples(data, batches, total_samples, stop_at_step)
    probed = text and probe_lib.Probe(runtime, own, text, folder.probe, adapts=base is not None)
    return _Attempts(
      runtime, recipe, tx, beginning, manager, folder, intervals, samples, evaluated, probed, spikes
    ).train()


@dataclasses.dataclass(frozen=True)
class _Attempts:
  """Trains from the newest checkpoint on; again from there, without some samples, where a spike sends the run back."""

  runtime: runtime_lib.Runtime
  recipe: step_lib.Recipe
  tx: optax.GradientTransformation
  beginning: initial.Beginning
  manager: manager_lib.Manager
  folder: workdir_lib.Workdir
  intervals: Intervals
  samples: run_lib.Samples
  evaluated: list[feed_lib.Evaluated]
  probe: probe_lib.Probe | None
  guard: spikes_lib.Guard | None

  def train(self) -> dict[str, Any]:
    """Does the steps; returns the last one's figures."""
    journal = interventions.Journal(self.folder, self.guard, self.samples.batches)
    runtime, program, spike, resumed_at = self.runtime, None, None, None
    shardings = jax.tree.map(lambda x: x.sharding, runtime.stages.in_stages)
    with contextlib.ExitStack() as scope:
      path = self.folder.compute(jax.process_index())
      session = scope.enter_context(contextlib.closing(compute.Session(path, runtime.layout.mesh)))
      while True:
        with contextlib.closing(self._begin(journal, session, spike)) as run:
          if spike is None:
            program = run.compile(step_lib.compile_train_step(runtime.objective, self.recipe, self.tx, shardings))
            session.begin(run.step)
            resumed_at = run.resumed_at
            stop = scope.enter_context(stopping.Stopping(runtime.layout.mesh))
          else:
            run.use(program, spike, resumed_at)
          try:
            return run.run(stop)
          except spikes_lib.GoBack as error:
            spike = error.spike

  def _begin(
    self, journal: interventions.Journal, session: compute.Session, spike: spikes_lib.Spike | None
  ) -> run_lib.Run:
    """Takes the newest undamaged checkpoint, or a new state: in the model's order, then in the stages' order.

    Args:
      journal: what was done about spikes.
      session: counts what it costs.
      spike: that which sends the run back; None: it is about to begin.
    """
    runtime, stages = self.runtime, self.runtime.stages
    with contextlib.nullcontext() if spike is None else runtime.peers.patient():
      state, resumed = self.beginning.state(self.manager, runtime.objective.config, self.tx, stages.as_checkpointed)
      start = run_lib.Start(stages.put_in_stages(state), resumed)
      journal.begin(start.step)
      if spike is not None:
        journal.add(spike, back_to=start.step)
      batches = self.samples.batches
      batches = dataclasses.replace(batches, skip=[*batches.skip, *journal.left_out])
      samples = dataclasses.replace(self.samples, batches=batches)
      hooks = self._hooks(start, journal, session)
      run = run_lib.Run(runtime, self.recipe, samples, self.folder, hooks, start)
      try:
        _check_start(runtime, start, self.folder, self.beginning.weights)
        if self.probe is not None and spike is None:
          self.probe.begin(start.state, start.resumed)
      except BaseException:
        run.close()
        raise
      return run

  def _hooks(self, start: run_lib.Start, journal: interventions.Journal, session: compute.Session) -> run_lib.Hooks:
    """Makes what the run does besides its steps; the first process alone writes and prints, but for what it costs."""
    first, runtime, folder = jax.process_index() == 0, self.runtime, self.folder
    writer = metrics_lib.Writer(folder.metrics, folder.tensorboard, start.step) if first else None
    layers, saved = self._layers(start), start.step if start.resumed else None
    lines = [each.lines.file for each in (writer, layers) if each is not None and each.lines is not None]
    return run_lib.Hooks(
      saving_lib.Saving(runtime, self.manager, folder, self.samples.data, lines, self.intervals.save, saved),
      evaluation.Evaluation(runtime, self.evaluated, self.intervals.evaluate),
      self.probe,
      profile.Trace(self.intervals.profile, folder.root / "profile"),
      metrics_lib.Console(self.samples.total, start.samples_seen, silent=not first),
      self.intervals.log,
      writer,
      self._detector(start, writer),
      journal,
      layers,
      session,
    )

  @functools.cached_property
  def _forward(self) -> Any:
    """The program that looks into layers, the same one after each way back."""
    return layers_lib.compile_forward(self.runtime.objective)

  def _layers(self, start: run_lib.Start) -> layers_lib.Layers | None:
    """Makes what tells how layers fare, where that is asked for; where not, lines of steps behind the start go."""
    first, path = jax.process_index() == 0, self.folder.layers
    if self.intervals.layers:
      lines = metrics_lib.Lines(path, start.step, of_each_step=False) if first else None
      return layers_lib.Layers(self._forward, self.intervals.layers, lines)
    if first and not start.step:
      publish.remove(path)
    elif first and path.exists():
      metrics_lib.Lines(path, start.step, of_each_step=False).close()
    return None

  def _detector(self, start: run_lib.Start, writer: metrics_lib.Writer | None) -> spikes_lib.Detector | None:
    """Makes what looks for spikes, with the figures of the steps before, which the first process reads."""
    guard, mesh = self.guard, self.runtime.layout.mesh
    if guard is None:
      return None
    records = processes.from_first(
      lambda: metrics_lib.last_steps(writer.lines.file.local, start.step, guard.window + 1)
    )
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return spikes_lib.Detector(guard, start.state.params, replicated, records)


def _check_same(settings: Mapping[str, Any]) -> None:
  """Raises InputError, in all processes, where one of several was started with other settings than process 0.

  The folder may have another name on each host, and `on_start` is no setting.
  """
  address = re.compile(" at 0x[0-9a-f]+")  # of a function: where it lies in this process's memory
  texts = {}
  for name in settings.keys() - {"workdir", "on_start"}:
    value = settings[name]
    value = value.describe() if hasattr(value, "describe") else str(value) if name == "weights" and value else value
    texts[f"loop.train, {name}"] = address.sub("", repr(value))
  processes.check_same(dict(sorted(texts.items())))


def _begin(
  stack: contextlib.ExitStack,
  folder: workdir_lib.Workdir,
  opened: Callable[[], None],
  on_start: Callable[[paths.Path], None] | None,
) -> None:
  """Locks the folder, opens it, and tells the caller; the lock stays with the stack."""
  stack.enter_context(folder.locked())
  opened()
  if on_start is not None:
    on_start(folder.root)


def _stages(
  model: config_lib.GLMConfig,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  rules: partitioning.Rules,
  flow: pipeline_lib.Pipeline | None,
  base: base_lib.Base | None,
) -> stage_layout.StageLayout:
  """Lays the state out, with what is frozen of it."""
  if base is None:
    return stage_layout.make(model, tx, mesh, rules, flow)
  return stage_layout.make(model, tx, mesh, rules, flow, base.trainable.is_trained, base.bits)


def _layout(
  model: config_lib.GLMConfig,
  data: feed_lib.DataSource,
  batches: schedules.Batches,
  micro_batch: int | None,
  eval_samples: int,
  mesh: jax.sharding.Mesh,
  rules: partitioning.Rules,
) -> feed_lib.Layout:
  """Lays batches out on the devices; checks every size that the run will come to."""
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


def _check_start(
  runtime: runtime_lib.Runtime, start: run_lib.Start, folder: workdir_lib.Workdir, weights: paths.Named | None
) -> None:
  """Raises an error where what the run begins with is not finite; `weights`: what a new one was given."""
  if (part := diagnose.bad_frozen(start.state.frozen, runtime.objective.config.dtype)) is not None:
    raise errors.NotFiniteError(
      f"{weights} cannot be computed with in {runtime.objective.config.dtype}: {part}; give another dtype, or model"
    )
  part = runtime.bad_part(start.state)
  if part is None:
    return
  if start.resumed:
    raise divergence.of_checkpoint(start.step, start.samples_seen, part, folder.checkpoints)
  if weights is not None:
    raise errors.NotFiniteError(
      f"{weights} is no model to begin with: not finite in {part}; give an older checkpoint, or another model"
    )
  raise errors.NotFiniteError(f"a new model would not be finite in {part}: give a smaller GLMConfig.init_std")
