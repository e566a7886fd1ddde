"""Weights as rows of inputs, for the C++ library of products on CPUs and for XLA alone."""

from collections.abc import Iterator
import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax import tokens
from glmjax.infer import decode
from glmjax.infer import placement
from glmjax.infer import prompt
from glmjax.infer import runner
from glmjax.infer import sampling
from glmjax.kernels.cpu import by_xla
from glmjax.kernels.cpu import library
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import output_rows
from glmjax.models import weights
from glmjax.parallel import partitioning
from glmjax.quantize import qarray

THERE = library.status().available
SPECIALS = tokens.icetk(0, 80)
CONFIG = config_lib.GLMConfig(vocab_size=96, num_layers=2, embed_dim=64, num_heads=4, mlp_dim=80, max_length=64)
KINDS = [(None, None), (8, None), (8, 8), (4, None), (4, 8)]  # bits of weights and of activations


@pytest.fixture(params=["library", "XLA alone"], scope="module")
def way(request) -> Iterator[str]:
  with pytest.MonkeyPatch.context() as monkeypatch:
    if request.param == "XLA alone":
      alone(monkeypatch)
    elif not THERE:
      pytest.skip(library.status().words)
    yield request.param
  jax.clear_caches()


def alone(monkeypatch) -> None:
  """Does without the library from here on; programs of before would go on with it."""
  monkeypatch.setenv(library.ISA, "none")
  jax.clear_caches()


@functools.cache
def parameters(config: config_lib.GLMConfig, bits: int | None) -> dict:
  found = glm.init_params(config, jax.random.key(1))
  return found if bits is None else weights.quantize(found, bits)


def logits(model: runner.Runner, rows: int = 3) -> np.ndarray:
  """Logits behind prompts of the same tokens, [rows, V]."""
  some = [
    prompt.fill([5, 6, 7, SPECIALS.gmask, *range(8, 8 + i)], SPECIALS, model.config.position_kind) for i in (3, 0, 9)
  ]
  batch, known = decode.make_rows(some[:rows], [4] * rows, SPECIALS.pad, rows, 16)
  state = model.run(decode.prefill, batch, known, new_tokens=8)
  return np.asarray(model.run(jax.jit(decode.next_logits, static_argnums=0), known, state)[0])


@pytest.mark.parametrize(
  "spec, x_shape, shape, num_inputs",
  [
    ("BLD,DTHK->BLTHK", (2, 3, 24), (24, 3, 5, 4), 1),
    ("BLHK,HKD->BLD", (2, 3, 6, 4), (6, 4, 20), 2),
    ("BLF,FD->BLD", (1, 1, 24), (24, 20), 1),
  ],
)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("groups", [1, 3])
def test_products_are_einsums(way, spec, x_shape, shape, num_inputs, bits, groups):
  r = np.random.default_rng(0)
  x, weight = (jnp.asarray(r.normal(size=size), jnp.float32) for size in (x_shape, shape))
  if bits is not None:
    parts = [qarray.quantize(part, bits, range(num_inputs)) for part in jnp.split(weight, groups)]
    values, scale = (jnp.concatenate([getattr(part, name) for part in parts]) for name in ("values", "scale"))
    weight = dataclasses.replace(parts[0], values=values, scale=scale)
  target = partitioning.target()
  found = output_rows.of(weight, num_inputs, False).product(target, spec, x)
  expected = jnp.einsum(spec, x, weight if bits is None else qarray.dequantize(weight), precision="highest")
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  rounded = output_rows.of(weight, num_inputs, True).product(target, spec, x, dtype=jnp.bfloat16)
  assert rounded.dtype == jnp.bfloat16
  assert np.abs(rounded.astype(jnp.float32) - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("bits, activation_bits, tied", [(*kind, i % 2 == 0) for i, kind in enumerate(KINDS)])
@pytest.mark.skipif(not THERE, reason=library.status().words)
def test_a_model_says_the_same_with_the_library_and_without(monkeypatch, bits, activation_bits, tied):
  config = dataclasses.replace(CONFIG, activation_bits=activation_bits, tie_embeddings=tied)
  params = parameters(config, bits)
  model = runner.Runner(config, params)
  assert isinstance(model.params["layers_0"]["mlp"]["wi"]["kernel"], output_rows.OutputRows)
  found = logits(model)
  alone(monkeypatch)
  expected = logits(model)
  assert np.abs(found - expected).max() < (1e-4 if activation_bits is None else 0.02) * expected.std()
  if activation_bits is not None:
    exact = logits(runner.Runner(dataclasses.replace(config, activation_bits=None), params))
    assert 1e-3 < np.abs(found - exact).max() / exact.std() < 0.1
  jax.clear_caches()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_model_says_the_same_in_both_layouts(way, bits):
  """The other is that of a mesh, here of one device whose rules split nothing."""
  params = parameters(CONFIG, bits)
  model = runner.Runner(CONFIG, params)
  plain = copy.copy(model)
  plain.params = glm.unstack_layers(params) | {"head": {"kernel": params["embedding"]["table"].T}}
  expected = logits(plain)
  assert np.abs(logits(model) - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("bits, activation_bits", KINDS)
def test_a_row_is_the_same_alone_and_among_others(way, bits, activation_bits):
  """Of the products, that is: XLA sums some of attention otherwise for one row, and alone also products of floats."""
  r = np.random.default_rng(0)
  weight = jnp.asarray(r.normal(size=(64, 48)), jnp.float32)
  weight = weight if bits is None else qarray.quantize(weight, bits, (0,))
  rows, x = output_rows.of(weight, 1, activation_bits == 8), jnp.asarray(r.normal(size=(9, 1, 64)), jnp.float32)

  def product(x: jax.Array) -> np.ndarray:
    return np.asarray(rows.product(partitioning.target(), "BLF,FD->BLD", x))

  together = product(x)
  exact = way == "library" or activation_bits == 8
  for i in range(9):
    np.testing.assert_allclose(product(x[i : i + 1])[0], together[i], rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_is_the_table_itself(way, dtype):
  model = runner.Runner(dataclasses.replace(CONFIG, dtype=dtype), parameters(CONFIG, None))
  head, table = model.params["head"]["kernel"].values, model.params["embedding"]["table"]
  assert head.unsafe_buffer_pointer() == table.unsafe_buffer_pointer()
  assert table.dtype == (jnp.uint16 if dtype == "bfloat16" else jnp.float32)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_step_in_half_precision_makes_no_floats_of_weights(monkeypatch, way, bits):
  monkeypatch.setattr(by_xla, "_BLOCK", 2**12)
  config = dataclasses.replace(CONFIG, vocab_size=2048, embed_dim=128, mlp_dim=256, dtype="bfloat16")
  model = runner.Runner(config, parameters(config, bits))
  arguments = (
    model.placement.rows(1),
    model.placement.state(model.config, 1, 16, 16),
    sampling.draws([sampling.Sampling()], [0]),
    np.zeros(2048, bool),
    np.zeros(2048, bool),
    np.int32(4),
  )
  with model.placement.scope():
    compiled = decode.decode.lower(model.config, model.params, *arguments).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 128  # a byte for each of the table


def test_what_is_read_ahead_of_programs_is_what_is_placed(way):
  for bits in (None, 8, 4):
    for dtype, head_bits in (("float32", None), ("bfloat16", 4), ("bfloat16", None), ("float16", None)):
      config = dataclasses.replace(CONFIG, dtype=dtype, head_bits=head_bits)
      model = runner.Runner(config, parameters(config, bits))
      abstract = model.placement.laid_out(model.config, bits)
      assert jax.tree.structure(abstract) == jax.tree.structure(model.params)
      for x, y in zip(jax.tree.leaves(abstract), jax.tree.leaves(model.params)):
        assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)


@pytest.mark.parametrize("name, wrong", [("activation_bits", 4), ("head_bits", 2)])
def test_what_is_for_one_cpu_is_told(name, wrong):
  config = dataclasses.replace(CONFIG, **{name: 8})
  told = pytest.raises(errors.InputError, match=f"{name} is for one CPU, in float32 or bfloat16, without offloaded")
  with told:
    runner.Runner(config, parameters(config, None), placement.on_mesh("tensor=2"))
  with told:
    runner.Runner(config, parameters(config, None), offload_layers=1)
  with pytest.raises(errors.InputError, match=f"GLMConfig.{name} is {wrong}"):
    dataclasses.replace(CONFIG, **{name: wrong})


@pytest.mark.parametrize("dtype, bits, tied", [("float32", 8, True), ("bfloat16", 4, True), ("bfloat16", 8, False)])
def test_a_quantized_head_is_the_head_of_its_codes(way, monkeypatch, dtype, bits, tied):
  """Made some rows at a time, as quantize makes them of the whole."""
  monkeypatch.setattr(output_rows, "_AT_ONCE", 7 * CONFIG.embed_dim)
  config = dataclasses.replace(CONFIG, head_bits=bits, tie_embeddings=tied, dtype=dtype)
  params = parameters(config, None)
  model = runner.Runner(config, params)
  kernel_DV = params["embedding"]["table"].T if tied else params["head"]["kernel"]
  expected = output_rows.of(qarray.quantize(kernel_DV.astype(dtype), bits, (0,)), 1, False)
  jax.tree.map(np.testing.assert_array_equal, model.params["head"]["kernel"], expected)
  found, whole = logits(model), logits(runner.Runner(dataclasses.replace(config, head_bits=None), params))
  assert 1e-4 < np.abs(found - whole).max() / whole.std() < (0.1 if bits == 8 else 1)


@pytest.mark.parametrize("bits, activation_bits", KINDS)
def test_rows_that_are_not_needed_give_zeros_and_change_no_other(way, bits, activation_bits):
  r = np.random.default_rng(0)
  weight = jnp.asarray(r.normal(size=(64, 48)), jnp.float32)
  weight = weight if bits is None else qarray.quantize(weight, bits, (0,))
  rows, x = output_rows.of(weight, 1, activation_bits == 8), jnp.asarray(r.normal(size=(9, 1, 64)), jnp.float32)
  needed = jnp.asarray(r.random(9) < 0.5)
  whole, some = (
    np.asarray(each.product(partitioning.target(), "BLF,FD->BLD", x))
    for each in (rows, output_rows.for_rows({"w": rows}, needed)["w"])
  )
  np.testing.assert_array_equal(some, np.where(np.asarray(needed)[:, None, None], whole, 0))
