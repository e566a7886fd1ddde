"""How each layer fares, every so many steps: a line of WORKDIR/layers.jsonl.

Norms of a step's gradient, of its update and of the parameters before it come from the step itself (step.layer_norms).
What layers read and give is computed by a program of its own, of the state before the step and the first rows of its
batch, without dropout; so the step's program has the norms more, and no more than those.

N layers, B rows, L tokens of a row, D model, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.models import statistics
from glmjax.parallel import partitioning
from glmjax.train import feed as feed_lib
from glmjax.train import losses
from glmjax.train import metrics as metrics_lib
from glmjax.train import objective as objective_lib
from glmjax.train import state as state_lib

ROWS = 8  # of a step's first micro-batch, or as many as that has
_NO_ID = -1  # a target that is none: its logit counts as 0, and the cross entropy is log Z

Figures = dict[str, jax.Array]


def forward(
  objective: objective_lib.Objective, params: Any, frozen: Any, batch: objective_lib.Batch, size: jax.Array
) -> tuple[Figures, jax.Array]:
  """Returns the figures of the forward pass, and `size` again.

  | figure | of |
  |---|---|
  | residual_rms [N + 1] | what each layer reads, and what the last one gives: the root mean square |
  | attention_rms, mlp_rms [N] | each sublayer's output, as it is added (a sandwich's behind its norm) |
  | attention_logit_max [N] | the largest q k / sqrt(K) of all queries and keys that they see, a prefix's aside |
  | log_z_mean, log_z_max | log sum exp of the head's logits, at tokens in the loss; no number where there are none |

  Args:
    objective: without a pipeline.
    params, frozen: the model's parameters, those that train and the others.
    batch: the step's, [M, B, ...].
    size: rows of the step, uint32. What depends on it comes behind this program.
  """
  shards = partitioning.parts("batch")
  count = min(batch["rows"].shape[1], -(-ROWS // shards) * shards)  # a row for every shard, whichever count
  rows = {name: feature[0, :count] for name, feature in batch.items()}
  counts_B = (jnp.arange(count) < ROWS) & (rows["rows"] < size.astype(jnp.int32))  # the others only fill the batch up
  config = dataclasses.replace(objective.config, remat="none")
  params = params_lib.merge(params, frozen)
  x_BLD, noted = dataclasses.replace(objective, config=config).hidden(
    params, rows, 1.0, None, mutable=[statistics.COLLECTION]
  )
  figures = _of_layers(config, noted[statistics.COLLECTION], counts_B)
  kernel_DV = glm.GLM(config).apply({"params": params}, 1.0, method="head_kernel")
  in_loss_BL = (rows["loss_weights"] != 0) & counts_B[:, None]
  none_BL = jnp.full_like(rows["targets"], _NO_ID)
  log_z_BL = losses.of_tokens(kernel_DV, x_BLD, none_BL, in_loss_BL.astype(jnp.float32), objective.chunk)
  figures["log_z_mean"] = jnp.where(in_loss_BL, log_z_BL, 0).sum() / in_loss_BL.sum()
  figures["log_z_max"] = jnp.where(in_loss_BL, log_z_BL, -jnp.inf).max()
  return figures, size


def _of_layers(config: config_lib.GLMConfig, noted: Any, counts_B: jax.Array) -> Figures:
  """Returns the figures of each layer, of what blocks have noted of each row."""
  if not config.scan_layers:
    each = (noted[f"{params_lib.LAYERS}_{i}"] for i in range(config.num_layers))
    noted = {params_lib.LAYERS: jax.tree.map(lambda *layers: jnp.stack(layers), *each)}
  layers = noted[params_lib.LAYERS]

  def rms(squares_NB: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.where(counts_B, squares_NB, 0).sum(1) / counts_B.sum())

  return {
    "residual_rms": jnp.concatenate([rms(layers["input"]), rms(layers["output"])[-1:]]),
    "attention_rms": rms(layers["attention_output"]),
    "mlp_rms": rms(layers["mlp_output"]),
    "attention_logit_max": jnp.where(counts_B, layers["attention"]["logit"], -jnp.inf).max(1),
  }


def compile_forward(objective: objective_lib.Objective) -> Any:
  """Compiles forward(params, frozen, batch, size)."""

  def run(params: Any, frozen: Any, batch: objective_lib.Batch, size: jax.Array) -> tuple[Figures, jax.Array]:
    return forward(objective, params, frozen, batch, size)

  return jax.jit(run, out_shardings=partitioning.replicated())


class Layers:
  """Writes the lines of one run; all processes compute, the first one writes."""

  def __init__(self, forward: Any, every: int, lines: metrics_lib.Lines | None):
    """Takes what compile_forward returns, and how many steps there are from line to line."""
    self._forward, self._every, self.lines = forward, every, lines
    self._begun: dict[int, Figures] = {}  # of steps that are not read yet

  def compile(self, state: state_lib.TrainState, batch: objective_lib.Batch, size: jax.ShapeDtypeStruct) -> None:
    """Compiles for a state and shapes of a batch, so that no step waits for it."""
    self._forward.lower(state.params, state.frozen, batch, size).compile()

  def before(self, step: int, state: state_lib.TrainState, item: feed_lib.Item) -> feed_lib.Item:
    """Sends the figures' program to the devices, where a line is due behind this step; returns the step's batch.

    The step then takes a number that this program gives. So they run one behind the other, though the host waits for
    neither: programs that exchange at the same time can wait for each other for ever.
    """
    if step % self._every:
      return item
    self._begun[step], size = self._forward(state.params, state.frozen, item.batch, item.info.size)
    return item._replace(info=dataclasses.replace(item.info, size=size))

  def after(self, record: metrics_lib.Record, norms: dict[str, dict[str, np.ndarray]], is_saved: bool) -> None:
    """Writes the line of a step that is done, if it is to have one.

    Args:
      record: the step's figures.
      norms: the step's metrics "layers", on the host.
      is_saved: the step is about to be.
    """
    figures = self._begun.pop(record["step"], None)
    if figures is None or self.lines is None:
      return
    place = {name: record[name] for name in ("step", "samples_seen")}
    self.lines.write(place | jax.tree.map(lambda x: x.tolist(), norms | jax.device_get(figures)), is_saved)

  def close(self) -> None:
    """Closes the file."""
    if self.lines is not None:
      self.lines.close()
