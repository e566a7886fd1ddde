"""The model that a run begins with: an export, an import, or another run."""

import dataclasses
from typing import Any

import jax

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load
from glmjax.checkpoint import recorded
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.train import trainable as trainable_lib

# What a run that trains all parameters may have other than the model it begins with: how far cosines were rounded where
# that was deployed.
_FREE = ("rotary_rounding",)


def check(
  weights: paths.Named, model: config_lib.GLMConfig, data: dict[str, Any], adapted: bool = False
) -> folder_lib.FolderConfig:
  """Returns the config.json of a folder to begin with, once it is known to be of this model.

  Args:
    weights: the folder.
    model: the run's, without an adapter.
    data: what the data source says of itself.
    adapted: whether it stays as it is, beside an adapter; then it may be quantized.

  Raises:
    errors.InputError: where the folder's model or tokenizer is not the run's.
  """
  found = folder_lib.read_config(weights)
  if found.base:
    raise errors.InputError(f"{weights} holds an adapter of {found.base.get('folder')}: give the model itself")
  if found.export.get("bits") and not adapted:
    raise errors.InputError(
      f"{weights} is quantized to {found.export['bits']} bits: give float weights, or train an adapter "
      "(loop.train.trainable)"
    )
  if changed := recorded.other_model(found.model, model, () if adapted else _FREE):
    raise errors.InputError(f"{weights} is another model: {changed}; give the gin file of the model that it is")
  ours, theirs = data.get("tokenizer"), found.tokenizer.get("fingerprint")
  if ours and theirs and ours != theirs:
    raise errors.InputError(
      f"{weights} has another tokenizer than the data ({theirs[:8]}, not {ours[:8]}): "
      "make the cache with the tokenizer in that folder"
    )
  return found


@dataclasses.dataclass(frozen=True)
class Base:
  """The model that an adapter adapts, and what trains of both."""

  weights: paths.Named
  trainable: trainable_lib.Trainable
  bits: int | None  # of its kernels; None: floats
  fingerprint: str  # of its weights when the run was started

  @classmethod
  def of(
    cls,
    trainable: trainable_lib.Trainable | None,
    weights: paths.Named | None,
    model: config_lib.GLMConfig,
    data: dict[str, Any],
  ) -> "Base | None":
    """Returns the base of what is trained; None where all parameters are.

    Raises:
      errors.InputError: where it is not given, or not of this model.
    """
    if trainable is None:
      return None
    if weights is None:
      raise errors.InputError("loop.train.trainable adapts a model: give its folder as loop.train.weights")
    bits = check(weights, model, data, adapted=True).export.get("bits")
    return cls(weights, trainable, bits, load.fingerprint(weights))

  def describe(self) -> dict[str, Any]:
    """Returns what config.json says of it."""
    return {"folder": str(self.weights), "fingerprint": self.fingerprint, "bits": self.bits}

  def read(self, wanted: Any) -> Any:
    """Reads its parameters, each as `wanted`, a tree of shapes, dtypes and shardings.

    Raises:
      errors.InputError: where they are no longer those that the run was started with, and says that it adapts.
    """

    def cast(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
      if x.dtype == like.dtype:
        return x
      found = jax.block_until_ready(x.astype(like.dtype))
      x.delete()  # so that one array alone is there twice
      return found

    flat = arrays.named_leaves(jax.tree.map(lambda x: x.sharding, wanted))
    loaded = load.load(self.weights, None, flat)
    if (found := loaded.metadata["weights"]) != self.fingerprint:
      raise errors.InputError(
        f"{self.weights} holds another model than when this run was started ({found:.8}, not {self.fingerprint:.8}): "
        "a run that is still saving cannot be adapted: export it, and give that as loop.train.weights"
      )
    return jax.tree.map(cast, loaded.params, wanted)


def model(folder: paths.Named, dtype: str | None = None, remat: str = "none") -> config_lib.GLMConfig:
  """Returns the model that a folder holds, as its config.json has it, to be trained further.

  Args:
    folder: an export, an import, or a run.
    dtype: of activations and matmuls; None: the folder's.
    remat: what backward keeps, as GLMConfig has it.
  """
  found = folder_lib.read_config(folder).model
  return dataclasses.replace(found, dtype=dtype or found.dtype, remat=remat, param_dtype="float32")


def positions(folder: paths.Named) -> str:
  """Returns the kind of positions of the model that a folder holds, which rows of data must have."""
  return folder_lib.read_config(folder).model.positions
