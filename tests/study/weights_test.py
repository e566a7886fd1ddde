"""Figures of weights: of matrices of known spread, and of runs and exports against what really quantizes them."""

import errno
import json
import shutil

import jax
import numpy as np
import pytest
from scipy import stats
import untrained_run

from glmjax import errors
from glmjax.checkpoint import blocks, export, load, stored_weights
from glmjax.data import mixtures, token_cache
from glmjax.evaluate import heldout
from glmjax.io import publish
from glmjax.models import params as params_lib
from glmjax.quantize import qarray
from glmjax.study import kernels, weights

KERNELS = ("attention/qkv", "attention/out", "mlp/wi", "mlp/wo")


def figures(matrix, pieces=1):
  """The figures of a matrix, read in so many blocks of its outputs."""
  return kernels.figures("layers_0/mlp/wo", "mlp/wo", lambda: iter(np.array_split(matrix, pieces, 1)), (0,))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return untrained_run.write(tmp_path_factory.mktemp("of") / "run")


@pytest.fixture(scope="module")
def exported(run):
  """The run's float export, and those of it in INT8 and INT4."""
  for name, source, settings in (
    ("float", run, {}),
    ("half", run, {"dtype": "float16"}),
    ("int8", run, {"bits": 8}),
    ("int4", run, {"bits": 4}),
    ("half_int4", run.parent / "half", {"bits": 4}),
  ):
    export.export(source, run.parent / name, **settings)
  return run.parent


@pytest.fixture(scope="module")
def cache(run):
  text = run.parent / "en.txt"
  days = [f"On day {i} the quick brown fox jumps over {i} lazy dogs." * (1 + i % 3) for i in range(120)]
  text.write_text("\n\n".join(days) + "\n")
  made = mixtures.pretraining({"en": str(text)}, run / "tokenizer")
  token_cache.cache_mixture(made, run.parent / "cache", num_shards=1, num_workers=0)
  return run.parent / "cache"


@pytest.mark.parametrize("draw", ["normal", "laplace"])
def test_moments_and_shares_are_numpys(draw):
  matrix = getattr(np.random.default_rng(0), draw)(0.01, 0.02, (96, 80)).astype(np.float32)
  matrix[3, 5] = 0.5
  found, exact = figures(matrix, 3), matrix.astype(np.float64)
  rms = np.sqrt(np.square(exact).mean())
  assert found.count == 96 * 80
  np.testing.assert_allclose(found.kurtosis, stats.kurtosis(exact, axis=None), rtol=1e-9)
  assert found.outliers == np.mean(np.abs(exact - exact.mean()) > 6 * exact.std()) > 0
  np.testing.assert_allclose([found.rms, found.largest], [rms, np.abs(exact).max() / rms], rtol=1e-9)
  assert found.histogram.tolist() == np.histogram(exact / rms, kernels.bins())[0].tolist()
  assert found.histogram.sum() == found.count


def test_blocks_do_not_matter():
  matrix = np.random.default_rng(1).standard_t(4, (66, 40)).astype(np.float32)
  whole, cut = figures(matrix), figures(matrix, 2)
  assert whole.histogram.tolist() == cut.histogram.tolist() and whole.outliers == cut.outliers
  np.testing.assert_allclose(cut.kurtosis, whole.kurtosis, rtol=1e-9)
  for name, value in whole.errors.items():
    np.testing.assert_allclose(cut.errors[name], value, rtol=1e-5)


def test_heavy_tails_are_told_and_cost_more():
  draw = np.random.default_rng(2)
  normal, heavy = (figures(x.astype(np.float32)) for x in (draw.normal(size=(512, 64)), draw.laplace(size=(512, 64))))
  assert abs(normal.kurtosis) < 0.2 < 2 < heavy.kurtosis < 4
  assert normal.outliers == 0 < heavy.outliers
  for name in kernels.SCHEMES:
    assert heavy.errors[name] > normal.errors[name] > 0


def test_groups_keep_outliers_among_themselves():
  matrix = np.random.default_rng(3).normal(size=(256, 32)).astype(np.float32)
  matrix[7] *= 30
  found = figures(matrix).errors
  assert found["int8"] < found["int4_group32"] < found["int4_group64"] < found["int4"]


def test_values_that_are_all_the_same_have_no_spread():
  for value in (0.0, 0.3):
    found = figures(np.full((8, 6), value, np.float32))
    assert found.kurtosis == found.outliers == 0 and found.histogram.sum() == 48
    assert found.errors["int8"] < 1e-3


@pytest.mark.parametrize("scheme", [kernels.Scheme(4), kernels.Scheme(4, 64), kernels.Scheme(8, 32)])
def test_a_group_is_rounded_as_a_row_of_its_own(scheme):
  """The last one is what is left; inputs need not be even in number, nor in front."""
  matrix = np.random.default_rng(4).normal(size=(5, 99)).astype(np.float32)
  found = kernels.rounded(matrix, scheme, (-1,))
  size = scheme.group or 99
  for at in range(0, 99, size):
    part = matrix[:, at : at + size]
    scale = (np.abs(part).max(1, keepdims=True) / (2 ** (scheme.bits - 1) - 1)).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found[:, at : at + size], np.round(part / scale) * scale)


@pytest.mark.parametrize(
  "source, scheme, real", [("run", "int8", "int8"), ("run", "int4", "int4"), ("half", "int4", "half_int4")]
)
def test_rows_are_rounded_as_exports_are(exported, source, scheme, real):
  fake = params_lib.flatten(weights.rounded(load.load(exported / source).params, kernels.SCHEMES[scheme]))
  written = params_lib.flatten(load.load(exported / real).params)
  rounded = [path for path, x in written.items() if isinstance(x, qarray.QuantizedArray)]
  assert sorted(rounded) == sorted(f"layers/{kernel}/kernel" for kernel in KERNELS)
  for path in rounded:
    np.testing.assert_array_equal(fake[path], qarray.dequantize(written[path]))


def test_errors_are_those_of_exports(exported):
  """Of each layer by itself; embedding and head stay apart."""
  step, found = kernels.measure(exported / "run")
  assert step == 1
  assert [each.path for each in found if each.kind not in KERNELS] == ["embedding/table"]
  floats = params_lib.flatten(load.load(exported / "run").params)
  for name in ("int8", "int4"):
    codes = params_lib.flatten(load.load(exported / name).params)
    for each in found[1:]:
      path, layer = f"layers/{each.kind}/kernel", int(each.path[7])
      w = np.asarray(floats[path][layer])
      changed = np.linalg.norm(w - np.asarray(qarray.dequantize(codes[path])[layer])) / np.linalg.norm(w)
      np.testing.assert_allclose(each.errors[name], changed, rtol=1e-5)
      np.testing.assert_allclose(each.kurtosis, stats.kurtosis(w.astype(np.float64), axis=None), atol=1e-9)


def test_no_more_than_a_block_is_read_at_a_time(run, monkeypatch):
  whole, sizes = kernels.measure(run)[1], []
  read = blocks.Reader.read

  def noting(reader, name, region):
    block = read(reader, name, region)
    sizes.append(block.size)
    return block

  monkeypatch.setattr(blocks.Reader, "read", noting)
  monkeypatch.setattr(stored_weights, "ELEMENTS", 800)
  cut = kernels.measure(run)[1]
  assert max(sizes) <= 800 and sum(sizes) == 2 * sum(each.count for each in whole)
  for one, other in zip(whole, cut, strict=True):
    assert one.path == other.path and one.histogram.tolist() == other.histogram.tolist()
    np.testing.assert_allclose(one.kurtosis, other.kurtosis, atol=1e-9)


def test_the_whole_study(exported, cache, tmp_path):
  """Two checkpoints of the same weights: the second's rounding costs what the first's does, to the bit."""
  out = tmp_path / "made" / "weights"
  settings = {"max_tokens": 600, "seed": 3}
  found = weights.measure(
    [exported / "run", exported / "float"], out, cache, ["GLM", "as exported"], seq_length=64, **settings
  )
  assert json.loads((out / "weights.json").read_text()) == found
  assert (out / "weights.png").read_bytes().startswith(b"\x89PNG")
  page = (out / "weights.md").read_text()
  assert page.startswith("# Weights: GLM, as exported\n") and "| mlp/wo | as exported |" in page
  of = found["held_out"]["en"]
  for name in of:
    for scheme in kernels.SCHEMES:
      figures = of[name][scheme]
      value, low, high = figures["change"]
      assert low <= value <= high
      np.testing.assert_allclose(value, figures["bits_per_byte"] - of[name]["float"]["bits_per_byte"], atol=1e-9)
    assert abs(of[name]["int8"]["change"][0]) < abs(of[name]["int4"]["change"][0])
  assert of["as exported"]["int4"]["beside_first"] == [0.0, 0.0, 0.0]
  assert "beside_first" not in of["GLM"]["int4"]
  usual = heldout.evaluate(exported / "run", cache, max_fills=0, seq_length=64, **settings)["en"]["bits_per_byte"]
  np.testing.assert_allclose(of["GLM"]["float"]["bits_per_byte"], usual, rtol=0.01)  # computed in bfloat16
  weights.measure([exported / "run"], out)  # over its own files, without a cache
  assert list(json.loads((out / "weights.json").read_text())["checkpoints"]) == ["run"]


def test_mistakes_are_said_in_a_line(exported, cache, tmp_path, monkeypatch):
  """Before the work; what was there stays."""
  monkeypatch.chdir(tmp_path)
  for folder in ("other", "a/run", "b/run"):
    (tmp_path / folder).mkdir(parents=True)
  (tmp_path / "other" / "weights.json").write_text("{}")
  run, out = exported / "run", tmp_path / "out"
  for given, said in (
    (([exported / "int4"], out), "is an INT4 model, rounded already: name the training run or a float export"),
    (([], out), "0 checkpoints: a picture has room for 1 to 4"),
    (([run] * 5, out), "5 checkpoints"),
    (([run, run], out), "one is named twice"),
    (([run], out, None, ["a", "b"]), "--label is given 2 times for 1 checkpoints"),
    ((["a/run", "b/run"], out, None, ["a", "a"]), "two checkpoints have the same one"),
    (([run], tmp_path / "other"), "is not of glmjax weights, and would be lost"),
    (([run], exported / "float" / "params"), "belongs to an exported model"),
    (([run], out, tmp_path / "nothing"), "nothing"),
    (([tmp_path / "nothing"], out), "nothing"),
  ):
    with pytest.raises(errors.InputError, match=said) as caught:
      weights.measure(*given)
    assert "\n" not in str(caught.value)
  assert not out.exists() and (tmp_path / "other" / "weights.json").read_text() == "{}"


@pytest.mark.parametrize("refused", ["weights.json", "weights.md", "weights.png"])
def test_a_call_that_could_not_write_all_may_be_made_again(exported, tmp_path, monkeypatch, refused):
  file = publish.file

  def full(path):
    if path.name == refused:
      raise OSError(errno.ENOSPC, "no space")
    return file(path)

  out = tmp_path / "out"
  with monkeypatch.context() as patched:
    patched.setattr(publish, "file", full)
    with pytest.raises(errors.InputError, match="cannot be written: the disk is full"):
      weights.measure([exported / "run"], out)
  weights.measure([exported / "run"], out)
  assert sorted(path.name for path in out.iterdir()) == ["weights.json", "weights.md", "weights.png"]


def test_a_model_is_called_as_its_folder_however_that_is_written(exported, monkeypatch):
  monkeypatch.chdir(exported / "run" / "checkpoints")
  assert weights._names([".."], []) == ["run"] and weights._names([exported / "run" / "."], []) == ["run"]
  monkeypatch.chdir(exported / "run")
  assert weights._names([".", "../float"], []) == ["run", "float"]


def test_another_tokenizer_is_told_before_the_work(exported, cache, tmp_path, monkeypatch):
  foreign = shutil.copytree(exported / "float", tmp_path / "foreign")
  layout = json.loads((foreign / "tokenizer" / "tokenizer.json").read_text())
  (foreign / "tokenizer" / "tokenizer.json").write_text(json.dumps(layout | {"more": 1}))
  monkeypatch.setattr(kernels, "measure", None)
  with pytest.raises(errors.InputError, match=f"made with tokenizer .* make the cache with {foreign}/tokenizer"):
    weights.measure([exported / "run", foreign], tmp_path / "out", cache)
  assert not (tmp_path / "out").exists()


def test_models_that_read_other_windows_are_not_compared():
  one, other = (weights.Losses(targets, 9, {}) for targets in ([(1, 2), (3,)], [(1,), (2, 3)]))
  whole = {name: np.ones(2) for name in ("float", *kernels.SCHEMES)}
  losses = {"a": {"en": one}, "b": {"en": other}}
  for each in losses.values():
    each["en"].bits_W.update(whole)
  with pytest.raises(errors.InputError, match="a and b read the en text in other windows: give seq_length"):
    weights.compared(["a", "b"], losses, "en")
  assert weights.compared(["a"], losses, "en")["a"]["float"]["bits_per_byte"] == pytest.approx(2 / 9)


def test_layers_apart_are_rounded_as_layers_stacked(run):
  params = load.load(run).params
  flat = params_lib.flatten(params)
  apart = params_lib.nest({f"layers_0/{k.removeprefix('layers/')}": x[0] for k, x in flat.items() if "layers/" in k})
  one = params_lib.flatten(weights.rounded(apart, kernels.SCHEMES["int4"]))
  all_of_them = params_lib.flatten(weights.rounded(params, kernels.SCHEMES["int4"]))
  for path in (f"{kernel}/kernel" for kernel in KERNELS):
    assert jax.numpy.array_equal(one[f"layers_0/{path}"], all_of_them[f"layers/{path}"][0])
