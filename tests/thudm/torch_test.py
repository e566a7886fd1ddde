"""Against torch and safetensors themselves, where they are installed: they read what we write and we what they do."""

import gc
import os
import pathlib

import chex
import numpy as np
import pytest

from glmjax.checkpoint import load as load_lib
from glmjax.thudm import load
from glmjax.thudm import shards
from glmjax.thudm import tensors
from glmjax.thudm import torch_files
from glmjax.thudm import write


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch")


def _arrays() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    "half": rng.standard_normal((5, 7)).astype("f2"),
    "float": rng.standard_normal(11).astype("f4"),
    "codes": rng.integers(-128, 128, (3, 4, 2)).astype("i1"),
    "empty": np.zeros((0, 3), "f4"),
    "number": np.array(3.5, "f4"),
  }


def _same(found: dict[str, tensors.Tensor], expected: dict[str, np.ndarray]) -> None:
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    y = found[name].whole()
    assert y.dtype == x.dtype and y.shape == x.shape
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("legacy", [False, True])
def test_reads_what_torch_saves(torch, tmp_path, legacy):
  arrays = _arrays()
  content = {name: torch.from_numpy(x) for name, x in arrays.items()}
  content["parameter"] = torch.nn.Parameter(content["float"])
  content["transposed"] = content["half"].T
  content["part"] = content["half"][1:3, 2:5]
  content["bfloat"] = torch.arange(6).to(torch.bfloat16)
  whole = {"module": content, "rng": torch.get_rng_state(), "optimizer": None, "args": {"lr": 1e-4}}
  torch.save(whole, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
  found = torch_files.open_state_dict(tmp_path / "x.pt")
  half = arrays["half"]
  expected = arrays | {"parameter": arrays["float"], "transposed": half.T, "part": half[1:3, 2:5]}
  np.testing.assert_array_equal(found.pop("bfloat").whole().astype("f4"), np.arange(6, dtype="f4"))
  _same(found, expected)
  np.testing.assert_array_equal(found["transposed"].rows(2, 5), half.T[2:5])


def test_reads_a_module_of_layers(torch, tmp_path):
  """A state dict has attributes, which pickles carry along."""
  model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).half()
  torch.save(model.state_dict(), tmp_path / "x.bin")
  found = torch_files.open_state_dict(tmp_path / "x.bin")
  _same(found, {name: x.numpy() for name, x in model.state_dict().items()})


def test_refuses_a_whole_module(torch, tmp_path):
  torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
  with pytest.raises(Exception, match="expected a dict of tensors"):
    torch_files.open_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize("inside", [None, "module"])
def test_torch_reads_what_we_write(torch, tmp_path, inside):
  arrays = _arrays()
  writer = torch_files.TorchWriter(tmp_path / "x.pt", {name: (x.dtype, x.shape) for name, x in arrays.items()}, inside)
  for x in arrays.values():
    writer.write([x.tobytes()])
  writer.close()
  for mmap in (False, True):
    found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    found = found[inside] if inside else found
    for name, x in arrays.items():
      np.testing.assert_array_equal(found[name].numpy(), x)


def test_a_full_disk_is_one_error(tmp_path):
  """Nothing is said when the writer is collected, long after the file was given up."""
  with pytest.raises(OSError, match="No space left"):
    torch_files.TorchWriter(pathlib.Path("/dev/full"), {"x": (np.dtype("f4"), (4,))})
  with pytest.raises(OSError, match="No space left"):
    with torch_files.TorchWriter(tmp_path / "x.pt", {"x": (np.dtype("f4"), (1 << 16,))}) as writer:
      full = os.open("/dev/full", os.O_WRONLY)
      os.dup2(full, writer._archive.fp.fileno())
      os.close(full)
      writer.write([bytes(1 << 18)])
  del writer
  gc.collect()  # pytest makes errors of what __del__ raises


def test_safetensors_both_ways(tmp_path):
  numpy_files = pytest.importorskip("safetensors.numpy")
  arrays = {name: x for name, x in _arrays().items() if name != "empty"}
  numpy_files.save_file(arrays, tmp_path / "theirs.safetensors")
  _same(tensors.open_safetensors(tmp_path / "theirs.safetensors"), arrays)
  write.write_safetensors(
    tmp_path, [write.Item(name, x.dtype, x.shape, lambda x=x: iter([x])) for name, x in arrays.items()]
  )
  found = numpy_files.load_file(tmp_path / "model.safetensors")
  for name, x in arrays.items():
    np.testing.assert_array_equal(found[name], x)


def test_a_checkpoint_that_torch_saved(torch, make, tmp_path):
  """Ranks saved by torch, one of them as views of larger tensors, are the ranks that we would write."""
  folder = make(tmp_path / "sat", "glm-130b", 2)
  load.import_model("glm-130b", folder, tmp_path / "a")
  opened = shards.open_ranks(folder)
  for path, rank in zip(opened.files, opened.ranks):
    content = {key: torch.from_numpy(tensor.whole()) for key, tensor in rank.items()}
    if path is opened.files[1]:  # as convert_tp.py leaves what it does not clone
      content = {key: torch.cat([x, x], -1).chunk(2, -1)[1] for key, x in content.items()}
    pathlib.Path(path).unlink()
    torch.save({"module": content, "iteration": 49300}, path)
  load.import_model("glm-130b", folder, tmp_path / "b")
  a, b = (load_lib.load(tmp_path / name).params for name in "ab")
  chex.assert_trees_all_equal(a, b)
