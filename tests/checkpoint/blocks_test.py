"""Writing and reading by blocks: what Orbax makes of it, resumption, kills between renames, regions."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import blocks
from glmjax.models import params as params_lib
from glmjax.checkpoint import checksums
from glmjax.checkpoint import load
from glmjax.checkpoint import stored
from glmjax.checkpoint import stored_weights

_WEIGHTS = (
  stored_weights.StoredWeight("embedding/table", (50, 8), "bfloat16"),
  stored_weights.StoredWeight("layers/mlp/wo/kernel", (3, 16, 8), "float32"),
  stored_weights.StoredWeight("layers/mlp/wi/kernel", (3, 8, 2, 16), "float16", 4),
  stored_weights.StoredWeight("final_norm/bias", (8,), "float32"),
)


def values(weight: stored_weights.StoredWeight) -> np.ndarray:
  x = np.random.default_rng(len(weight.name)).standard_normal(weight.shape)
  return x.astype(arrays.zarr_dtype(weight.dtype))


def write(folder: pathlib.Path) -> arrays.Records:
  return blocks.Writer(folder, _WEIGHTS).write(lambda weight, region: weight.convert(values(weight)[region]), "test")


def expected() -> dict[str, np.ndarray]:
  return {name: x for weight in _WEIGHTS for name, x in weight.convert(values(weight)).items()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(stored_weights, "ELEMENTS", 60)


def test_orbax_reads_it_without_us(tmp_path):
  write(tmp_path / "params")
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), params_lib.nest(expected()))
    found = checkpointer.restore(tmp_path / "params", args=ocp.args.PyTreeRestore(restore_args=args))
  found = arrays.named_leaves(found)
  assert found.keys() == expected().keys()
  for name, x in expected().items():
    np.testing.assert_array_equal(found[name], x)
    assert found[name].dtype == x.dtype


def test_records_and_sums(tmp_path):
  records = write(tmp_path / "params")
  sums = checksums.array_sums(expected())
  assert {name: record["sum"] for name, record in records.items()} == sums
  targets = {
    name: jax.ShapeDtypeStruct(tuple(record["shape"]), arrays.zarr_dtype(record["dtype"]))
    for name, record in records.items()
  }
  found = arrays.read(tmp_path / "params", targets, records)
  for name, x in expected().items():
    np.testing.assert_array_equal(np.asarray(found[name]), x)


def test_reader_checks_what_it_read(tmp_path):
  records = write(tmp_path / "params")
  for damage in (False, True):
    if damage:
      file = tmp_path / "params/layers.mlp.wo.kernel/1.0.1"
      data = bytearray(file.read_bytes())
      data[5] ^= 4
      file.write_bytes(data)
    reader = blocks.Reader(tmp_path / "params", records)
    for weight in _WEIGHTS:
      for region in weight.regions():
        for name in weight.stored(weight.shape):
          reader.read(name, weight.stored_region(name, region))
    if damage:
      with pytest.raises(arrays.DamagedError, match="layers/mlp/wo/kernel .checksum differs"):
        reader.verify()
    else:
      reader.verify()
  (tmp_path / "params/embedding.table/1.0").unlink()
  with pytest.raises(arrays.DamagedError, match="embedding.table/1.0 is missing"):
    blocks.Reader(tmp_path / "params", records)


def test_sums_of_parts_add_up():
  rng = np.random.default_rng(0)
  for dtype in ("float32", "int8", "bfloat16", "int64"):
    x = rng.integers(-100, 100, (6, 10, 4)).astype(arrays.zarr_dtype(dtype))
    parts = [checksums.part_sum(x[i : i + 2, j : j + 5], (i, j, 0), x.shape) for i in (0, 2, 4) for j in (0, 5)]
    assert checksums.total(parts) == checksums.array_sums({"x": x})["x"]
    if dtype != "int64":
      on_device = checksums._device_sum(x[2:4, 5:], x.shape, np.array([2, 5, 0], np.uint32))
      assert parts[3] == "".join(f"{int(word):08x}" for word in on_device)


@pytest.mark.parametrize("name", [".out.999999999.old", ".out.elsewhere.7.old"])
def test_reading_renames_nothing(tmp_path, name):
  """What a killed replacement left is named to a reader; a writer of another machine may be at work on it."""
  (tmp_path / name / "params").mkdir(parents=True)
  with pytest.raises(errors.InputError, match=f"out was being replaced when that was killed: rename {name} beside it"):
    load.load(tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_odd_sizes_have_no_int4():
  with pytest.raises(errors.InputError, match="has an odd number of them: use 8 bits"):
    stored_weights.StoredWeight("layers/mlp/wo/kernel", (3, 17, 8), "float16", 4)


def test_no_room(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
  with pytest.raises(errors.InputError, match="free some space"):
    stored_weights.need_room(tmp_path / "not" / "there", _WEIGHTS)


def whole(x: np.ndarray) -> stored_weights.Region:
  return tuple(slice(0, n) for n in x.shape)


def test_threads_read_at_the_same_time(tmp_path, monkeypatch):
  """Two arrays that are read whole are under way together, and each is read once, whoever wants it."""
  records = write(tmp_path / "params")
  reader = blocks.Reader(tmp_path / "params", records)
  meet, reads = threading.Barrier(2, timeout=20), []
  true_read = stored.StoredArray.read

  def read(self, region=None):
    reads.append(self.shape)
    meet.wait()  # broken unless another thread comes here, too
    return true_read(self, region)

  monkeypatch.setattr(stored.StoredArray, "read", read)
  names = ["final_norm/bias", "embedding/table"]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = list(pool.map(lambda name: reader.read(name, whole(expected()[name])), names * 2))
  for name, x in zip(names * 2, found):
    np.testing.assert_array_equal(x, expected()[name])
  assert sorted(reads) == [(8,), (50, 8)]


def test_a_region_at_any_place(tmp_path):
  """Of arrays of one chunk and of many, of every number of axes."""
  records = write(tmp_path / "params")
  rng = np.random.default_rng(0)
  for name, x in expected().items():
    array = stored.StoredArray(tmp_path / "params", name, records[name])
    np.testing.assert_array_equal(array.read(), x)
    for _ in range(30):
      region = tuple(slice(*sorted(rng.integers(0, n + 1, 2))) for n in x.shape)
      np.testing.assert_array_equal(array.read(region), x[region])


@pytest.mark.parametrize(
  "damage",
  [
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(b"{}"),
    pathlib.Path.unlink,
    lambda path: (path.unlink(), path.mkdir()),
    lambda path: (path.unlink(), os.mkfifo(path)),
    lambda path: (path.unlink(), path.symlink_to(path)),
  ],
  ids=["short", "other", "gone", "folder", "pipe", "loop"],
)
def test_what_an_earlier_try_left_is_used_only_where_it_is_good(tmp_path, damage):
  """Whatever has become of it meanwhile: it is written again."""
  before = write(tmp_path / "params")
  for path in sorted(path for path in (tmp_path / "params").rglob("*") if path.is_file()):
    damage(path)
  for _ in range(2):
    assert write(tmp_path / "params") == before
  arrays.check_files(tmp_path / "params", before)
  reader = blocks.Reader(tmp_path / "params", before)
  for name, x in expected().items():
    np.testing.assert_array_equal(reader.read(name, whole(x)), x)
  reader.verify()


@pytest.mark.parametrize("sums", [[], 3, "x", None, {}, {"x": "y"}, {"embedding/table": 4}, {"embedding/table": None}])
def test_sums_of_another_kind_in_the_journal(tmp_path, sums):
  before = write(tmp_path / "params")
  journal = tmp_path / "params" / blocks.JOURNAL
  entries = [json.loads(line) for line in journal.read_text().splitlines() if line]
  journal.write_text("".join(json.dumps(entry | {"sums": sums}) + "\n" for entry in entries))
  assert write(tmp_path / "params") == before


def test_arrays_that_are_no_folders(tmp_path):
  before = write(tmp_path / "params")
  shutil.rmtree(tmp_path / "params/final_norm.bias")
  os.mkfifo(tmp_path / "params/final_norm.bias")
  shutil.rmtree(tmp_path / "params/embedding.table")
  (tmp_path / "params/embedding.table").write_bytes(b"x")
  assert write(tmp_path / "params") == before
  arrays.check_files(tmp_path / "params", before)
