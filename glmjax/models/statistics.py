"""What a forward pass tells of each layer, computed only where a caller asks for Linen's collection "statistics".

B batch, L query length, M key length, D model, H heads, K head dimension.
"""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp

from glmjax.kernels import attention
from glmjax.parallel import partitioning

COLLECTION = "statistics"


def note(module: nn.Module, name: str, make: Callable[[], jax.Array]) -> None:
  """Puts what `make` returns into the collection, under a name; without a caller who asks for it nothing is made."""
  if module.is_mutable_collection(COLLECTION) and not module.is_initializing():
    module.put_variable(COLLECTION, name, make())


def mean_squares(x_BLD: jax.Array) -> jax.Array:
  """Returns the mean square of each row's entries, float32 [B]."""
  return jnp.square(x_BLD.astype(jnp.float32)).mean((1, 2))


def largest_logits(q_BLHK: jax.Array, k_BMHK: jax.Array, start_BL: jax.Array, end_BL: jax.Array) -> jax.Array:
  """Returns each row's largest q k / sqrt(K) of a query and a key that it sees, float32 [B].

  -infinity where no query sees any key. The logits of one row exist at a time, [H, L, M].
  """
  q_BLHK = q_BLHK * jnp.asarray(q_BLHK.shape[-1] ** -0.5, q_BLHK.dtype)  # rounded as attention.dense rounds it

  def of_row(row: tuple[jax.Array, ...]) -> jax.Array:
    q_LHK, k_MHK, start_L, end_L = row
    logits_LHM = jnp.einsum("LHK,MHK->LHM", q_LHK, k_MHK, preferred_element_type=jnp.float32)
    mask_LM = attention.interval_mask(start_L, end_L, k_MHK.shape[0])
    return jnp.where(mask_LM[:, None], logits_LHM, -jnp.inf).max(-1)

  def of_rows(*rows: jax.Array) -> jax.Array:
    return jax.lax.map(of_row, rows)

  queries, keys, tokens = (
    ("batch", "length", "act_heads", None),
    ("batch", None, "act_heads", None),
    ("batch", "length"),
  )
  run = partitioning.on_each_device(of_rows, (queries, keys, tokens, tokens), queries[:-1])
  return run(q_BLHK, k_BMHK, start_BL, end_BL).max((1, 2))
