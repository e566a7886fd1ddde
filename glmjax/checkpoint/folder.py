"""What run folders and exported folders say about themselves: config.json and tokenizer/.

config.json: {"model": GLMConfig's fields, "data": the data's description, "tokenizer": {"fingerprint",
"vocab_size"}}; in an export also "export": {"bits", "dtype", "step"; "layout" of what is mapped; "run": the id of the
training run that it was made from}; in a run that trains an adapter also "base": {"folder", "fingerprint", "bits"} of
the model that it adapts, and in one that is trained by pairs of answers "preference", the name of the loss.
"""

import dataclasses
from typing import Any

from glmjax import errors
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import tokenizer_folder
from glmjax.io import user_json
from glmjax.models import config as config_lib

CONFIG, TOKENIZER, CHECKPOINTS, PARAMS = "config.json", tokenizer_folder.FOLDER, "checkpoints", "params"
RECORD = "compute.jsonl"  # of a run: what each of its sessions cost
_LONGEST_LINE = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class FolderConfig:
  """A folder's config.json."""

  model: config_lib.GLMConfig
  data: dict[str, Any] = dataclasses.field(default_factory=dict)
  tokenizer: dict[str, Any] = dataclasses.field(default_factory=dict)  # fingerprint, vocab_size
  export: dict[str, Any] = dataclasses.field(default_factory=dict)  # of exports: bits, dtype, step; layout, run
  base: dict[str, Any] = dataclasses.field(default_factory=dict)  # of adapters: folder, fingerprint, bits
  preference: str = ""  # of runs that pairs of answers train: "DPO" or "ORPO"


def write_config(folder: paths.Named, config: FolderConfig) -> None:
  """Writes config.json, whole or not at all."""
  content = {
    name: value
    for name, value in dataclasses.asdict(config).items()
    if value or name not in ("export", "base", "preference")
  }
  publish.write_json(paths.named(folder) / CONFIG, content)


def read_config(folder: paths.Named) -> FolderConfig:
  """Reads config.json.

  Raises:
    errors.InputError: when the folder is missing, is no model's, or its config.json cannot be used.
  """
  folder = paths.named(folder, "the model's folder")
  path = folder / CONFIG
  if not (there := path.is_file()) and not folder.is_dir():
    if old := publish.interrupted(folder):
      raise errors.InputError(
        f"{folder} was being replaced when that was killed: rename {old.name} beside it back to "
        f"{folder.name}, or export again"
      )
    raise errors.InputError(f"{folder}: no such folder; give a training run's or an exported model's")
  if not there:
    halves = [name for name in (CHECKPOINTS, PARAMS) if (folder / name).is_dir()]
    what = f"half-written: it has {halves[0]}/ but no {CONFIG}" if halves else f"no model's folder: it has no {CONFIG}"
    raise errors.InputError(f"{folder} is {what}; give a training run's or an exported model's")
  content = user_json.read(path, expected="restore a copy, or write the folder again")
  try:
    fields = content["model"]
    known = {field.name for field in dataclasses.fields(config_lib.GLMConfig)}
    unknown = sorted(set(fields) - known)
    if unknown:
      raise errors.InputError(
        f"{path}: GLMConfig has no {', '.join(unknown)}; a newer glmjax wrote it: update this one"
      )
    others = [dict(content.get(name) or {}) for name in ("data", "tokenizer", "export", "base")]
    _, tokenizer, _, base = others
    preference = content.get("preference", "")
    if not isinstance(preference, str):
      raise TypeError(f"preference is {preference!r:.40}")
    for name, said in (("tokenizer", tokenizer), ("base", base)):
      if not isinstance(said.get("fingerprint", ""), str):
        raise TypeError(f"the {name}'s fingerprint is {said['fingerprint']!r:.40}")
  except errors.InputError:
    raise
  except (ValueError, KeyError, TypeError) as error:
    raise errors.InputError(
      f"{path} is damaged ({type(error).__name__}: {str(error)[:100]}); restore a copy, or write the folder again"
    ) from error
  try:
    return FolderConfig(config_lib.GLMConfig(**fields), *others, preference)
  except (ValueError, TypeError) as error:  # InputErrors among them, which do not know the file
    raise errors.InputError(f"{path}: {str(error)[:400]}; restore a copy, or write the folder again") from error


def run_id(folder: paths.Path) -> str | None:
  """Returns what tells a training run from others of equal settings: the id of its first session, which a copy has too.

  None where it is not recorded, as of runs before there were records, or cannot be read.
  """
  try:
    with (folder / RECORD).open("rb") as file:
      session = user_json.parse(file.readline(_LONGEST_LINE), RECORD).get("session")
  except (OSError, errors.InputError):
    return None
  return session if isinstance(session, str) else None


def check_tokenizer(folder: paths.Named, config: FolderConfig) -> None:
  """Checks that the folder's tokenizer is the one recorded, and fits the model; a folder may be without one.

  Raises:
    errors.InputError: when it is not.
  """
  where = paths.named(folder) / TOKENIZER
  if not config.tokenizer and not config.data.get("tokenizer") and not where.exists():
    return  # weights that were imported without one: no text goes in or out
  found = tokenizer_folder.read(where)
  if found["vocab_size"] > config.model.vocab_size:
    raise errors.InputError(
      f"{where} has {found['vocab_size']} ids and the model's vocabulary "
      f"{config.model.vocab_size}: use the tokenizer that the model was trained with"
    )
  recorded = config.tokenizer.get("fingerprint") or config.data.get("tokenizer")
  if isinstance(recorded, str) and recorded != found["fingerprint"]:
    raise errors.InputError(
      f"{where} is tokenizer {found['fingerprint'][:8]} and the model was trained with "
      f"{recorded[:8]}: use the tokenizer that it was trained with"
    )
