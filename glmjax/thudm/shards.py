"""Which files a folder's weights are in, and the tensors they hold."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import re
from typing import Any

from glmjax import errors
from glmjax.thudm import tensors
from glmjax.thudm import torch_files

_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
# The file that names the files, and the file that is alone; safetensors before pickles.
_HUB = (("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"))


@dataclasses.dataclass(frozen=True)
class Shards:
  """The tensors of each tensor-parallel rank, by their keys, and where they came from."""

  ranks: tuple[dict[str, tensors.Tensor], ...]
  files: tuple[pathlib.Path, ...]
  iteration: str | None = None  # of the training, as the folder's `latest` has it

  @property
  def nbytes(self) -> int:
    """Of all tensors."""
    return sum(tensor.nbytes for rank in self.ranks for tensor in rank.values())


def open_file(path: pathlib.Path) -> dict[str, tensors.Tensor]:
  """The weights in one file."""
  if path.suffix == ".safetensors":
    return tensors.open_safetensors(path)
  return torch_files.open_state_dict(path)


def open_hub(folder: pathlib.Path) -> Shards:
  """A folder as the Hugging Face Hub has it: safetensors or pytorch_model.bin, in one file or several.

  Raises:
    errors.InputError: when a file is missing or damaged, or holds other tensors than the index says.
  """
  for index, single in _HUB:
    if (folder / index).is_file():
      return _open_indexed(folder, index)
    if (folder / single).is_file():
      return Shards((open_file(folder / single),), (folder / single,))
  numbered = sorted(path.name for path in folder.glob("*-of-*.*") if path.suffix in (".bin", ".safetensors"))
  if numbered:
    raise errors.InputError(f"{folder} has {numbered[0]} but no index: copy {_HUB[0][0]} or {_HUB[1][0]} there, too")
  raise errors.InputError(f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin, or their shards "
                          "with an index")


def _open_indexed(folder: pathlib.Path, index: str) -> Shards:
  weight_map = read_json(folder / index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise errors.InputError(f"{folder / index} has no weight_map: copy it again")
  names = sorted(set(weight_map.values()))
  if any(pathlib.PurePath(name).name != name for name in names):
    raise errors.InputError(f"{folder / index} names files outside of the folder: copy it again")
  missing = [name for name in names if not (folder / name).is_file()]
  if missing:
    raise errors.InputError(f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(names)} that {index} "
                            "names): copy it there")
  found: dict[str, tensors.Tensor] = {}
  for name in names:
    opened = open_file(folder / name)
    listed = {key for key, file in weight_map.items() if file == name}
    if lacking := sorted(listed - set(opened)):
      raise errors.InputError(f"{folder / name} has no {lacking[0]}, which {index} says is there: the files are of "
                              "different checkpoints, copy them again")
    found |= opened
  return Shards((found,), tuple(folder / name for name in names))


def open_ranks(folder: pathlib.Path) -> Shards:
  """A training checkpoint: `latest` and <iteration>/mp_rank_XX_model_states.pt.

  `latest_checkpointed_iteration.txt` is `latest`'s other name; the folder with the mp_rank files will do, too.

  Raises:
    errors.InputError: when a rank's file is missing or damaged, or the ranks do not hold the same keys.
  """
  iteration, where = None, folder
  for name in ("latest", "latest_checkpointed_iteration.txt"):
    if (folder / name).is_file():
      iteration = (folder / name).read_text(encoding="utf-8").strip()
      where = folder / iteration
      if pathlib.PurePath(iteration).name != iteration or not where.is_dir():
        raise errors.InputError(f"{folder / name} says {iteration[:40]!r}, and there is no such folder beside it: copy "
                                "the folder there, or correct the file")
      break
  found = {int(match[1]): path for path in where.iterdir() if (match := _RANK.fullmatch(path.name))}
  if not found and any(folder.glob("*.tar.part_*")):
    raise errors.InputError(f"{folder} holds the parts of the archive: unpack them first, cat {folder}/*.tar.part_* | "
                            "tar x")
  if not found:
    raise errors.InputError(f"{where} has no mp_rank_00_model_states.pt: give the folder of `latest`, or the one with "
                            "the mp_rank files")
  missing = sorted(set(range(max(found) + 1)) - set(found))
  if missing:
    raise errors.InputError(f"{where}: mp_rank_{missing[0]:02d}_model_states.pt is missing; there are "
                            f"{len(found)} files up to rank {max(found)}: copy it there")
  files = tuple(found[rank] for rank in sorted(found))
  ranks = tuple(_without_prefix(open_file(path)) for path in files)
  for path, rank in zip(files, ranks):
    if different := sorted(set(rank) ^ set(ranks[0])):
      has, lacks = (path, files[0]) if different[0] in rank else (files[0], path)
      raise errors.InputError(f"{has} holds {different[0]} and {lacks.name} does not: the files are of different "
                              "checkpoints, copy them again")
  return Shards(ranks, files, iteration)


def _without_prefix(opened: dict[str, tensors.Tensor]) -> dict[str, tensors.Tensor]:
  """Wrapped models (fine-tuning, DistributedDataParallel) put the same word before each key."""
  for prefix in ("module.", "model."):
    if all(key.startswith(prefix) for key in opened):
      opened = {key.removeprefix(prefix): tensor for key, tensor in opened.items()}
  return opened


def check_keys(shards: Shards, wanted: Sequence[str], optional: Sequence[str], where: pathlib.Path) -> None:
  """Raises InputError when keys are missing, or there are any that are neither wanted nor optional."""
  found = shards.ranks[0]
  for keys, what in (([key for key in wanted if key not in found], "is missing"),
                     (sorted(set(found) - set(wanted) - set(optional)), "is unexpected")):
    if keys:
      more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
      raise errors.InputError(f"{where}: {keys[0]}{more} {what}: this is not the model that it was taken for, or not "
                              "all of its files are there")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    errors.InputError: when the file is missing or holds anything else.
  """
  try:
    content = json.loads(path.read_bytes())
  except FileNotFoundError as error:
    raise errors.InputError(f"{path} is missing: copy it there") from error
  except (OSError, ValueError) as error:
    raise errors.InputError(f"{path} is damaged ({str(error)[:80]}): copy it again") from error
  if not isinstance(content, dict):
    raise errors.InputError(f"{path} is damaged (no JSON object): copy it again")
  return content
