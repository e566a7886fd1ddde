"""Forty steps of training against the original model class and torch's AdamW, on one device and on meshes."""

import dataclasses
import functools
import math
from typing import Any

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.thudm import layouts
from glmjax.train import feed
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib

GROUP = "training_curve"
ONE_DEVICE = {}


def host_batch(tokens: np.ndarray, targets: np.ndarray, context: int) -> feed.HostBatch:
  """Rows whose tokens see the first `context` tokens, themselves and what is before them; loss behind the context."""
  rows, length = tokens.shape
  place = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  return {
    "tokens": tokens,
    "targets": targets,
    "loss_weights": (place >= context).astype(np.float32),
    "positions": place,
    "attend_start": np.zeros_like(place),
    "attend_end": np.maximum(place + 1, context),
    "objective": np.zeros_like(place),
  }


@pytest.mark.parametrize(
  "sizes, micro_batches", [(ONE_DEVICE, 1), (dict(data=2, fsdp=2, tensor=2), 2)], ids=["one_device", "mesh"]
)
def test_losses_norms_and_final_parameters(sizes: dict[str, int], micro_batches: int):
  described, arrays = golden_models.load(GROUP)
  group = described["model"].split(":")[0]
  settings = described["optimizer"]
  optimizer = optimizer_lib.AdamW(
    *settings["betas"], settings["epsilon"], settings["weight_decay"], settings["clip_norm"]
  )
  recipe = step_lib.Recipe(
    optimizer, schedules.Constant(settings["learning_rate"]), schedules.Constant(described["embedding_gradient_alpha"])
  )
  config, tx = golden_models.config(group), optimizer.make()
  sizes = {"data": 1} | sizes
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
  rows, length = described["rows"], described["length"]
  layout = feed.Layout.make(
    mesh, partitioning.FSDP, rows, rows // micro_batches, length, config.position_kind, config.vocab_size
  )
  losses, norms = [], []
  with partitioning.use(mesh, partitioning.FSDP):
    abstract = state_lib.abstract(config, tx, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    state = state_lib.create(config, tx, 0, abstract)  # Adam's moments begin with zeros, whatever the parameters
    state = dataclasses.replace(state, params=jax.device_put(golden_models.params(group), shardings.params))
    step = step_lib.compile_train_step(objective_lib.Objective(config), recipe, tx, shardings)
    for i in range(described["steps"]):
      batch = layout.put(host_batch(arrays["tokens"][i], arrays["targets"][i], described["context"]))
      state, metrics = step(state, batch, step_lib.StepInfo(*map(jnp.uint32, (i * rows, i * rows, rows))))
      losses.append(float(metrics["loss"]))
      norms.append(float(metrics["grad_norm"]))
  golden_models.close(GROUP, "losses of 40 steps", losses, arrays["losses"], 5e-5)
  golden_models.close(GROUP, "gradient norms of 40 steps", norms, arrays["grad_norms"], 5e-5, 5e-5)
  ours = arrays_by_original_name(config, jax.device_get(state.params))
  final = {key.removeprefix("final/"): x for key, x in arrays.items() if key.startswith("final/")}
  assert final
  for name, expected in final.items():
    golden_models.close(GROUP, "final parameters", ours[name], expected, 1e-4, case=name)


def arrays_by_original_name(config: config_lib.GLMConfig, params: Any) -> golden_models.Arrays:
  """Our stacked parameters, each layer's apart, in the original's layout."""
  found = {}
  for entry in layouts.entries("glm-130b", config):
    x = functools.reduce(lambda tree, name: tree[name], entry.name.split("/"), params)
    for i, key in enumerate(entry.keys(config.num_layers)):
      found[key] = entry.to_theirs(x[i] if entry.stacked else x)
  return found
