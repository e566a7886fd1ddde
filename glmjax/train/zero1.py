"""ZeRO stage 1: float32 weights and optimizer state in parts, a step's arithmetic with whole weights.

The weights are gathered once, in the compute dtype; each shard of rows then goes through its micro-batches alone and
adds up its gradient in float32; the shards' gradients are summed once, each device receiving the part that it updates.
(Left to itself, XLA would sum the gradient of every micro-batch.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.train import losses
from glmjax.train import optimizer as optimizer_lib

P = jax.sharding.PartitionSpec


def sums_and_gradient(
  run: Callable[..., tuple[losses.Sums, Any]], dtype: str, specs: Any, params: Any, batch: Any, *scalars: Any
) -> tuple[losses.Sums, Any]:
  """run(params, batch, *scalars), for which a loss and its gradient are sums over rows.

  Args:
    dtype: of the gathered weights.
    specs: how the parameters, and so their gradients, are split: a PartitionSpec for each.
    batch: [M, B, ...] arrays, B split over partitioning.ROW_AXES.
  """
  axes = partitioning.ROW_AXES
  whole = jax.tree.map(lambda spec: P(*(None if entry == axes else entry for entry in spec)), specs)

  def apart(params: Any, batch: Any, *scalars: Any) -> tuple[losses.Sums, Any]:
    with partitioning.rows_apart():
      sums, gradient = run(params, batch, *scalars)
    return jax.lax.psum(sums, axes), jax.tree.map(_bring, gradient, specs, whole)

  parts = jax.tree.map(lambda spec: P(*(entry if entry == axes else None for entry in spec)), specs)
  copy = jax.tree_util.tree_map_with_path(
    lambda path, x, spec: jax.lax.with_sharding_constraint(x.astype(dtype) if optimizer_lib.decays(path) else x, spec),
    params,
    whole,
  )
  return jax.shard_map(
    apart,
    in_specs=(P(), P(None, axes), *(P() for _ in scalars)),
    out_specs=(P(), parts),
    axis_names={*axes},
    check_vma=False,
  )(copy, batch, *scalars)


def _bring(gradient: jax.Array, spec: P, whole: P) -> jax.Array:
  """The sum over all shards of rows: the part that this device updates."""
  gradient = jax.lax.with_sharding_constraint(gradient.astype(jnp.float32), whole)
  if spec == whole:
    return jax.lax.psum(gradient, partitioning.ROW_AXES)
  axis = spec.index(partitioning.ROW_AXES)
  scatter = lambda x: jax.lax.psum_scatter(x, partitioning.ROW_AXES, scatter_dimension=axis, tiled=True)
  # Over the other axes by hand as well: XLA would gather over tensor what it does not split itself.
  return jax.shard_map(
    scatter, in_specs=whole, out_specs=whole, axis_names={*mesh_lib.AXES} - {*partitioning.ROW_AXES}, check_vma=False
  )(gradient)
