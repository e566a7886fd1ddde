"""Memory in huge pages: the same numbers in it, whatever the system gives."""

import mmap
import pathlib

import numpy as np
import pytest

from glmjax.io import memory


@pytest.mark.parametrize("size", [0, 1, mmap.PAGESIZE, 3 << 21, (5 << 21) + 17])
@pytest.mark.parametrize("shift", [0, 8, 24])
def test_numbers_stay(size: int, shift: int) -> None:
  numbers = np.random.default_rng(size).integers(0, 256, size + 64, dtype=np.uint8)
  before = numbers.copy()
  joined = memory.join_pages(numbers.ctypes.data + shift, size)
  np.testing.assert_array_equal(numbers, before)
  numbers[:] = 7  # can be written as before
  assert isinstance(joined, bool) and not (joined and size < mmap.PAGESIZE)


def test_files_stay_as_they_are(tmp_path: pathlib.Path) -> None:
  content = np.random.default_rng(0).integers(0, 256, 5 << 21, dtype=np.uint8)
  (tmp_path / "file").write_bytes(content.tobytes())
  mapped = np.memmap(tmp_path / "file", np.uint8, mode="r")
  memory.join_pages(mapped.ctypes.data, mapped.nbytes)
  np.testing.assert_array_equal(mapped, content)
