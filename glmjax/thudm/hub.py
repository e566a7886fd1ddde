"""ChatGLM-6B's config.json: each field checked, and what transformers takes for the fields that are not named."""

from collections.abc import Mapping
import math
from typing import Any

from glmjax import errors
from glmjax import ranges
from glmjax.io import paths
from glmjax.models import config as config_lib

CONFIG = "config.json"
_SIZES = (
  ("vocab_size", "vocab_size"),
  ("num_layers", "num_layers"),
  ("embed_dim", "hidden_size"),
  ("num_heads", "num_attention_heads"),
  ("mlp_dim", "inner_hidden_size"),
)  # ours, theirs
_IDS = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")


def check(hub: Mapping[str, Any], path: paths.Path) -> None:
  """Checks the types and ranges of all fields that are used.

  Raises:
    errors.InputError: naming file, field and value.
  """
  for _, name in _SIZES:
    if hub.get(name) is None:
      raise errors.InputError(
        f"{path} is not ChatGLM-6B's (no {name}): copy the one that belongs to the weights "
        "(ChatGLM2 and later are other models)"
      )
    ranges.whole(f"{path}: {name}", hub[name], 1)
  for name, least in (("max_sequence_length", 1), ("pre_seq_len", 0), *((name, 0) for name in _IDS)):
    if hub.get(name) is not None:
      ranges.whole(f"{path}: {name}", hub[name], least)
  if "layernorm_epsilon" in hub:
    ranges.number(f"{path}: layernorm_epsilon", hub["layernorm_epsilon"], above=0, below=1)
  for name in ("position_encoding_2d", "tie_word_embeddings"):
    if name in hub:
      ranges.flag(f"{path}: {name}", hub[name])
  bits = hub.get("quantization_bit")
  if bits is not None and (type(bits) is not int or bits not in (0, 4, 8)):
    raise errors.InputError(f"{path}: quantization_bit is {bits!r:.60}; the numbers 4, 8 and 0 are known")
  if not hub.get("position_encoding_2d", True):
    raise errors.InputError(f"{path}: position_encoding_2d is false; only ChatGLM-6B's two-dimensional one is known")


def model(hub: Mapping[str, Any], path: paths.Path) -> config_lib.GLMConfig:
  """Returns the model of a checked configuration; its head is tied unless the configuration says otherwise."""
  sizes = {ours: hub[theirs] for ours, theirs in _SIZES}
  # The original's blocks are never told how many layers there are: alpha is that of 28 at any depth.
  alpha = None if sizes["num_layers"] == 28 else math.sqrt(56)
  try:
    return config_lib.GLMConfig(
      **sizes,
      max_length=hub.get("max_sequence_length") or 2048,
      positions="rotary_2d",
      mlp="gelu_tanh",
      tie_embeddings=hub.get("tie_word_embeddings", True),
      layer_norm_epsilon=float(hub.get("layernorm_epsilon", 1e-5)),
      residual_alpha=alpha,
    )
  except errors.InputError as error:
    raise errors.InputError(f"{path}: {error}") from error
