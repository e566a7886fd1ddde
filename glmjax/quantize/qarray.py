"""QuantizedArray: integer weights with a scale per output row, a pytree leaf's stand-in in params."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
  """Row-wise absmax integers (GLM-130B paper, B.8; FACTS 5.1)."""

  values: jax.Array
  scale: jax.Array
  bits: int = dataclasses.field(metadata={"static": True})
