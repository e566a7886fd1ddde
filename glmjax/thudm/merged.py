"""A tensor whose parts lie in the files of several tensor-parallel ranks, read as if it were one."""

from collections.abc import Iterator
import dataclasses

import numpy as np

from glmjax.thudm import tensors


@dataclasses.dataclass(frozen=True)
class Merged:
  """Equal parts of one tensor; `split` and `groups` as in layouts.Entry."""

  shards: tuple[tensors.Tensor, ...]  # by rank
  split: str = "none"
  groups: int = 1

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the whole tensor."""
    shape = list(self.shards[0].shape)
    if self.split == "rows":
      shape[0] *= len(self.shards)
    elif self.split == "inputs":
      shape[1] *= len(self.shards)
    return tuple(shape)

  @property
  def dtype(self) -> np.dtype:
    return self.shards[0].dtype

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads rows [start, stop) of the whole."""
    if self.split == "inputs":
      return np.concatenate([shard.rows(start, stop) for shard in self.shards], axis=1)
    parts = [self.shards[rank].rows(first, last) for rank, first, last in self._parts(start, stop)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

  def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yields each (rank, first row, last row) whose rows, put together, are [start, stop)."""
    if self.split == "none":
      yield 0, start, stop
      return
    each = self.shards[0].shape[0] // self.groups  # rows of a stretch that a rank holds
    while start < stop:
      stretch, place = divmod(start, each * len(self.shards))
      rank, first = divmod(place, each)
      size = min(each - first, stop - start)
      yield rank, stretch * each + first, stretch * each + first + size
      start += size


def part_shape(shape: tuple[int, ...], split: str, count: int) -> tuple[int, ...]:
  """Returns the shape of what each of `count` ranks holds."""
  if split == "ranks":
    return shape[1:]
  axis = {"none": None, "rows": 0, "inputs": 1}[split]
  return tuple(n // count if i == axis else n for i, n in enumerate(shape))


def part(whole: np.ndarray, split: str, groups: int, rank: int, count: int) -> np.ndarray:
  """Returns what rank `rank` of `count` holds of a tensor; "ranks": its first axis counts ranks, or so many at a
  time.
  """
  if split == "ranks":
    return whole[rank * len(whole) // count]
  if split == "none":
    return whole
  if split == "inputs":
    width = whole.shape[1] // count
    return whole[:, rank * width : (rank + 1) * width]
  stretches = whole.reshape(groups, count, -1, *whole.shape[1:])
  return stretches[:, rank].reshape(-1, *whole.shape[1:])
