"""Thirty steps of fine-tuning against the original's code: LoRA by PEFT, P-Tuning v2 by ChatGLM's own."""

import dataclasses
import functools
import math
import re
from typing import Any

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.infer import prompt as prompt_lib
from glmjax.infer import rows as rows_lib
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.thudm import layouts
from glmjax.train import feed
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib
from glmjax.train import trainable as trainable_lib

BASE = "chatglm6b_tiny"
IGNORED = -100  # of labels
ATOL, RTOL, FINAL = 1e-4, 1e-3, 1e-3  # the JSONs' tolerances
MESHES = {"one_device": {}, "mesh": dict(data=2, tensor=2)}


def model() -> config_lib.GLMConfig:
  return golden_models.config(BASE, residual_alpha=math.sqrt(56))


def host_batch(config: config_lib.GLMConfig, ids: np.ndarray, labels: np.ndarray) -> feed.HostBatch:
  """Rows as the original model reads them: a context up to its blank, sop and the answer, padding."""
  specials = golden_models.specials(BASE)
  prompts = []
  for row in ids.tolist():
    context = row.index(specials.sop)
    prompts.append(
      prompt_lib.extend(prompt_lib.fill(row[:context], specials, config.position_kind), row[context + 1 :])
    )
  batch = rows_lib.pad(prompts, specials.pad, *ids.shape)
  targets = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
  return {
    "tokens": batch.tokens,
    "targets": np.where(targets == IGNORED, 0, targets).astype(np.int32),
    "loss_weights": (targets != IGNORED).astype(np.float32),
    "positions": config.position_kind.of_model(batch.positions),
    "attend_start": batch.start,
    "attend_end": batch.end,
    "objective": np.zeros_like(batch.tokens),
  }


@dataclasses.dataclass(frozen=True)
class Tuning:
  """What one case trains, and what came of it."""

  trainable: trainable_lib.Trainable
  config: config_lib.GLMConfig
  start: dict[str, Any]  # trained parameters
  arrays: golden_models.Arrays  # by names without the case's

  def train(self, described: dict[str, Any], sizes: dict[str, int]) -> tuple[list[float], Any]:
    """Returns the losses, and the trained parameters in the end."""
    learning_rate = float(re.search(r"learning rate ([\de.+-]+)", described["optimizer"])[1])
    sizes = {"data": 1} | sizes
    optimizer = optimizer_lib.AdamW(0.9, 0.999, 1e-8, weight_decay=0.0, clip_norm=1e9)
    recipe = step_lib.Recipe(optimizer, schedules.Constant(learning_rate))
    mesh, tx = (
      mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())]),
      optimizer.make(),
    )
    ids, labels = self.arrays["input_ids"], self.arrays["labels"]
    rows, length = ids.shape[1:]
    config, losses = self.config, []
    layout = feed.Layout.make(mesh, partitioning.FSDP, rows, rows, length, config.position_kind, config.vocab_size)
    with partitioning.use(mesh, partitioning.FSDP):
      abstract = state_lib.abstract(config, tx, mesh, is_trained=self.trainable.is_trained)
      shardings = jax.tree.map(lambda x: x.sharding, abstract)
      state = state_lib.create(config, tx, 0, abstract, is_trained=self.trainable.is_trained)
      frozen = jax.device_put(golden_models.params(BASE), shardings.frozen)
      state = dataclasses.replace(state, params=jax.device_put(self.start, shardings.params), frozen=frozen)
      step = step_lib.compile_train_step(objective_lib.Objective(config), recipe, tx, shardings)
      for i in range(described["steps"]):
        batch = layout.put(host_batch(config, ids[i % len(ids)], labels[i % len(ids)]))
        state, metrics = step(state, batch, step_lib.StepInfo(*map(jnp.uint32, (i * rows, i * rows, rows))))
        losses.append(float(metrics["loss"]))
      jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen), golden_models.params(BASE))
    return losses, jax.device_get(state.params)

  def logits(self, trained: Any, rows: int) -> np.ndarray:
    """Logits of the first rows of the first batch."""
    batch = host_batch(self.config, self.arrays["input_ids"][0], self.arrays["labels"][0])
    names = ("tokens", "positions", "attend_start", "attend_end")
    read = [jnp.asarray(batch[name][:rows]) for name in names]
    params = params_lib.merge(trained, jax.tree.map(jnp.asarray, golden_models.params(BASE)))
    return jax.jit(functools.partial(glm.GLM(self.config).apply))({"params": params}, *read)

  def gradients(self) -> Any:
    """Gradients of what is trained, of the first batch."""
    batch = host_batch(self.config, self.arrays["input_ids"][0], self.arrays["labels"][0])
    batch = jax.tree.map(jnp.asarray, batch) | {"rows": jnp.arange(len(batch["tokens"]))}
    frozen = jax.tree.map(jnp.asarray, golden_models.params(BASE))

    def loss(trained: Any) -> jax.Array:
      sums = objective_lib.Objective(self.config).loss(params_lib.merge(trained, frozen), batch)
      return sums.total / batch["loss_weights"].sum()

    return jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, self.start))


KERNELS = {
  "query_key_value": "attention/qkv",
  "dense": "attention/out",
  "dense_h_to_4h": "mlp/wi",
  "dense_4h_to_h": "mlp/wo",
}


@functools.cache
def lora() -> tuple[dict[str, Any], Tuning]:
  described, arrays = golden_models.load("lora")
  kernels = [KERNELS[name] for name in described["target_modules"]]
  trainable = trainable_lib.LoRA(described["r"], described["lora_alpha"], described["lora_dropout"], kernels)
  config = trainable.adapt(model())
  return described, Tuning(trainable, config, factors(config, arrays, "start/"), arrays)


def factors(config: config_lib.GLMConfig, arrays: golden_models.Arrays, prefix: str) -> dict[str, Any]:
  """PEFT's factors as our stacked tree."""
  found = {}
  for entry in layouts.adapters("chatglm-6b", config):
    whole = [slice(0, size) for size in entry.rows]
    found[entry.name] = np.stack([entry.to_ours(arrays[prefix + key], whole) for key in entry.keys(config.num_layers)])
  return params_lib.nest(found)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_lora(sizes: dict[str, int]):
  described, tuning = lora()
  arrays = tuning.arrays
  losses, final = tuning.train(described, sizes)
  golden_models.close("lora", "losses of 30 steps", losses, arrays["losses"], ATOL)
  expected = factors(tuning.config, arrays, "final/")
  jax.tree.map(lambda a, b: golden_models.close("lora", "final factors", a, b, FINAL), final, expected)
  if not sizes:
    logits = arrays["final_logits"]
    golden_models.close("lora", "logits in the end", tuning.logits(expected, len(logits)), logits, ATOL, RTOL)


def test_lora_begins_as_peft():
  _, tuning = lora()
  logits = tuning.arrays["logits"]
  golden_models.close("lora", "first logits", tuning.logits(tuning.start, len(logits)), logits, ATOL, RTOL)
  expected = factors(tuning.config, tuning.arrays, "gradient/")
  jax.tree.map(lambda a, b: golden_models.close("lora", "gradients", a, b, ATOL, RTOL), tuning.gradients(), expected)


@functools.cache
def p_tuning(case: str) -> tuple[dict[str, Any], Tuning]:
  described, arrays = golden_models.load("p_tuning")
  arrays = {key.removeprefix(f"{case}/"): x for key, x in arrays.items() if key.startswith(f"{case}/")}
  settings = described["cases"][case]
  trainable = trainable_lib.PTuning(settings["prefix_length"], settings["prefix_projection"], dropout=0.0)
  config = trainable.adapt(model())
  return described, Tuning(trainable, config, encoder(config, arrays, "start/"), arrays)


def encoder(config: config_lib.GLMConfig, arrays: golden_models.Arrays, prefix: str) -> dict[str, Any]:
  """The original's prefix encoder as our tree."""
  n, h, k = config.num_layers, config.num_heads, config.head_dim
  found = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
  if not config.prefix_hidden:
    key, value = found["embedding.weight"].reshape(-1, n, 2, h, k).transpose(2, 1, 3, 0, 4)
    return {"layers": {"attention": {"prefix_key": key, "prefix_value": value}}}
  return {
    "prefix_encoder": {
      "table": found["embedding.weight"],
      "hidden_kernel": found["trans.0.weight"].T,
      "hidden_bias": found["trans.0.bias"],
      "out_kernel": found["trans.2.weight"].T.reshape(-1, n, 2, h, k),
      "out_bias": found["trans.2.bias"].reshape(n, 2, h, k),
    }
  }


CASES = golden_models.load("p_tuning")[0]["cases"]


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("case", CASES)
def test_p_tuning(case: str, sizes: dict[str, int]):
  described, tuning = p_tuning(case)
  losses, final = tuning.train(described, sizes)
  golden_models.close("p_tuning", "losses of 30 steps", losses, tuning.arrays["losses"], ATOL)
  expected = encoder(tuning.config, tuning.arrays, "final/")
  jax.tree.map(lambda a, b: golden_models.close("p_tuning", "final prefixes", a, b, FINAL), final, expected)


@pytest.mark.parametrize("case", CASES)
def test_p_tuning_begins_as_the_original(case: str):
  _, tuning = p_tuning(case)
  logits = tuning.arrays["logits"]
  golden_models.close("p_tuning", "first logits", tuning.logits(tuning.start, len(logits)), logits, ATOL, RTOL)
  expected = encoder(tuning.config, tuning.arrays, "gradient/")
  jax.tree.map(
    lambda a, b: golden_models.close("p_tuning", "gradients", a, b, ATOL, RTOL), tuning.gradients(), expected
  )
