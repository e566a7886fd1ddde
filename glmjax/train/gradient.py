"""The gradient of a step, summed over its micro-batches, in one of three ways.

plain          jax.grad of each micro-batch, the weights where they lie: XLA gathers what is split over fsdp as layers
               need it, and sums each micro-batch's gradient over the devices.
gathered once  ZeRO-1, where the mesh's rules want it: a step begins with a whole copy of the weights, each shard of
               rows goes through its micro-batches alone, and the shards' gradients are summed once (zero1.py).
1F1B           where rows flow through stages tick by tick, backward is computed tick by tick too, in place of jax.grad
               (pipeline/one_f_one_b.py), with weights of either kind.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from glmjax.models import params as params_lib
from glmjax.parallel import partitioning
from glmjax.train import losses
from glmjax.train import objective as objective_lib
from glmjax.train import scopes
from glmjax.train import zero1
from glmjax.train.pipeline import one_f_one_b

P = jax.sharding.PartitionSpec
Found = tuple[losses.Sums, Any]  # sums over all rows, and a float32 gradient shaped as the trained parameters


def of_step(
  objective: objective_lib.Objective,
  params: Any,
  frozen: Any,
  work: objective_lib.Work,
  num_micro: jax.Array,
  specs: tuple[Any, Any] | None = None,
) -> Found:
  """Returns a step's sums, and the float32 gradient of work.factor times its summed loss.

  Every token weighs the same whichever micro-batch it is in.

  Args:
    params: what is trained, split as specs[0] say.
    frozen: the model's other parameters, split as specs[1] say.
    work: the step's rows, [M, B, ...].
    num_micro: of these M micro-batches, how many hold rows.
    specs: needed by rules that gather once.
  """
  if partitioning.gathers_once():
    return _gathered_once(objective, params, frozen, work, num_micro, specs)
  return _over_micro_batches(objective, params, frozen, work, num_micro)


def _gathered_once(
  objective: objective_lib.Objective,
  params: Any,
  frozen: Any,
  work: objective_lib.Work,
  num_micro: jax.Array,
  specs: tuple[Any, Any],
) -> Found:
  """Does the same by ZeRO-1."""
  axes = partitioning.ROW_AXES

  def shard(params: Any, frozen: Any, work: objective_lib.Work, num_micro: jax.Array) -> Found:
    with partitioning.rows_apart():
      sums, gradient = _over_micro_batches(objective, params, frozen, work, num_micro)
    return jax.lax.psum(sums, axes), zero1.scatter(gradient, specs[0])

  copy = zero1.gather(zero1.cast(params, objective.config.dtype), specs[0])
  return jax.shard_map(
    shard,
    in_specs=(P(), P(), objective_lib.Work(P(None, axes), P(), P(), P()), P()),
    out_specs=(P(), zero1.parts(specs[0])),
    axis_names={*axes},
    check_vma=False,
  )(copy, zero1.gather(frozen, specs[1]), work, num_micro)


def _over_micro_batches(
  objective: objective_lib.Objective, params: Any, frozen: Any, work: objective_lib.Work, num_micro: jax.Array
) -> Found:
  """Returns sums and gradient of all rows that these devices have, a micro-batch at a time."""
  one_f_one_b_way = objective.pipeline is not None and objective.pipeline.kind == "1f1b"
  add_gradient = one_f_one_b.add_gradient if one_f_one_b_way else _add_gradient

  def add(m: jax.Array | int, found: Found) -> Found:
    return add_gradient(objective, params, frozen, work.micro_batch(m), found)

  nothing = objective.zeros(), jax.tree.map(functools.partial(jnp.zeros_like, dtype=jnp.float32), params)
  if work.batch["tokens"].shape[0] == 1:
    return add(0, nothing)
  with jax.named_scope(scopes.MICRO_BATCHES):
    return jax.lax.fori_loop(0, num_micro, add, nothing)


def _add_gradient(
  objective: objective_lib.Objective, params: Any, frozen: Any, work: objective_lib.Work, found: Found
) -> Found:
  """Returns `found` and, added to it, the sums and the gradient of one micro-batch, by jax.grad."""

  def loss(params: Any) -> tuple[jax.Array, losses.Sums]:
    loss = objective.loss(params_lib.merge(params, frozen), work.batch, work.alpha, work.rng)
    return loss.total * work.factor, loss.sums

  gradient, sums = jax.grad(loss, has_aux=True)(params)
  return jax.tree.map(jnp.add, found, (sums, gradient))
