"""Writing and reading by blocks: what Orbax makes of it, resumption, kills between renames, regions."""

import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import blocks
from glmjax.checkpoint import checksums
from glmjax.checkpoint import load

_WEIGHTS = (blocks.Weight("embedding/table", (50, 8), "bfloat16"),
            blocks.Weight("layers/mlp/wo/kernel", (3, 16, 8), "float32"),
            blocks.Weight("layers/mlp/wi/kernel", (3, 8, 2, 16), "float16", 4),
            blocks.Weight("final_norm/bias", (8,), "float32"))


def values(weight: blocks.Weight) -> np.ndarray:
  x = np.random.default_rng(len(weight.name)).standard_normal(weight.shape)
  return x.astype(arrays.zarr_dtype(weight.dtype))


def write(folder: pathlib.Path) -> arrays.Records:
  return blocks.Writer(folder, _WEIGHTS).write(lambda weight, region: weight.convert(values(weight)[region]), "test")


def expected() -> dict[str, np.ndarray]:
  return {name: x for weight in _WEIGHTS for name, x in weight.convert(values(weight)).items()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(blocks, "ELEMENTS", 60)


def test_orbax_reads_it_without_us(tmp_path):
  write(tmp_path / "params")
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), arrays.nest(expected()))
    found = checkpointer.restore(tmp_path / "params", args=ocp.args.PyTreeRestore(restore_args=args))
  found = arrays.flatten(found)
  assert found.keys() == expected().keys()
  for name, x in expected().items():
    np.testing.assert_array_equal(found[name], x)
    assert found[name].dtype == x.dtype


def test_records_and_sums(tmp_path):
  records = write(tmp_path / "params")
  sums = checksums.array_sums(expected())
  assert {name: record["sum"] for name, record in records.items()} == sums
  targets = {name: jax.ShapeDtypeStruct(tuple(record["shape"]), arrays.zarr_dtype(record["dtype"]))
             for name, record in records.items()}
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
    parts = [checksums.part_sum(x[i:i + 2, j:j + 5], (i, j, 0), x.shape) for i in (0, 2, 4) for j in (0, 5)]
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
  with pytest.raises(errors.InputError, match="gs://bucket/run: glmjax reads and writes local paths only"):
    load.load("gs://bucket/run")


def test_odd_sizes_have_no_int4():
  with pytest.raises(errors.InputError, match="has an odd number of them: use 8 bits"):
    blocks.Weight("layers/mlp/wo/kernel", (3, 17, 8), "float16", 4)


def test_no_room(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
  with pytest.raises(errors.InputError, match="free some space"):
    blocks.need_room(tmp_path / "not" / "there", _WEIGHTS)
