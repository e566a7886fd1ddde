"""The tokenizer that goes with a model's files: found, told its number of image ids, held against the weights."""

from collections.abc import Mapping
from typing import Any

from glmjax import errors
from glmjax import ranges
from glmjax import tokenizer as tokenizer_lib
from glmjax.checkpoint import folder as folder_lib
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.thudm import shards as shards_lib

# Rows of the embedding table to the tokenizer's ids: GLM-130B and the first ChatGLM-6B; ChatGLM-6B since 6 April 2023.
_TOKENIZERS = {150_528: 150_344, 130_528: 130_344}


def read(
  family: str, folder: paths.Path, path: paths.Named | None, hub: Mapping[str, Any], config: config_lib.GLMConfig
) -> tokenizer_lib.Tokenizer | None:
  """Returns the tokenizer at `path`, or the one in the folder; None where there is to be none.

  Args:
    family: decides the number of image ids, where config.json does not.
    folder: of the weights.
    path: ice_text.model or a tokenizer folder; None: either in `folder`; "none": none.
    hub: ChatGLM-6B's config.json, checked; empty for the others.
    config: of the model.

  Raises:
    errors.InputError: when it is missing, damaged, or not the one that the weights were trained with.
  """
  found = _read(family, folder, path, hub)
  if found is not None:
    _check(found, config, hub, folder)
  return found


def _read(
  family: str, folder: paths.Path, path: paths.Named | None, hub: Mapping[str, Any]
) -> tokenizer_lib.Tokenizer | None:
  if path == "none":
    return None
  if path is None:
    places = [path for path in (folder / folder_lib.TOKENIZER, folder / "ice_text.model") if path.exists()]
    if not places and family == "glm-10b":
      return None
    if not places:
      raise errors.InputError(
        f"{folder} has no ice_text.model: copy it there, name it with --tokenizer, or say "
        "--tokenizer=none for weights alone"
      )
    path = places[0]
  path = paths.named(path, "--tokenizer")
  if path.is_dir():
    return tokenizer_lib.Tokenizer.load(path)
  images = tokenizer_lib.IMAGE_TOKENS if family == "glm-130b" else 0
  if hub.get("bos_token_id") is not None:  # <sop>: the fifth behind image ids and text pieces
    images = hub["bos_token_id"] - tokenizer_lib.Tokenizer.load(path).specials.sop
    said = {}
    if (folder / "tokenizer_config.json").is_file():
      said = shards_lib.read_json(folder / "tokenizer_config.json")
    theirs = said.get("num_image_tokens", images)
    if "num_image_tokens" in said:
      ranges.whole(f"{folder / 'tokenizer_config.json'}: num_image_tokens", theirs)
    if images < 0 or images != theirs:
      raise errors.InputError(
        f"{path} is of another date than config.json: {max(theirs, 0)} image ids where <sop> "
        f"{hub['bos_token_id']} needs {images}; take both from the same place"
      )
  return tokenizer_lib.Tokenizer.load(path, images)


def _check(
  tokenizer: tokenizer_lib.Tokenizer, config: config_lib.GLMConfig, hub: Mapping[str, Any], folder: paths.Path
) -> None:
  """Checks that the vocabulary is the one that the weights were trained with."""
  expected = _TOKENIZERS.get(config.vocab_size)
  if expected not in (None, tokenizer.vocab_size) or tokenizer.vocab_size > config.vocab_size:
    raise errors.InputError(
      f"the tokenizer has {tokenizer.vocab_size} ids, and a table of {config.vocab_size} rows "
      f"{f'goes with {expected}' if expected else 'has no room for them'}: it is of another "
      f"date than {folder}"
    )
  for field, name in (
    ("bos_token_id", "sop"),
    ("eos_token_id", "eop"),
    ("mask_token_id", "mask"),
    ("gmask_token_id", "gmask"),
  ):
    theirs, ours = hub.get(field), getattr(tokenizer.specials, name)
    if theirs is not None and theirs != ours:
      raise errors.InputError(
        f"the tokenizer's {name} is {ours}, and config.json's {field} {theirs}: it is of another date than {folder}"
      )
