"""Files that ask for far more time or memory than their bytes are refused in a line, within little of both."""

import io
import pathlib
import random
import resource
import subprocess
import sys
import zipfile

import hostile_files
import numpy as np
import pytest

from glmjax import errors
from glmjax.thudm import inspection
from glmjax.thudm import pickles
from glmjax.thudm import shards
from glmjax.thudm import source
from glmjax.thudm import tensors
from glmjax.thudm import torch_files
from glmjax.thudm import zips

# Opens each file within 60 seconds of the processor and 1 GiB of addresses, and says what came of it.
_OPEN = """
import pathlib, resource, sys
from glmjax import errors
from glmjax.thudm import shards
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for path in map(pathlib.Path, sys.argv[1:]):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
  resource.setrlimit(resource.RLIMIT_CPU, (int(before) + 60, -1))
  try:
    shards.open_file(path)
    print(f"{path.name}: opened")
  except errors.InputError as error:
    print(f"{path.name}: {error}")
"""


def opened(folder: pathlib.Path, files: dict[str, bytes], suffix: str) -> dict[str, str]:
  """The line for each file; the process must live to the end."""
  folder.mkdir()
  paths = [folder / f"{i:03}{suffix}" for i in range(len(files))]
  for path, data in zip(paths, files.values()):
    path.write_bytes(data)
  done = subprocess.run([sys.executable, "-c", _OPEN, *map(str, paths)], capture_output=True, text=True)
  lines = done.stdout.splitlines()
  assert done.returncode == 0 and len(lines) == len(files), (done.stderr[-2000:], [*files][len(lines) :][:1])
  return dict(zip(files, (line.split(": ", 1)[1] for line in lines)))


def test_pickles(tmp_path):
  files = {name: hostile_files.stored({"archive/data.pkl": data}) for name, data in hostile_files.bombs().items()}
  for name, line in opened(tmp_path / "zip", files, ".pt").items():
    assert line != "opened" and len(line) < 600 and line.isprintable(), name
  files = {
    name: torch_files._LEGACY + b".M\xe9\x03.}" + hostile_files.text("little_endian") + b"\x88s." + data
    for name, data in hostile_files.bombs().items()
  }
  for name, line in opened(tmp_path / "legacy", files, ".pt").items():
    assert line != "opened" and len(line) < 600 and line.isprintable(), name


def test_zips(tmp_path):
  lines = opened(tmp_path / "zips", hostile_files.zip_bombs(), ".pt")
  for name, line in lines.items():
    assert "damaged" in line or "truncated" in line, (name, line)
  assert "archive/data.pkl is compressed" in lines["64 MB in 64 kB"]
  assert "lies in another" in lines["50,000 members in one place"]


def test_safetensors(tmp_path):
  lines = opened(tmp_path / "headers", hostile_files.safetensors_bombs(), ".safetensors")
  assert lines.pop("an empty one") == "opened"
  for name, line in lines.items():
    assert "damaged or no safetensors file" in line or "truncated" in line, (name, line)
  assert "overlaps another tensor" in lines["one place for two"]


def test_ten_thousand_tensors_of_one_storage(tmp_path):
  """Each lies in the file; together they are more than it."""
  one = hostile_files.tensor(hostile_files.text("0"), b"M\xe8\x03", b"K\0", b"M\xe8\x03\x85", b"K\1\x85")
  pickled = b"\x80\x02}(" + b"".join(hostile_files.text(f"w{i}") + one for i in range(10_000)) + b"u."
  (tmp_path / "x.pt").write_bytes(hostile_files.stored({"a/data.pkl": pickled, "a/data/0": bytes(4000)}))
  with pytest.raises(errors.InputError, match="its tensors take 40,000,000 bytes, and the file has"):
    shards.open_file(tmp_path / "x.pt")


def test_strides_cost_what_is_read(tmp_path, monkeypatch):
  """Rows of a matrix that lies column by column: no part reads all of it."""
  rows, columns = 700, 300
  whole = np.arange(rows * columns, dtype="f4").reshape(columns, rows)
  (tmp_path / "x").write_bytes(bytes(8) + whole.tobytes())
  read, count = tensors.read_bytes, []
  monkeypatch.setattr(tensors, "read_bytes", lambda path, offset, size: count.append(size) or read(path, offset, size))
  tensor = tensors.Tensor(tmp_path / "x", 8, whole.dtype, (rows, columns), (1, rows))
  for start, stop in ((0, 1), (17, 18), (699, 700), (100, 400), (0, 700)):
    count.clear()
    np.testing.assert_array_equal(tensor.rows(start, stop), whole.T[start:stop])
    assert max(count) <= max(tensors._PAGE, tensors._SPARSE * (stop - start) * columns * 4)
  cube = tensors.Tensor(tmp_path / "x", 8, whole.dtype, (5, 7, 11), (13, 900, 3000))
  expected = np.lib.stride_tricks.as_strided(whole.reshape(-1), (5, 7, 11), (52, 3600, 12000))
  np.testing.assert_array_equal(cube.whole(), expected)


def test_memory_of_many_objects(tmp_path):
  """The most steps that are allowed, each of which makes an object."""
  reader = pickles.Reader(b"\x80\x02" + b"}" * (pickles.MOST_STEPS - 2) + b".", "x")
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  reader.read()
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB


def test_members_are_checked(tmp_path):
  data = hostile_files.stored({"a/data.pkl": b"\x80\x02}.", "a/data/0": b"abcd" * 100})
  (tmp_path / "x.pt").write_bytes(data)
  assert [m.size for m in zips.members(tmp_path / "x.pt").values()] == [4, 400]
  assert zips.damaged_member(tmp_path / "x.pt") is None
  (tmp_path / "x.pt").write_bytes(data.replace(b"abcdabcd", b"abcdabce", 1))
  assert zips.damaged_member(tmp_path / "x.pt") == "a/data/0"
  for crc in {bytes.fromhex(f"{info.CRC:08x}")[::-1] for info in zipfile.ZipFile(io.BytesIO(data)).infolist()}:
    data = data.replace(crc, bytes(4))
  (tmp_path / "x.pt").write_bytes(data)  # torch.serialization.set_crc32_options(False)
  assert zips.damaged_member(tmp_path / "x.pt") is None


@pytest.mark.parametrize("seed, count", [(0, 300), pytest.param(1, 5000, marks=pytest.mark.slow)])
def test_folders(tmp_path, seed, count):
  """Import's and inspect's first half ends in a line that names the folder, or in success."""
  made = hostile_files.cases(random.Random(seed))
  refused = 0
  for i in range(count):
    name, write = next(made)
    folder = tmp_path / f"{i:05}"
    write(folder)
    try:
      source.open_source("chatglm-6b", folder, "none")
    except errors.InputError as error:
      refused += 1
      assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 1000, (name, str(error))
      assert str(folder) in str(error), (name, str(error))
    try:
      inspection.show(inspection.inspect(folder))
    except errors.InputError as error:
      assert str(folder) in str(error), (name, str(error))
  assert count / 2 < refused < count  # a changed weight is a weight


def test_a_good_folder_is_good(tmp_path):
  for seed in range(8):
    hostile_files._writer(hostile_files.good(random.Random(seed)))(tmp_path / str(seed))
    found = source.open_source("chatglm-6b", tmp_path / str(seed), "none")
    assert found.config.num_layers == 2 and not found.config.tie_embeddings
    assert inspection.inspect(tmp_path / str(seed))["problem"] is None
