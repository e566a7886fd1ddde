"""The folder of a tokenizer, read and copied without SentencePiece.

It holds `tokenizer.model`, a SentencePiece model, and `tokenizer.json`, the layout of the ids and the model's hash.
"""

from collections.abc import Mapping
import hashlib
import json
from typing import Any

from glmjax import errors
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import user_json

MODEL, LAYOUT = "tokenizer.model", "tokenizer.json"
FOLDER = "tokenizer"  # its name in the folder of a model, a run or a cache
LARGEST = 1 << 28  # bytes of the model; ice_text.model has 2.7 MB


def fingerprint(layout: Mapping[str, Any]) -> str:
  """Returns a hash of a layout, the model's hash among it: equal tokenizers have the same."""
  return hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()


def read(folder: paths.Named) -> dict[str, Any]:
  """Returns the "fingerprint" and the "vocab_size" of the tokenizer in a folder.

  Raises:
    errors.InputError: when files are missing or do not belong together.
  """
  folder = paths.named(folder)
  for file in (folder / LAYOUT, folder / MODEL):
    if not file.is_file():
      raise errors.InputError(f"{file}: missing; copy the tokenizer that the model was trained with to {folder}")
  layout = user_json.read(folder / LAYOUT, expected="copy it from the token cache or the run")
  model = _model_hash(folder / MODEL)
  try:
    matches, vocab_size = layout["model_sha256"] == model, int(layout["vocab_size"])
  except (ValueError, KeyError, TypeError, OverflowError) as error:
    raise errors.InputError(
      f"{folder / LAYOUT} is damaged ({type(error).__name__}); copy it from the token cache or the run"
    ) from error
  if not matches:
    raise errors.InputError(
      f"{folder / MODEL} is not the one that {LAYOUT} describes; copy both again from the token cache or the run"
    )
  return {"fingerprint": fingerprint(layout), "vocab_size": vocab_size}


def _model_hash(path: paths.Path) -> str:
  try:
    if (size := path.stat().st_size) > LARGEST:
      raise errors.InputError(
        f"{path} has {size:,} bytes, where {LARGEST:,} at most are expected: no tokenizer; copy it from the token "
        "cache or the run"
      )
    return hashlib.sha256(path.read_bytes()).hexdigest()
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error


def copy(source: paths.Named, target: paths.Named) -> dict[str, Any]:
  """Copies a tokenizer's two files to the folder `target`, whole or not at all; returns `read` of it.

  Raises:
    errors.InputError: when the source is no tokenizer, or another one is there already.
  """
  found, source, target = read(source), paths.named(source), paths.named(target)
  if target.exists():
    if read(target) != found:
      raise errors.InputError(f"{target} is another tokenizer than {source}; choose another folder")
    return found
  with publish.folder(target, LAYOUT) as temporary:
    with publish.file(temporary / MODEL) as file:
      file.write((source / MODEL).read_bytes())
    publish.finish(temporary / LAYOUT, user_json.read(source / LAYOUT))
    if read(temporary) != found:
      raise errors.InputError(f"{source} was changed while it was copied: try again")
  return found
