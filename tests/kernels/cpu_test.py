"""The C++ library of products on CPUs: every instruction set that this machine has, against sums in float64."""

import itertools
import pathlib
import shutil
import subprocess
import threading

import cpu_rows
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glmjax import errors
from glmjax.kernels.cpu import library
from glmjax.kernels.cpu import product as product_lib

SOURCES = pathlib.Path(library.__file__).parent / "src"
STATUS = library.status()
needs_library = pytest.mark.skipif(not STATUS.available, reason=f"no library: {STATUS.words}")


@pytest.fixture(params=STATUS.sets)
def isa(request, monkeypatch):
  monkeypatch.setenv(library.ISA, request.param)
  return request.param


def multiplied(x, stored, scale, bits, mode):
  run = jax.jit(product_lib.product, static_argnames=("bits", "fast"))
  return np.asarray(run(x, stored, scale, bits=bits, fast=mode == "fast"))


def check(got, x, weight, mode="float32"):
  """Each is within rounding of the sum of its products."""
  exact = cpu_rows.as_bytes(x) if mode == "fast" else x.astype(np.float64)
  bound = 2e-6 * (np.abs(exact) @ np.abs(weight).T)
  assert (np.abs(got - exact @ weight.T) <= bound).all()


@needs_library
@pytest.mark.parametrize("bits, mode", cpu_rows.MODES)
def test_codes_of_all_sizes(isa, bits, mode):
  rng = np.random.default_rng(bits)
  for (rows, inputs, outputs, groups), dtype in zip(cpu_rows.SIZES, itertools.cycle((np.float16, np.float32))):
    if bits == 8:
      inputs += groups  # odd
    codes, stored = cpu_rows.codes_of(rng, bits, outputs, inputs)
    scale = rng.uniform(0.5, 2, (groups, outputs)).astype(dtype)
    x = cpu_rows.rows_of(rng, rows, inputs, mode)
    weight = codes * np.repeat(scale.astype(np.float64), inputs // groups, 0).T
    check(multiplied(x, stored, scale, bits, mode), x, weight, mode)


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint16"])
def test_floats_of_all_sizes(isa, dtype):
  rng = np.random.default_rng(0)
  for (rows, inputs, outputs, _), mode in zip(cpu_rows.SIZES, itertools.cycle(("float32", "bfloat16"))):
    inputs += 1
    weight = rng.normal(size=(outputs, inputs)).astype(np.float32)
    if dtype != "float32":
      weight = weight.astype(ml_dtypes.bfloat16)
    x = cpu_rows.rows_of(rng, rows, inputs, mode)
    stored = weight.view(np.uint16) if dtype == "uint16" else weight
    check(np.asarray(jax.jit(product_lib.float_product)(x, stored)), x, weight.astype(np.float64))


@needs_library
@pytest.mark.parametrize("bits, mode", cpu_rows.MODES)
def test_extreme_codes_and_scales(isa, bits, mode):
  """All codes the least or the greatest, rows at their largest, scales from float16's smallest to its largest."""
  least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  codes = np.array([[least] * 1030, [most] * 1030, [least, most] * 515, [0] * 1030], np.int8)
  scale = np.array([[6e-8, 65504, 1, 6e-5]], np.float16)
  x = np.stack([np.ones(1030), -np.ones(1030), np.tile([1.0, -1.0], 515)]).astype(np.float32)
  x = x.astype(ml_dtypes.bfloat16) if mode == "bfloat16" else x
  for rows in (1, 3, 12):
    x_rows = np.tile(x, (4, 1))[:rows]
    got = multiplied(x_rows, cpu_rows.packed(codes) if bits == 4 else codes, scale, bits, mode)
    check(got, x_rows, codes * scale.astype(np.float64).T, mode)


@needs_library
@pytest.mark.parametrize("bits, mode", cpu_rows.MODES)
def test_rows_that_are_not_finite_spoil_no_other(isa, bits, mode):
  for rows in (4, 12):
    cpu_rows.check_rows_that_are_not_finite(multiplied, rows, 260, bits, mode)


@needs_library
@pytest.mark.parametrize("bits, mode", cpu_rows.MODES)
def test_denormals_count_as_zeros_or_as_they_are(isa, bits, mode):
  """In rows; scales that are denormal in float16 are not in float32."""
  rng = np.random.default_rng(0)
  codes, stored = cpu_rows.codes_of(rng, bits, 5, 128)
  scale = np.full((1, 5), 6e-8, np.float16)
  x = np.full((9, 128), 1e-40, np.float32)
  x = x.astype(ml_dtypes.bfloat16) if mode == "bfloat16" else x
  assert (np.abs(multiplied(x, stored, scale, bits, mode)) <= 128 * 128 * 1e-40).all()
  x = cpu_rows.rows_of(rng, 9, 128, mode)
  x[:, 5] = 1e-39
  check(multiplied(x, stored, scale, bits, mode), x, codes * scale.astype(np.float64).T, mode)


@needs_library
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "fast"])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_a_row_is_the_same_whatever_is_computed_with_it(isa, bits, mode):
  """Bit for bit, alone, among any number up to 40, among 512, and in the second half of 600."""
  if mode == "fast" and bits > 8:
    return
  rng = np.random.default_rng(0)
  inputs, outputs, groups = (774, 37, 3) if bits == 8 else (4226, 6, 1)
  x = cpu_rows.rows_of(rng, 600, inputs, mode)
  if bits <= 8:
    _, weight = cpu_rows.codes_of(rng, bits, outputs, inputs)
    scale = rng.uniform(0.5, 2, (groups, outputs)).astype(np.float32)
  else:
    weight = rng.normal(size=(outputs, inputs)).astype(np.float32 if bits == 32 else ml_dtypes.bfloat16)

  def one(x):
    return (
      product_lib.product(x, weight, scale, bits, mode == "fast") if bits <= 8 else product_lib.float_product(x, weight)
    )

  counts = [*range(1, 41), 512]
  whole, few = jax.jit(lambda x: (one(x), [one(x[:count]) for count in counts]))(x)
  for count, found in zip(counts, few):
    np.testing.assert_array_equal(found, whole[:count], err_msg=f"{count} rows")
  np.testing.assert_array_equal(jax.jit(one)(x[597:]), whole[597:])


LARGE = 1024, 515  # inputs and outputs, of which threads share the work


@needs_library
def test_calls_at_once_do_not_wait_for_each_other():
  """From two threads, each program with calls that do not depend on one another."""
  rng = np.random.default_rng(0)
  _, stored = cpu_rows.codes_of(rng, 8, LARGE[1], LARGE[0])
  scale = np.ones((1, LARGE[1]), np.float32)

  @jax.jit
  def run(x):
    return [product_lib.product(x * k, stored, scale, 8, fast=bool(k % 2)) for k in range(1, 9)]

  x = cpu_rows.rows_of(rng, 12, LARGE[0], "float32")
  want, found = jax.device_get(run(x)), {}

  def repeat(name):
    found[name] = [jax.device_get(run(x)) for _ in range(20)]

  threads = [threading.Thread(target=repeat, args=(name,), daemon=True) for name in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=120)
    assert not thread.is_alive(), "two calls at once wait for each other"
  jax.tree.map(lambda *parts: [np.testing.assert_array_equal(parts[0], part) for part in parts], want, *found[0])
  jax.tree.map(lambda *parts: [np.testing.assert_array_equal(parts[0], part) for part in parts], want, *found[1])


@needs_library
def test_in_loops_and_with_donation():
  """Scan over layers, while_loop, and an argument whose memory the result may take."""
  rng = np.random.default_rng(0)
  size, layers = 96, 4
  stored = np.stack([cpu_rows.codes_of(rng, 4, size, size)[1] for _ in range(layers)])
  scale = rng.uniform(0.01, 0.02, (layers, 1, size)).astype(np.float16)
  x = cpu_rows.rows_of(rng, 2, size, "float32")

  def layer(x, weights):
    return product_lib.product(x, *weights, 4), None

  def scanned(x):
    return jax.lax.scan(layer, x, (stored, scale))[0]

  def looped(x):
    def step(carry):
      i, x = carry
      return i + 1, layer(x, (jnp.asarray(stored)[i], jnp.asarray(scale)[i]))[0]

    return jax.lax.while_loop(lambda carry: carry[0] < layers, step, (0, x))[1]

  want = x
  for weights in zip(stored, scale):
    want = layer(want, weights)[0]
  for way in (scanned, looped):
    np.testing.assert_array_equal(jax.jit(way)(x), want)
    np.testing.assert_array_equal(jax.jit(way, donate_argnums=0)(jnp.asarray(x)), want)


def refused(words, *arguments, run=product_lib.product):
  with pytest.raises(errors.InputError, match=words):
    run(*arguments)


def test_wrong_shapes_and_types_are_refused_in_words():
  x, codes, scale = np.ones((2, 8), np.float32), np.ones((3, 8), np.int8), np.ones((1, 3), np.float16)
  refused("bits is 2", x, codes, scale, 2)
  refused("8 inputs, and the weight of 4 bits 16", x, codes, scale, 4)
  refused("the x is float16", x.astype(np.float16), codes, scale, 8)
  refused("the codes is uint8", x, codes.astype(np.uint8), scale, 8)
  refused("the scale is float64", x, codes, scale.astype(np.float64), 8)
  refused("scale is \\(3,\\)", x, codes, scale[0], 8)
  refused("scale is \\(1, 2\\)", x, codes, scale[:, :2], 8)
  refused("8 inputs do not make 3 groups", x, codes, np.ones((3, 3), np.float16), 8)
  refused("8 inputs do not make 8 groups of whole bytes", x, codes[:, :4], np.ones((8, 3), np.float16), 4)
  refused("x is \\(8,\\)", x[0], codes, scale, 8)
  refused("x is \\(0, 8\\)", x[:0], codes, scale, 8)
  wide = jax.ShapeDtypeStruct((1, 2**18), jnp.float32), jax.ShapeDtypeStruct((3, 2**18), jnp.int8)
  refused("262144 inputs in a group", *wide, scale, 8, True)
  refused("the weight is int8", x, codes, run=product_lib.float_product)
  refused("x has 8 inputs, and the weight of 32 bits 7", x, np.ones((3, 7), np.float32), run=product_lib.float_product)


def test_the_instruction_set_can_be_chosen_and_the_library_left_out(monkeypatch):
  for name in STATUS.sets:
    monkeypatch.setenv(library.ISA, name)
    assert library.status().isa == name
  monkeypatch.setenv(library.ISA, "none")
  assert not library.status().available and "switched off" in library.status().words
  refused(
    "not there: switched off", np.ones((1, 2), np.float32), np.ones((1, 2), np.int8), np.ones((1, 1)).astype("f"), 8
  )
  monkeypatch.setenv(library.ISA, "sse9")
  with pytest.raises(errors.InputError, match="GLMJAX_CPU_ISA=sse9: it is one of avx512_bf16"):
    library.status()


@needs_library
def test_a_set_of_another_machine_is_refused(monkeypatch):
  other = next(name for name in ("neon", "avx2") if name not in STATUS.sets)
  monkeypatch.setenv(library.ISA, other)
  with pytest.raises(errors.InputError, match=f"{other}: this machine has"):
    library.status()


def test_a_library_that_is_missing_or_not_of_this_machine_says_so(monkeypatch, tmp_path):
  monkeypatch.setattr(library, "FILE", tmp_path / "libglmjax_cpu.so")
  lacks = library._load.__wrapped__().lacks
  assert lacks.startswith("not built") and "that builds it" in lacks  # a compiler that is too old fails
  library.FILE.write_bytes(b"\x7fELF of another kind")
  assert "another machine" in library._load.__wrapped__().lacks


@needs_library
def test_a_library_of_other_sources_is_not_used(monkeypatch):
  monkeypatch.setattr(library, "_INTERFACE", library._INTERFACE + 1)
  assert "other sources" in library._load.__wrapped__().lacks


def test_a_library_newer_than_this_jaxlib_is_not_registered():
  assert library.runtime_version() is not None
  assert not library._mismatch((0, 3), (0, 3)) and not library._mismatch((0, 3), (0, 5))
  assert "has 0.3: reinstall" in library._mismatch((0, 5), (0, 3))
  assert "has 1.0" in library._mismatch((0, 3), (1, 0))
  assert "does not say" in library._mismatch((0, 3), None)


def built(folder, *options, compiler="g++"):
  """The library's own test, compiled so."""
  sources = [
    *sorted(SOURCES.glob("set_*.cc")),
    *sorted(SOURCES.glob("attend_*.cc")),
    SOURCES / "choose.cc",
    pathlib.Path(__file__).parent / "cpu_driver.cc",
  ]
  program = folder / "driver"
  command = [compiler, "-std=c++17", "-ffp-contract=off", "-w", *options, f"-I{SOURCES}", *sources, "-pthread"]
  subprocess.run([*command, "-o", program], check=True)
  return program


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers, tmp_path):
  program = built(tmp_path, "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
  done = subprocess.run([program], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  assert [line.split()[0] for line in done.stdout.splitlines()][-1] == "generic" and "DIFFERS" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
  not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
  reason="no cross-compiler and emulator here (as root: apt-get install g++-aarch64-linux-gnu qemu-user)",
)
def test_neon_agrees_in_an_emulator(tmp_path):
  program = built(tmp_path, "-O3", "-static", compiler="aarch64-linux-gnu-g++")
  done = subprocess.run(["qemu-aarch64", program], capture_output=True, text=True, check=False)
  assert done.returncode == 0 and done.stdout.startswith("neon agrees"), done.stdout + done.stderr
