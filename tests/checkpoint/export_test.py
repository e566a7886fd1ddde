"""Exporting and loading: floats and codes, refusals, damage, atomicity."""

import dataclasses
import functools
import hashlib
import json
import operator
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.io import owner
from glmjax.io import publish
from glmjax.checkpoint import export
from glmjax.checkpoint import load
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager
from glmjax.checkpoint import stored_weights
from glmjax.io import tokenizer_folder
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.quantize import qarray
from glmjax.models import weights

pytestmark = pytest.mark.filterwarnings("error")

_CONFIG = config_lib.GLMConfig(vocab_size=96, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=88, max_length=16)


def _tokenizer(folder: pathlib.Path, vocab_size: int = 90, model: bytes = b"pieces") -> pathlib.Path:
  folder.mkdir(parents=True)
  (folder / "tokenizer.model").write_bytes(model)
  layout = {"format": 1, "model_sha256": hashlib.sha256(model).hexdigest(), "vocab_size": vocab_size}
  (folder / "tokenizer.json").write_text(json.dumps(layout))
  return folder


def test_a_tokenizer_larger_than_any_is_not_read(tmp_path, monkeypatch):
  folder = _tokenizer(tmp_path / "tokenizer")
  assert tokenizer_folder.read(folder)["vocab_size"] == 90
  monkeypatch.setattr(tokenizer_folder, "LARGEST", 5)
  with pytest.raises(errors.InputError, match="tokenizer.model has 6 bytes, where 5 at most are expected"):
    tokenizer_folder.read(folder)


@pytest.fixture(scope="module", name="params")
def _params() -> Any:
  return glm.init_params(_CONFIG, jax.random.key(0))


@pytest.fixture(name="run")
def _run(tmp_path: pathlib.Path, params: Any) -> pathlib.Path:
  """A run's folder with steps 1 and 2; the parameters of step n are n times `params`."""
  run = tmp_path / "run"
  tokenizer = tokenizer_folder.copy(_tokenizer(tmp_path / "source"), run / folder_lib.TOKENIZER)
  folder_lib.write_config(run, folder_lib.FolderConfig(_CONFIG, {"mixture": "m"}, tokenizer))
  saver = manager.Manager(run / "checkpoints")
  for step in (1, 2):
    scaled = jax.tree.map(functools.partial(operator.mul, step), params)
    state = {"params": scaled, "opt_state": [scaled, jnp.int32(0)], "step": jnp.int32(step)}
    saver.save(step, state, {"n": step})
  saver.close()
  return run


def _assert_equal(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def _flip(file: pathlib.Path) -> None:
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def test_loads_a_run(run: pathlib.Path, params: Any):
  loaded = load.load(run)
  _assert_equal(loaded.params, jax.tree.map(lambda x: x * 2, params))
  assert loaded.config == _CONFIG and loaded.bits is None and loaded.tokenizer_dir == run / "tokenizer"
  assert loaded.metadata["step"] == 2 and loaded.metadata["data"] == {"mixture": "m"}


@pytest.mark.parametrize("bits, dtype", [(None, None), (8, None), (4, None), (4, "float32"), (None, "bfloat16")])
def test_export_and_load(run: pathlib.Path, params: Any, tmp_path: pathlib.Path, bits: int | None, dtype: str | None):
  out = tmp_path / "deep" / "out"
  result = export.export(run, out, bits, dtype)
  loaded = load.load(out)
  expected = jax.tree.map(lambda x: x * 2, params)
  quantized = expected if bits is None else weights.quantize(expected, bits)

  def is_q(x):
    return isinstance(x, qarray.QuantizedArray)

  kind = dtype or ("float32" if bits is None else "float16")
  expected = jax.tree.map(lambda x: x if is_q(x) else x.astype(kind), quantized, is_leaf=is_q)
  _assert_equal(loaded.params, expected)
  assert loaded.bits == bits and loaded.metadata["step"] == 2 and loaded.config.param_dtype == kind
  assert {child.name for child in out.iterdir()} == {"config.json", "tokenizer", "params", "checksums.json"}
  assert [child.name for child in out.parent.iterdir()] == ["out"]  # no temporary folder is left
  assert result["array_bytes"] == sum(x.nbytes for x in jax.tree.leaves(loaded.params))
  assert result["disk_bytes"] == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
  assert result["disk_bytes"] < result["array_bytes"] + 30_000  # no hidden copy, no optimizer
  _assert_equal(
    load.load(out, dtype="float32").params["embedding"]["table"],
    loaded.params["embedding"]["table"].astype(jnp.float32),
  )


def _save(run: pathlib.Path, step: int, params: Any) -> None:
  saver = manager.Manager(run / "checkpoints")
  saver.save(step, {"params": params, "opt_state": [params, jnp.int32(0)], "step": jnp.int32(step)}, {"n": step})
  saver.close()


@pytest.mark.parametrize("bits, dtype", [(None, None), (8, None), (4, "float32"), (None, "bfloat16")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_exported(
  run: pathlib.Path, params: Any, tmp_path: pathlib.Path, bits: int | None, dtype: str | None, value: float
):
  bad = jax.tree.map(lambda x: x, params)
  bad["layers"]["mlp"]["wo"]["kernel"] = params["layers"]["mlp"]["wo"]["kernel"].at[1, 3, 4].set(value)
  _save(run, 3, bad)
  with pytest.raises(errors.NotFiniteError, match="step 3.: the array layers/mlp/wo/kernel is not finite; give an"):
    export.export(run, tmp_path / "out", bits, dtype)
  assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
  (run / "checkpoints" / "3").rename(run / "checkpoints" / "3.aside")
  assert export.export(run, tmp_path / "out", bits, dtype)["step"] == 2


def test_values_that_the_dtype_cannot_hold(run: pathlib.Path, params: Any, tmp_path: pathlib.Path):
  large = params | {"final_norm": {"scale": jnp.full(32, 1e6), "bias": jnp.zeros(32)}}
  _save(run, 3, large)
  with pytest.raises(errors.NotFiniteError, match="final_norm/scale has values beyond.*: give --dtype=float32"):
    export.export(run, tmp_path / "out", bits=8)
  assert export.export(run, tmp_path / "out", bits=8, dtype="float32")["step"] == 3


def test_damage_that_is_not_finite_is_damage(run: pathlib.Path, params: Any, tmp_path: pathlib.Path):
  """An exponent's bits flipped on the disk: the older step is used, as for any other damage."""
  file = next(
    path for path in (run / "checkpoints" / "2" / "state" / "params.final_norm.scale").iterdir() if path.name == "0"
  )
  data = bytearray(file.read_bytes())
  data[2:4] = b"\x80\x7f"  # infinity
  file.write_bytes(data)
  assert export.export(run, tmp_path / "out")["step"] == 1


def test_quantized_exports_are_as_small_as_they_say(tmp_path: pathlib.Path):
  config = dataclasses.replace(_CONFIG, vocab_size=1024, embed_dim=256, mlp_dim=672)
  run = tmp_path / "run"
  tokenizer = tokenizer_folder.copy(_tokenizer(tmp_path / "source"), run / folder_lib.TOKENIZER)
  folder_lib.write_config(run, folder_lib.FolderConfig(config, {}, tokenizer))
  saver = manager.Manager(run / "checkpoints")
  saver.save(1, {"params": glm.init_params(config, jax.random.key(0))}, {})
  saver.close()
  sizes = {bits: export.export(run, tmp_path / str(bits), bits)["disk_bytes"] for bits in (None, 8, 4)}
  assert sizes[4] < 0.72 * sizes[8] and sizes[8] < 0.35 * sizes[None]


def test_exports_a_float_export_but_no_quantized_one(run: pathlib.Path, tmp_path: pathlib.Path):
  export.export(run, tmp_path / "float")
  export.export(run, tmp_path / "direct", 4)
  export.export(tmp_path / "float", tmp_path / "int4", 4)
  _assert_equal(load.load(tmp_path / "int4").params, load.load(tmp_path / "direct").params)
  with pytest.raises(errors.InputError, match="is an INT4 model: export from the training run"):
    export.export(tmp_path / "int4", tmp_path / "int8", 8)
  assert not (tmp_path / "int8").exists()


def test_never_overwrites_unasked(run: pathlib.Path, tmp_path: pathlib.Path):
  export.export(run, tmp_path / "out", 8)
  with pytest.raises(errors.InputError, match="is there already"):
    export.export(run, tmp_path / "out", 4)
  assert load.load(tmp_path / "out").bits == 8
  export.export(run, tmp_path / "out", 4, overwrite=True)
  assert load.load(tmp_path / "out").bits == 4
  with pytest.raises(errors.InputError, match="is the source itself"):
    export.export(run, run, overwrite=True)
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "thesis.tex").touch()
  with pytest.raises(errors.InputError, match=r"holds other things \(thesis.tex\) and is not an exported model"):
    export.export(run, tmp_path / "other", overwrite=True)


@pytest.mark.parametrize("bits, dtype, message", [(3, None, "bits is 3: give 8 or 4"), (4, "int8", "dtype is 'int8'")])
def test_bad_arguments(run: pathlib.Path, tmp_path: pathlib.Path, bits: int, dtype: str | None, message: str):
  with pytest.raises(errors.InputError, match=message):
    export.export(run, tmp_path / "out", bits, dtype)


@pytest.mark.parametrize(
  "file",
  [
    "params/embedding.table/0.0",
    "params/layers.mlp.wi.kernel.values/0.0.0.0",
    "params/layers.attention.qkv.kernel.scale/0.0.0.0.0",
    "checksums.json",
    "config.json",
    "tokenizer/tokenizer.model",
  ],
)
def test_damaged_export_is_named(run: pathlib.Path, tmp_path: pathlib.Path, file: str):
  out = tmp_path / "out"
  export.export(run, out, 4)
  _flip(out / file)
  with pytest.raises(errors.InputError) as caught:
    load.load(out)
  assert (file.rsplit("/", 1)[0] if file.startswith("params") else file) in str(caught.value)
  assert "\n" not in str(caught.value)
  (out / file).unlink()
  with pytest.raises(errors.InputError) as caught:
    load.load(out)
  assert file in str(caught.value) or file == "config.json"


def _flip_chunk(array: pathlib.Path) -> None:
  _flip(next(file for file in array.iterdir() if file.name != ".zarray"))


def test_damaged_run_falls_back(
  run: pathlib.Path, params: Any, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
  _flip_chunk(run / "checkpoints/2/state/params.layers.mlp.wo.kernel")
  assert export.export(run, tmp_path / "out")["step"] == 1
  assert "step 1 is used instead: params/layers/mlp/wo/kernel" in caplog.text
  _assert_equal(load.load(run).params, params)


def test_a_damaged_optimizer_does_not_matter_here(run: pathlib.Path):
  _flip_chunk(run / "checkpoints/2/state/opt_state.0.layers.mlp.wo.kernel")
  assert load.load(run).metadata["step"] == 2


def test_folders_that_are_no_models(tmp_path: pathlib.Path, run: pathlib.Path):
  for path, message in ((tmp_path / "nope", "no such folder"), (tmp_path, "no model's folder")):
    with pytest.raises(errors.InputError, match=message):
      load.load(path)
  (run / "config.json").rename(run / "moved")
  with pytest.raises(errors.InputError, match="half-written: it has checkpoints/ but no config.json"):
    load.load(run)
  (run / "config.json").write_text('{"model"')
  with pytest.raises(errors.InputError, match="config.json: not JSON"):
    load.load(run)
  (run / "moved").rename(run / "config.json")
  (run / "checkpoints").rename(run / "elsewhere")
  with pytest.raises(errors.InputError, match="no complete checkpoint yet"):
    load.load(run)


def test_config_of_another_model(run: pathlib.Path):
  config = folder_lib.read_config(run)
  folder_lib.write_config(run, dataclasses.replace(config, model=dataclasses.replace(_CONFIG, num_layers=3)))
  with pytest.raises(errors.InputError, match="parameters and its config.json describes"):
    load.load(run)


def test_a_value_that_no_model_has_is_told_with_its_file(run: pathlib.Path):
  path = run / "config.json"
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, "model": {**content["model"], "norm": "float32"}}))
  with pytest.raises(errors.InputError, match=f"{path}: GLMConfig.norm is 'float32'"):
    load.load(run)


def test_tokenizers_that_do_not_fit(run: pathlib.Path, tmp_path: pathlib.Path):
  right = run / "tokenizer"
  right.rename(tmp_path / "right")
  with pytest.raises(errors.InputError, match="tokenizer.json: missing"):
    load.load(run)
  _tokenizer(right, 97)
  with pytest.raises(errors.InputError, match="has 97 ids and the model's vocabulary 96"):
    load.load(run)
  right.rename(tmp_path / "large")
  _tokenizer(right, 90, b"other")
  with pytest.raises(errors.InputError, match="use the tokenizer that it was trained with"):
    load.load(run)
  with pytest.raises(errors.InputError, match="is another tokenizer"):
    tokenizer_folder.copy(tmp_path / "right", run / folder_lib.TOKENIZER)


@pytest.mark.parametrize("bits", [None, 4])
def test_loads_onto_a_mesh(run: pathlib.Path, tmp_path: pathlib.Path, params: Any, bits: int | None):
  export.export(run, tmp_path / "out", bits)
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  specs = {"layers/mlp/wo/kernel": P(None, "tensor", None), "layers/mlp/wi/kernel": P(None, None, None, "tensor")}
  names = arrays.named_leaves(params)
  shardings = params_lib.nest({name: NamedSharding(mesh, specs.get(name, P())) for name in names})
  loaded = load.load(tmp_path / "out", shardings=shardings)
  _assert_equal(loaded.params, load.load(tmp_path / "out").params)
  kernel = loaded.params["layers"]["mlp"]["wo"]["kernel"]
  if bits:
    assert kernel.values.sharding.spec == P(None, "tensor", None)
    assert kernel.scale.sharding.is_fully_replicated
  else:
    assert kernel.sharding.spec == P(None, "tensor", None)


def test_weights_that_do_not_divide_over_the_mesh(run: pathlib.Path, params: Any):
  mesh = jax.make_mesh((3,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
  shardings = jax.tree.map(lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "tensor")), params)
  with pytest.raises(errors.InputError, match="does not divide over the mesh"):
    load.load(run, shardings=shardings)


def test_failed_write_leaves_nothing(run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
  def fail(*_: Any) -> None:
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(publish, "write_json", fail)
  with pytest.raises(errors.InputError, match="could not be written .*the disk is full"):
    export.export(run, tmp_path / "sub" / "out")
  assert not (tmp_path / "sub").exists()


def test_loading_needs_neither_tensorflow_nor_the_model_nor_warns(run: pathlib.Path):
  code = (
    "import sys; from glmjax.checkpoint import load; loaded = load.load(sys.argv[1]); "
    "print([m for m in ('tensorflow', 'seqio', 'optax', 'gin', 'sentencepiece') if m in sys.modules])"
  )
  command = [sys.executable, "-W", "error", "-c", code, str(run)]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]" and done.stderr == "", (done.stdout, done.stderr)


def test_what_killed_exports_left_is_removed(
  run: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
  """Of this name, and of processes of this machine that are gone; what may live elsewhere is told."""
  here = owner.host()
  gone = (f".out.{here}.999999999.tmp", f".out.{here}.999999998.tmp")
  kept = (
    f".out.{here}.1.tmp",
    f".other.{here}.999999999.tmp",
    f".out.{here}.x.tmp",
    f".out.{here}.999999999.tmp2",
    ".out.elsewhere.999999999.tmp",
  )
  for name in (*gone, *kept):
    (tmp_path / name / "params").mkdir(parents=True)
  export.export(run, tmp_path / "out", 8)
  assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".o")} == set(kept)
  assert ".out.elsewhere.999999999.tmp is of an export on another machine" in caplog.text
  old = tmp_path / f".out.{here}.999999999.old"
  old.mkdir()  # killed when the old one was aside, and the new one in place
  export.export(run, tmp_path / "out", 4, overwrite=True)
  assert not old.exists() and load.load(tmp_path / "out").bits == 4
  (tmp_path / "out").rename(old)  # killed between two renames: the next writer puts it back
  with pytest.raises(errors.InputError, match="is there already"):
    export.export(run, tmp_path / "out", 8)
  assert load.load(tmp_path / "out").bits == 4


def test_two_exports_to_one_folder(run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
  """The second is refused at once, and the first is not disturbed."""
  write = export.write_folder

  def both(content: export.ExportSource, folder: pathlib.Path) -> None:
    for overwrite in (False, True):
      with pytest.raises(errors.InputError, match=r"out is being written by another export or import \(process"):
        export.export(run, tmp_path / "out", 4, overwrite=overwrite)
    write(content, folder)

  monkeypatch.setattr(export, "write_folder", both)
  export.export(run, tmp_path / "out", 8)
  assert load.load(tmp_path / "out").bits == 8 and not (tmp_path / ".out.lock").exists()


def test_fingerprint(run: pathlib.Path, tmp_path: pathlib.Path):
  """A copy is the same; another step, precision or way of computing is not."""
  for name, bits in (("a", None), ("b", None), ("c", 8), ("d", 4)):
    export.export(run, tmp_path / name, bits)
  found = {name: load.fingerprint(tmp_path / name) for name in "abcd"}
  assert found["a"] == found["b"] == load.fingerprint(run) and len(set(found.values())) == 3
  shutil.rmtree(run / "checkpoints" / "2")
  assert load.fingerprint(run) not in found.values()
  config = folder_lib.read_config(run)
  before = load.fingerprint(run)
  folder_lib.write_config(run, dataclasses.replace(config, model=dataclasses.replace(_CONFIG, dtype="bfloat16")))
  assert load.fingerprint(run) != before


def test_room_is_told_in_fitting_units(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
  usage = shutil.disk_usage(tmp_path)
  for shape, free, line in (
    ((1000, 500), 300_000, "0.3 MB free and 2.0 MB are"),
    ((10**6, 3000), 10**8, "100.0 MB free and 12.0 GB are"),
  ):
    monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
    with pytest.raises(errors.InputError, match=line):
      stored_weights.need_room(tmp_path, [stored_weights.StoredWeight("embedding/table", shape, "float32")])
