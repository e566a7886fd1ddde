"""layers.jsonl: its figures are those of a plain computation, on any mesh, and training does not change for them."""

import dataclasses
import functools
import json
import operator
import shutil
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import packed
import pytest

from glmjax import errors
from glmjax.checkpoint import manager as manager_lib
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import rotary
from glmjax.models import statistics
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.train import layers
from glmjax.train import loop
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import trainable

ONE, EIGHT = mesh_lib.MeshConfig(data=1), mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)
BATCH, LENGTH = 12, 16
PARTS = {"embedding", "layers", "final_norm"}
NORMS = ("grad_norm", "update_norm", "param_norm")
RMS = ("residual_rms", "attention_rms", "mlp_rms")
OF_LAYERS = (*RMS, "attention_logit_max")
OF_LOGITS = ("log_z_mean", "log_z_max")


# --- the forward figures


@functools.cache
def params_of(config: config_lib.GLMConfig) -> Any:
  """Random in every array, so that no bias is 0."""
  leaves, structure = jax.tree.flatten(glm.init_params(config, jax.random.key(0)))
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return structure.unflatten([x + 0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves)])


def of_micro_batch(size: int) -> tuple[dict[str, np.ndarray], np.uint32]:
  """A micro-batch whose rows behind `size` only fill it up, in the shape of a step's."""
  rows = packed.rows(BATCH, LENGTH, 64) | {"rows": np.arange(BATCH, dtype=np.int32)}
  return {name: feature[None] for name, feature in rows.items()}, np.uint32(size)


def expected(config: config_lib.GLMConfig, params: Any, count: int) -> dict[str, Any]:
  """Computes the figures of the first `count` rows as the module's formulas are written."""
  params = jax.tree.map(np.asarray, params)
  batch, _ = of_micro_batch(count)
  rows = {name: feature[0, :count] for name, feature in batch.items()}
  cos_sin = rotary.tables(config, rows["positions"])
  found: dict[str, list[float]] = {name: [] for name in OF_LAYERS}
  keys = np.arange(LENGTH)
  end = np.minimum(rows["attend_end"], keys + 1) if config.causal else rows["attend_end"]
  sees = (keys >= rows["attend_start"][..., None]) & (keys < end[..., None])

  def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))

  def norm(x: np.ndarray, of: dict[str, np.ndarray]) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.layer_norm_epsilon)
    return x * of["scale"] + of["bias"]

  def attend(x: np.ndarray, of: dict[str, Any]) -> np.ndarray:
    qkv = np.einsum("bld,dthk->tblhk", x, of["qkv"]["kernel"]) + of["qkv"]["bias"][:, None, None]
    q, k = (np.asarray(rotary.rotate(part, cos_sin, config.position_kind.rotary_parts)) for part in qkv[:2])
    scores = np.where(sees[:, None], np.einsum("blhk,bmhk->bhlm", q, k) / config.head_dim**0.5, -np.inf)
    found["attention_logit_max"].append(float(scores.max()))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("bhlm,bmhk->blhk", weights / weights.sum(-1, keepdims=True), qkv[2])
    return np.einsum("blhk,hkd->bld", out, of["out"]["kernel"]) + of["out"]["bias"]

  def mlp(x: np.ndarray, of: dict[str, Any]) -> np.ndarray:
    one, two = np.einsum("bld,dtf->tblf", x, of["wi"]["kernel"]) + of["wi"]["bias"][:, None, None]
    return (one * np.asarray(jax.nn.gelu(two, approximate=False))) @ of["wo"]["kernel"] + of["wo"]["bias"]

  x = params["embedding"]["table"][rows["tokens"]]
  for i in range(config.num_layers):
    of = jax.tree.map(operator.itemgetter(i), params["layers"])
    found["residual_rms"].append(rms(x))
    for name, sublayer in (("attention", attend), ("mlp", mlp)):
      y = norm(x, of[f"{name}_norm"])
      out = sublayer(y, of[name])
      if config.norm == "sandwich":
        out = norm(out, of[f"{name}_output_norm"])
      found[f"{name}_rms"].append(rms(out))
      x = (config.alpha * y if config.norm in ("deepnorm", "post") else x) + out
  found["residual_rms"].append(rms(x))
  logits = (norm(x, params["final_norm"]) @ params["embedding"]["table"].T)[rows["loss_weights"] > 0]
  log_z = np.log(np.exp(logits - logits.max()).sum(-1)) + logits.max()
  return found | {"log_z_mean": float(log_z.mean()), "log_z_max": float(log_z.max())}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("norm", config_lib.NORMS)
def test_figures_are_those_of_a_plain_computation(tiny, norm, scan):
  """Of the first eight rows, and not of what fills a batch up."""
  config = dataclasses.replace(tiny, norm=norm, scan_layers=scan, causal=norm == "pre", remat="full")
  params = params_of(dataclasses.replace(tiny, norm=norm))
  program = layers.compile_forward(objective_lib.Objective(config, chunk=16))
  for size, count in ((BATCH, 8), (5, 5)):
    figures, again = jax.device_get(program(params, {}, *of_micro_batch(size)))
    assert again == size
    chex.assert_trees_all_close(jax.tree.map(lambda x: x.tolist(), figures), expected(config, params, count), rtol=2e-4)


def test_nothing_in_the_loss(tiny):
  batch, size = of_micro_batch(8)
  batch["loss_weights"] = np.zeros_like(batch["loss_weights"])
  figures, _ = layers.compile_forward(objective_lib.Objective(tiny))(params_of(tiny), {}, batch, size)
  assert not np.isfinite(figures["log_z_mean"]) and np.isfinite(figures["residual_rms"]).all()


def test_a_model_that_nobody_asks_notes_nothing(tiny, monkeypatch):
  """Nor does one that is being made: the programs are what they are without any notes."""
  tokens = np.zeros((1, 4), np.int32)

  def programs() -> tuple[str, str]:
    model, arrays = glm.GLM(tiny), (tokens, tokens, tokens, tokens + 1)
    made = jax.make_jaxpr(model.init)(jax.random.key(0), *arrays)
    return str(made), str(jax.make_jaxpr(model.apply)({"params": params_of(tiny)}, *arrays))

  with_notes = programs()
  monkeypatch.setattr(statistics, "note", lambda *_: None)
  assert programs() == with_notes


# --- the lines of runs


def train(workdir, config, source, mesh=ONE, every=2, **changes) -> dict[str, Any]:
  intervals = loop.Intervals(log=0, save=changes.pop("save", 0), layers=every)
  arguments = dict(
    batches=schedules.Batches(16),
    total_samples=96,
    learning_rate=schedules.Constant(1e-2),
    mesh=mesh,
    intervals=intervals,
  )
  with pytest.MonkeyPatch.context() as patch:
    if mesh == ONE:  # of the eight devices here
      patch.setattr(mesh_lib, "make_mesh", functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:1]))
    return loop.train(config, source, workdir, **arguments | changes)


def lines(workdir, name: str = "layers") -> list[dict[str, Any]]:
  return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def losses(workdir) -> list[float]:
  return [line["loss"] for line in lines(workdir, "metrics")]


def sums(workdir) -> dict[str, str]:
  """Checksums of the newest checkpoint's arrays, by name."""
  step = manager_lib.steps(workdir / "checkpoints")[-1]
  record = manager_lib.read_record(workdir / "checkpoints" / str(step))
  return {name: entry["sum"] for name, entry in record["arrays"].items()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny, source):
  """The folder of a run with a line for each step, and (step, that of the newest line) at each of its checkpoints."""
  folder, seen = tmp_path_factory.mktemp("unbroken"), []
  save = manager_lib.Manager.save

  def look(self: manager_lib.Manager, step: int, *args: Any, **more: Any) -> bool:
    seen.append((step, lines(folder)[-1]["step"]))
    return save(self, step, *args, **more)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(manager_lib.Manager, "save", look)
    train(folder, tiny, source, every=1, save=4)
  return folder, seen


def test_what_a_line_has(unbroken, tiny):
  folder, at_checkpoints = unbroken
  assert at_checkpoints == [(4, 4), (6, 6)]  # each line is there before its checkpoint
  found, steps = lines(folder), lines(folder, "metrics")
  assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
  for line in found:
    of_step = steps[line["step"] - 1]
    assert line["samples_seen"] == of_step["samples_seen"] and "layers" not in of_step
    assert {*line} == {"step", "samples_seen", *NORMS, *OF_LAYERS, *OF_LOGITS}
    for name in OF_LAYERS:
      assert len(line[name]) == tiny.num_layers + (name == "residual_rms")
    for name in NORMS:
      assert {*line[name]} == PARTS and len(line[name]["layers"]) == tiny.num_layers
    squares = [np.square(value).sum() for value in line["grad_norm"].values()]
    assert sum(squares) ** 0.5 == pytest.approx(of_step["grad_norm"], rel=1e-5)
    assert line["log_z_max"] >= line["log_z_mean"]


@pytest.mark.parametrize(
  "dtype, micro_batch, rtol", [("float32", None, 1e-4), ("float32", 4, 1e-4), ("float16", None, 2e-2)]
)
def test_norms_are_those_of_a_plain_gradient(unbroken, tmp_path, tiny, source, dtype, micro_batch, rtol):
  """In micro-batches, and of float16's scaled loss too."""
  folder = unbroken[0]
  if (dtype, micro_batch) != ("float32", None):
    folder = tmp_path
    config = dataclasses.replace(tiny, dtype=dtype)
    train(folder, config, source, every=1, micro_batch=micro_batch, stop_at_step=1)
  line = lines(folder)[0]
  mesh, tx = mesh_lib.make_mesh(ONE, jax.devices()[:1]), optimizer_lib.AdamW().make()
  with partitioning.use(mesh):
    state = state_lib.create(tiny, tx, 0, state_lib.abstract(tiny, tx, mesh))
  batch = next(source.batches(iter([(0, 16)])))
  objective = objective_lib.Objective(tiny)
  grads = jax.jit(jax.grad(lambda params: objective.loss(params, batch).total / batch["loss_weights"].sum()))(
    state.params
  )
  factor = min(1.0, 1.0 / float(jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(grads)))))
  updates, _ = tx.update(jax.tree.map(lambda g: g * factor, grads), state.opt_state, state.params)
  for kind, tree in zip(NORMS, (grads, updates, state.params)):
    for part in PARTS:
      squares = [np.square(np.asarray(x)) for x in jax.tree.leaves(tree[part])]
      if part == "layers":
        norms = [np.sqrt(sum(x[i].sum() for x in squares)) for i in range(tiny.num_layers)]
      else:
        norms = np.sqrt(sum(x.sum() for x in squares))
      np.testing.assert_allclose(line[kind][part], norms, rtol=rtol)


@pytest.mark.emitters
def test_training_is_the_same_to_the_bit(unbroken, tmp_path, tiny, source, caplog):
  """Switched on later, or never; nor are lines missing of steps that were to have none."""
  folder, _ = unbroken
  train(tmp_path, tiny, source, every=0, stop_at_step=5)
  assert not (tmp_path / "layers.jsonl").exists()
  train(tmp_path, tiny, source)
  assert losses(tmp_path) == losses(folder) and sums(tmp_path) == sums(folder)
  assert lines(tmp_path) == lines(folder)[5:]
  assert "missing" not in caplog.text


@pytest.mark.parametrize("strategy", ["fsdp", "zero1"])
def test_a_mesh_has_the_figures_of_one_device(unbroken, tmp_path, tiny, source, strategy):
  config = dataclasses.replace(tiny, scan_layers=strategy == "fsdp")
  train(tmp_path, config, source, EIGHT, strategy=strategy, stop_at_step=2)
  chex.assert_trees_all_close(lines(tmp_path), lines(unbroken[0])[1:2], rtol=1e-3)


def test_more_shards_of_rows_than_rows_that_are_looked_at(tiny, monkeypatch):
  """All of the eight have a row, and two count."""
  monkeypatch.setattr(layers, "ROWS", 2)
  params, objective = params_of(tiny), objective_lib.Objective(tiny, chunk=16)
  batch, size = of_micro_batch(BATCH)
  batch = {name: feature[:, :8] for name, feature in batch.items()}
  with partitioning.use(mesh_lib.make_mesh(mesh_lib.MeshConfig(data=8))):
    figures, _ = layers.compile_forward(objective)(params, {}, batch, size)
  chex.assert_trees_all_close(jax.tree.map(lambda x: x.tolist(), figures), expected(tiny, params, 2), rtol=2e-4)


def test_resumed_has_the_lines_of_the_unbroken(unbroken, tmp_path, tiny, source):
  """Also where a killed run had gone further than its checkpoint."""
  train(tmp_path, tiny, source, stop_at_step=3)
  with open(tmp_path / "layers.jsonl", "a") as file:
    file.write('{"step": 4, "log_z_max": 1.0}\n{"step": 6, "lo')
  train(tmp_path, tiny, source)
  assert lines(tmp_path) == lines(unbroken[0])[1::2]


def test_lines_of_steps_that_are_done_anew_go_where_nobody_asks_for_more(unbroken, tmp_path, tiny, source):
  """Of a killed run that had gone further than its checkpoint, or had none."""
  for name, lost, left in (("one", "6", [1, 2, 3, 4]), ("all", ".", None)):
    folder = shutil.copytree(unbroken[0], tmp_path / name)
    shutil.rmtree(folder / "checkpoints" / lost)
    train(folder, tiny, source, every=0, stop_at_step=5 if left else 1)
    assert left == ([line["step"] for line in lines(folder)] if (folder / "layers.jsonl").exists() else None)


def test_an_adapter_has_norms_of_what_is_trained(unbroken, tmp_path, tiny, source):
  """And the figures of the whole model, which it does not change at first."""
  train(tmp_path / "one", tiny, source, every=1, weights=unbroken[0], trainable=trainable.LoRA(rank=2), stop_at_step=1)
  train(tmp_path / "all", tiny, source, every=1, weights=unbroken[0], stop_at_step=1)
  [line], [whole] = lines(tmp_path / "one"), lines(tmp_path / "all")
  assert all({*line[name]} == {"layers"} for name in NORMS)
  for name in (*OF_LAYERS, *OF_LOGITS):
    np.testing.assert_allclose(line[name], whole[name], rtol=1e-5)


def test_refused_with_stages(tmp_path, tiny, source):
  message = (
    "Intervals.layers = 2 .* does not go through pipelines: give a mesh without stage=2, or Intervals.layers = 0"
  )
  with pytest.raises(errors.InputError, match=message):
    train(tmp_path / "run", tiny, source, mesh_lib.MeshConfig(data=4, stage=2))
  assert not (tmp_path / "run").exists()
