"""What ZeRO stage 1 moves: float32 weights and optimizer state lie in parts, a step computes with whole weights.

They are gathered once a step, in the compute dtype, and gradients are summed over the shards of rows once, each device
receiving the part that it updates. (Left to itself, XLA would sum the gradient of every micro-batch.)
"""

from typing import Any

import jax
import jax.numpy as jnp

from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning

P = jax.sharding.PartitionSpec


def cast(params: Any, dtype: str) -> Any:
  """Returns parameters as a step reads them: kernels and embeddings in the compute dtype, biases and norms as they
  are.
  """
  return params_lib.nest(
    {path: x.astype(dtype) if params_lib.known(path).is_weight else x for path, x in params_lib.flatten(params).items()}
  )


def gather(params: Any, specs: Any) -> Any:
  """Gathers parameters split as `specs` say, whole on every shard of rows."""
  return jax.tree.map(jax.lax.with_sharding_constraint, params, _whole(specs))


def scatter(gradient: Any, specs: Any) -> Any:
  """Returns, within a shard_map over ROW_AXES, the gradients' sums over all shards, of each the part this device
  updates.
  """
  return jax.tree.map(_scatter, gradient, specs, _whole(specs))


def parts(specs: Any) -> Any:
  """Returns, of what `specs` split, the axes that are split over the shards of rows alone."""
  return jax.tree.map(lambda spec: P(*(entry if entry == partitioning.ROW_AXES else None for entry in spec)), specs)


def _whole(specs: Any) -> Any:
  """Returns the specs without what is split over the shards of rows."""
  return jax.tree.map(lambda spec: P(*(None if entry == partitioning.ROW_AXES else entry for entry in spec)), specs)


def _scatter(gradient: jax.Array, spec: P, whole: P) -> jax.Array:
  gradient = jax.lax.with_sharding_constraint(gradient.astype(jnp.float32), whole)
  if spec == whole:
    return jax.lax.psum(gradient, partitioning.ROW_AXES)
  axis = spec.index(partitioning.ROW_AXES)

  def sum_of_part(x: jax.Array) -> jax.Array:
    return jax.lax.psum_scatter(x, partitioning.ROW_AXES, scatter_dimension=axis, tiled=True)

  # Over the other axes by hand as well: XLA would gather over tensor what it does not split itself.
  others = {*mesh_lib.AXES} - {*partitioning.ROW_AXES}
  return jax.shard_map(sum_of_part, in_specs=whole, out_specs=whole, axis_names=others, check_vma=False)(gradient)
