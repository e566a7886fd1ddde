"""Which files a folder's weights are in, and the tensors they hold."""

from collections.abc import Sequence
import dataclasses
import os
import re
from typing import Any

from glmjax import errors
from glmjax.io import globs
from glmjax.io import paths
from glmjax.io import printable
from glmjax.io import publish
from glmjax.io import user_json
from glmjax.io import user_text
from glmjax.thudm import tensors
from glmjax.thudm import torch_files

_RANK = re.compile(r"mp_rank_([0-9]{2})_model_states\.pt")
LATEST = ("latest", "latest_checkpointed_iteration.txt")  # name the folder of the newest iteration
_LARGEST_LATEST = 1 << 12  # bytes of `latest`, which holds a number
_LARGEST_JSON = 1 << 23  # bytes of an index or a configuration; ChatGLM-6B's index has 34 kB
# The file that names the files, and the file that is alone; safetensors before pickles.
_HUB = (("model.safetensors.index.json", "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin"))


@dataclasses.dataclass(frozen=True)
class Shards:
  """The tensors of each tensor-parallel rank, by their keys, and where they came from."""

  ranks: tuple[dict[str, tensors.Tensor], ...]
  files: tuple[paths.Path, ...]
  iteration: str | None = None  # of the training, as the folder's `latest` has it

  @property
  def nbytes(self) -> int:
    """The bytes of all tensors."""
    return sum(tensor.nbytes for rank in self.ranks for tensor in rank.values())


def open_file(path: paths.Path) -> dict[str, tensors.Tensor]:
  """Opens the weights in one file."""
  if path.suffix == ".safetensors":
    return tensors.open_safetensors(path)
  return torch_files.open_state_dict(path)


def open_hub(folder: paths.Path) -> Shards:
  """Opens a folder as the Hugging Face Hub has it: safetensors or pytorch_model.bin, in one file or several.

  Raises:
    errors.InputError: when a file is missing or damaged, or holds other tensors than the index says.
  """
  _check_finished(folder)
  for index, single in _HUB:
    if (folder / index).is_file():
      return _open_indexed(folder, index)
    if (folder / single).is_file():
      return Shards((open_file(folder / single),), (folder / single,))
  numbered = sorted(path.name for path in globs.inside(folder, "*-of-*.*") if path.suffix in (".bin", ".safetensors"))
  if numbered:
    raise errors.InputError(f"{folder} has {numbered[0]} but no index: copy {_HUB[0][0]} or {_HUB[1][0]} there, too")
  raise errors.InputError(
    f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin, or their shards with an index"
  )


def _check_finished(folder: paths.Path) -> None:
  if publish.in_work(folder):
    raise errors.InputError(f"{folder} is half-written, as its {publish.IN_WORK} says: wait, or write it again")


def _open_indexed(folder: paths.Path, index: str) -> Shards:
  listed = _listed(folder / index)
  missing = [name for name in sorted(listed) if not (folder / name).is_file()]
  if missing:
    raise errors.InputError(
      f"{folder}: shard {printable.line(missing[0])} is missing ({len(missing)} of {len(listed)} "
      f"that {index} names): copy it there"
    )
  found: dict[str, tensors.Tensor] = {}
  for name, keys in sorted(listed.items()):
    opened = open_file(folder / name)
    advice = "the files are of different checkpoints, copy them again"
    if lacking := sorted(keys - opened.keys()):
      raise errors.InputError(
        f"{folder / name} has no {printable.line(lacking[0], 80)}, which {index} says is there: {advice}"
      )
    if twice := sorted(found.keys() & opened.keys()):
      raise errors.InputError(
        f"{folder / name} holds {printable.line(twice[0], 80)}, and so does {found[twice[0]].path.name}: {advice}"
      )
    found |= opened
  return Shards((found,), tuple(folder / name for name in sorted(listed)))


def _listed(index: paths.Path) -> dict[str, set[str]]:
  """Returns the keys that an index says are in each file."""
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise errors.InputError(f"{index} has no weight_map, or an empty one: copy it again")
  listed: dict[str, set[str]] = {}
  for key, name in weight_map.items():
    if not isinstance(name, str):
      raise errors.InputError(
        f"{index} says that {printable.line(key, 80)} is in {printable.line(repr(name), 40)}, "
        "which is no file's name: copy it again"
      )
    if not _is_name(name):
      raise errors.InputError(
        f"{index} names {printable.line(repr(name), 80)}, a file outside of the folder: copy it again"
      )
    listed.setdefault(name, set()).add(key)
  return listed


def _is_name(name: str) -> bool:
  """Tells whether it can be that of a file in the folder, and no path to another place."""
  try:
    encoded = os.fsencode(name)
  except UnicodeEncodeError:
    return False
  return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"} and len(encoded) <= 255


def open_ranks(folder: paths.Path) -> Shards:
  """Opens a training checkpoint: `latest` and <iteration>/mp_rank_XX_model_states.pt.

  `latest_checkpointed_iteration.txt` is `latest`'s other name; the folder with the mp_rank files will do, too.

  Raises:
    errors.InputError: when a rank's file is missing or damaged, or the ranks do not hold the same keys.
  """
  _check_finished(folder)
  iteration, where = None, folder
  for name in LATEST:
    if (folder / name).is_file():
      iteration = user_text.read(folder / name, largest=_LARGEST_LATEST).strip()
      where = folder / iteration
      if not _is_name(iteration) or not where.is_dir():
        raise errors.InputError(
          f"{folder / name} says {iteration[:40]!r}, and there is no such folder beside it: copy "
          "the folder there, or correct the file"
        )
      break
  found = {int(match[1]): path for path in where.iterdir() if (match := _RANK.fullmatch(path.name))}
  if not found and any(globs.inside(folder, "*.tar.part_*")):
    raise errors.InputError(
      f"{folder} holds the parts of the archive: unpack them first, cat {folder}/*.tar.part_* | tar x"
    )
  if not found:
    raise errors.InputError(
      f"{where} has no mp_rank_00_model_states.pt: give the folder of `latest`, or the one with the mp_rank files"
    )
  missing = sorted(set(range(max(found) + 1)) - set(found))
  if missing:
    raise errors.InputError(
      f"{where}: mp_rank_{missing[0]:02d}_model_states.pt is missing; there are "
      f"{len(found)} files up to rank {max(found)}: copy it there"
    )
  files = tuple(found[rank] for rank in sorted(found))
  ranks = tuple(_without_prefix(open_file(path)) for path in files)
  for path, rank in zip(files, ranks):
    if different := sorted(set(rank) ^ set(ranks[0])):
      has, lacks = (path, files[0]) if different[0] in rank else (files[0], path)
      raise errors.InputError(
        f"{has} holds {printable.line(different[0], 80)} and {lacks.name} does not: the files "
        "are of different checkpoints, copy them again"
      )
  return Shards(ranks, files, iteration)


def _without_prefix(opened: dict[str, tensors.Tensor]) -> dict[str, tensors.Tensor]:
  """Takes off the word that wrapped models (fine-tuning, DistributedDataParallel) put before each key."""
  for prefix in ("module.", "model."):
    if all(key.startswith(prefix) for key in opened):
      opened = {key.removeprefix(prefix): tensor for key, tensor in opened.items()}
  return opened


def check_keys(shards: Shards, wanted: Sequence[str], optional: Sequence[str], where: paths.Path) -> None:
  """Raises InputError when keys are missing, or there are any that are neither wanted nor optional."""
  found = shards.ranks[0]
  for keys, what in (
    ([key for key in wanted if key not in found], "is missing"),
    (sorted(set(found) - set(wanted) - set(optional)), "is unexpected"),
  ):
    if keys:
      more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
      raise errors.InputError(
        f"{where}: {printable.line(keys[0], 120)}{more} {what}: this is not the model that it "
        "was taken for, or not all of its files are there"
      )


def read_json(path: paths.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    errors.InputError: when the file is missing or holds anything else.
  """
  return user_json.read(path, expected="copy it there from where the weights are", largest=_LARGEST_JSON)
