"""Exports of the layout "cpu": mapped without a copy, the same model, and read in parts as any other."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax import tokens
from glmjax.checkpoint import arrays
from glmjax.checkpoint import blocks
from glmjax.checkpoint import export
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load
from glmjax.checkpoint import manager
from glmjax.checkpoint import mapped
from glmjax.checkpoint import mapped_write
from glmjax.checkpoint import stored_weights
from glmjax.infer import decode
from glmjax.infer import placement
from glmjax.infer import prompt
from glmjax.infer import runner
from glmjax.io import memory
from glmjax.kernels.cpu import library
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.thudm import inspection
from glmjax.thudm import tensors
from glmjax.thudm import write

SPECIALS = tokens.icetk(0, 80)
SIZES = {"num_layers": 2, "embed_dim": 40, "num_heads": 2, "mlp_dim": 44, "max_length": 64}  # no multiples of 64 bytes
TIED = config_lib.GLMConfig(vocab_size=96, **SIZES)
UNTIED = config_lib.GLMConfig(  # as ChatGLM-6B's files want it
  vocab_size=95,
  positions="rotary_2d",
  mlp="gelu_tanh",
  residual_alpha=56**0.5,
  prefix_length=3,
  dtype="bfloat16",
  tie_embeddings=False,
  **SIZES,
)
LEARNED = config_lib.GLMConfig(vocab_size=96, positions="learned_2d", norm="sandwich", **SIZES)
ENCODER = config_lib.GLMConfig(vocab_size=96, prefix_length=3, prefix_hidden=8, dtype="bfloat16", **SIZES)
LORA = config_lib.GLMConfig(vocab_size=96, lora_rank=2, lora_kernels="attention/qkv,mlp/wo", **SIZES)
CONFIGS = {"tied": TIED, "untied": UNTIED, "learned": LEARNED, "encoder": ENCODER, "lora": LORA}
KINDS = [("tied", None), ("tied", 4), ("untied", None), ("untied", 8), ("untied", 4), ("learned", 4)]
KINDS += [("encoder", None), ("encoder", 4), ("lora", None), ("lora", 8)]
ANSWERING = [kind for kind in KINDS if kind[0] != "encoder"]  # decoding a layer at a time lacks the perceptron
WEIGHTS = "table", "position", "kernel", "prefix_key", "prefix_value", "lora_a", "lora_b"  # last names


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, int | None], tuple[pathlib.Path, pathlib.Path]]:
  """Of each model and precision an export and one of the layout "cpu" that was made from it."""
  found = {}
  for name, config in CONFIGS.items():
    root = tmp_path_factory.mktemp(name)
    (root / "run").mkdir()
    folder_lib.write_config(root / "run", folder_lib.FolderConfig(config, {"mixture": "m"}))
    saver = manager.Manager(root / "run" / "checkpoints")
    saver.save(1, {"params": glm.init_params(config, jax.random.key(1)), "step": jnp.int32(1)}, {"samples_seen": 1})
    saver.close()
    for bits in [bits for other, bits in KINDS if other == name]:
      export.export(root / "run", root / f"plain{bits}", bits)
      export.export(root / f"plain{bits}", root / f"cpu{bits}", layout="cpu")
      found[name, bits] = root / f"plain{bits}", root / f"cpu{bits}"
  return found


@pytest.fixture
def model(folders, tmp_path) -> pathlib.Path:
  """An export to spoil."""
  return shutil.copytree(folders["untied", 4][1], tmp_path / "model")


def logits(folder: pathlib.Path, mesh: str | None = None, **precision: str | int) -> np.ndarray:
  """Logits behind a prompt, [1, V]."""
  place = placement.on_mesh(mesh)
  found = runner.read(folder, place, placement.Precision(**precision))
  model = runner.Runner(found.config, found.params, place, given_away=True)
  one = prompt.fill([5, 6, 7, SPECIALS.gmask, 9], SPECIALS, model.config.position_kind)
  batch, known = decode.make_rows([one], [4], SPECIALS.pad, place.batch_size(1), 16)
  state = model.run(decode.prefill, batch, known, new_tokens=8)
  return np.asarray(model.run(jax.jit(decode.next_logits, static_argnums=0), known, state)[0])[:1]


def weights_file(folder: pathlib.Path) -> pathlib.Path:
  return folder / "params" / mapped.FILE


@pytest.mark.parametrize("kind", ANSWERING)
def test_it_is_the_same_model(folders, kind):
  plain, cpu = folders[kind]
  np.testing.assert_array_equal(logits(cpu), logits(plain))


@pytest.mark.parametrize(
  "precision", [{"activation_bits": 8, "head_bits": 4}, {"dtype": "bfloat16"}, {"dtype": "float32"}]
)
@pytest.mark.parametrize("kind", [("tied", 4), ("tied", None)])
def test_in_another_precision(folders, kind, precision):
  plain, cpu = folders[kind]
  np.testing.assert_array_equal(logits(cpu, **precision), logits(plain, **precision))


@pytest.mark.parametrize("kind", ANSWERING)
def test_without_the_library_and_on_a_mesh(folders, kind, monkeypatch):
  plain, cpu = folders[kind]
  monkeypatch.setenv(library.ISA, "none")
  jax.clear_caches()  # of programs that go on with the library
  np.testing.assert_array_equal(logits(cpu), logits(plain))
  if kind[0] == "tied":
    np.testing.assert_array_equal(logits(cpu, "tensor=2"), logits(plain, "tensor=2"))
  jax.clear_caches()


@pytest.mark.parametrize("kind", KINDS)
def test_programs_read_the_file_itself(folders, kind):
  _, cpu = folders[kind]
  place = placement.one_device()
  found = runner.read(cpu, place)
  params = runner.Runner(found.config, found.params, place, given_away=True).params
  config = placement.inference_config(found.config, place.target)
  abstract = place.laid_out(config, kind[1])
  names = arrays.named_leaves(params)
  if CONFIGS[kind[0]].tie_embeddings:  # programs compiled ahead know the head from the table by its place alone
    assert names["head/kernel/values"].unsafe_buffer_pointer() == names["embedding/table"].unsafe_buffer_pointer()
  assert jax.tree.structure(abstract) == jax.tree.structure(params)
  for x, y in zip(jax.tree.leaves(abstract), jax.tree.leaves(params)):
    assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
  ranges, dirty = mapping(weights_file(cpu))
  copied = {
    name.split("/", 1)[-1]
    for name, x in names.items()
    if not any(start <= x.unsafe_buffer_pointer() < stop for start, stop in ranges)
  }
  assert not any(name.endswith(("kernel/values", "kernel/scale_GO", "table")) for name in copied), copied
  assert dirty == 0  # what several processes map is there once


def test_what_is_mapped_is_not_free(folders, monkeypatch):
  """The system takes files' pages for free, and those of the model are read for every token."""
  monkeypatch.setattr(memory, "of_host", lambda: {"total": 10**9, "available": 10**8})
  monkeypatch.setattr(memory, "_of_container", lambda *_: None)
  plain, cpu = folders["tied", 4]
  free = []
  for folder in (plain, cpu):
    found = runner.read(folder, placement.one_device())
    model = runner.Runner(found.config, found.params, given_away=True)
    free.append(model.free_bytes())
  arrays_of_file = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.tree.leaves(model.params)}
  assert free[0] == 10**8
  assert 10**8 - sum(arrays_of_file.values()) <= free[1] < 10**8 - 0.9 * sum(arrays_of_file.values())
  monkeypatch.setattr(memory, "of_host", lambda: {"total": 10**9, "available": 10**3})
  assert model.free_bytes() == 0


def mapping(path: pathlib.Path) -> tuple[list[tuple[int, int]], int]:
  """Returns the addresses at which this process has mapped a file, and the kilobytes that it has of its own there."""
  ranges, dirty, here = [], 0, False
  for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
    if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+\s*(.*)", line):
      if here := place[3] == str(path):
        ranges.append((int(place[1], 16), int(place[2], 16)))
    elif here and line.startswith(("Private_Dirty", "Anonymous")):
      dirty += int(line.split()[1])
  return ranges, dirty


def test_the_file_is_safetensors(folders):
  for (name, bits), (_, cpu) in folders.items():
    found = tensors.open_safetensors(weights_file(cpu))
    assert not any(tensor.offset % 64 for key, tensor in found.items() if not key.startswith("padding_"))
    assert min(tensor.offset for tensor in found.values()) == 4096 * -(-min(t.offset for t in found.values()) // 4096)
    wi = found["layers_1/mlp/wi/kernel/values"]
    branches = CONFIGS[name].mlp_branches
    assert wi.shape == (branches * 44, 40 // 2 if bits == 4 else 40)
    whole = load.load(cpu).params["layers"]["mlp"]["wi"]["kernel"]
    ordinary = np.asarray(whole if bits is None else whole.values)[1]
    np.testing.assert_array_equal(wi.whole(), ordinary.reshape(-1, branches * 44).T)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_those_of_the_export(folders, kind):
  """Codes and scales to the bit; floats in the compute dtype, norms and biases as they are."""
  plain, cpu = (load.load(folder) for folder in folders[kind])
  dtype = CONFIGS[kind[0]].dtype
  expected = {
    name: x.astype(dtype) if name.endswith(WEIGHTS) else x for name, x in arrays.named_leaves(plain.params).items()
  }
  found = arrays.named_leaves(cpu.params)
  chex.assert_trees_all_equal(found, expected)
  assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in expected.items()}
  about, same = ({name: x for name, x in each.metadata.items() if name != "weights"} for each in (cpu, plain))
  assert cpu.config == plain.config and about == same and cpu.bits == plain.bits
  if dtype == plain.config.param_dtype:
    assert load.fingerprint(folders[kind][0]) == load.fingerprint(folders[kind][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [200, None])
def test_it_gives_back_what_it_was_made_of(folders, kind, elements, tmp_path, monkeypatch):
  if elements is not None:
    monkeypatch.setattr(stored_weights, "ELEMENTS", elements)
  plain, cpu = folders[kind]
  dtype = CONFIGS[kind[0]].dtype
  first = export.export(plain, tmp_path / "cpu", layout="cpu")  # in blocks of these sizes
  assert weights_file(tmp_path / "cpu").read_bytes() == weights_file(cpu).read_bytes()
  assert first["dtype"] == dtype and first["array_bytes"] <= weights_file(cpu).stat().st_size
  export.export(tmp_path / "cpu", tmp_path / "back")
  chex.assert_trees_all_equal(load.load(tmp_path / "back").params, load.load(cpu).params)
  assert "layout" not in folder_lib.read_config(tmp_path / "back").export
  export.export(tmp_path / "back", tmp_path / "again", layout="cpu")
  assert weights_file(tmp_path / "again").read_bytes() == weights_file(cpu).read_bytes()


@pytest.mark.parametrize(
  "kind, form", [(("untied", 8), "chatglm-hf"), (("untied", 4), "chatglm-hf"), (("tied", 4), "glm130b-sat")]
)
def test_other_formats_have_the_same_codes(folders, kind, form, tmp_path):
  results = []
  for i, folder in enumerate(folders[kind]):
    export.export(
      folder, tmp_path / str(i), dtype="float32", write_format=write.write_format(form, 1 if "130" in form else None)
    )
    [path] = [path for path in (tmp_path / str(i)).rglob("*") if path.suffix in (".safetensors", ".pt")]
    opened = inspection.shards_lib.open_file(path)
    results.append({key: tensor.whole() for key, tensor in opened.items()})
  assert results[0].keys() == results[1].keys()
  for key, x in results[0].items():
    is_float = x.dtype == np.float32
    np.testing.assert_allclose(results[1][key], x, rtol=2**-8 if is_float else 0, atol=0)


def test_a_run_is_exported_at_once(folders, tmp_path):
  run = folders["untied", None][0].parent / "run"
  result = export.export(run, tmp_path / "out", 4, layout="cpu")
  assert (result["bits"], result["dtype"], result["step"]) == (4, "bfloat16", 1)
  found, codes = load.load(tmp_path / "out").params, load.load(folders["untied", 4][0]).params
  chex.assert_trees_all_equal(found["layers"]["mlp"]["wi"]["kernel"], codes["layers"]["mlp"]["wi"]["kernel"])
  assert found["layers"]["mlp_norm"]["scale"].dtype == jnp.float32 and found["head"]["kernel"].dtype == jnp.bfloat16
  export.export(run, tmp_path / "float32", 4, "float32", layout="cpu")
  again = load.load(tmp_path / "float32")
  assert again.config.dtype == "float32" and again.params["head"]["kernel"].dtype == jnp.float32


def test_what_cannot_be_is_told(folders, tmp_path):
  plain, _ = folders["untied", None]
  for changed, message in (
    ({"layout": "gpu"}, "layout is 'gpu': cpu is known"),
    ({"layout": "cpu", "dtype": "float16"}, "dtype is 'float16': CPUs compute in float32 or bfloat16"),
    ({"layout": "cpu", "out": "gs://bucket/model"}, "gs://bucket/model: the layout cpu is for files that are mapped"),
  ):
    with pytest.raises(errors.InputError, match=re.escape(message)):
      export.export(plain, **{"out": tmp_path / "out"} | changed)
  half = shutil.copytree(plain, tmp_path / "half")
  config = folder_lib.read_config(half)
  folder_lib.write_config(half, dataclasses.replace(config, model=dataclasses.replace(UNTIED, dtype="float16")))
  checks = json.loads((half / "checksums.json").read_text())
  checks["files"]["config.json"] = export.source_lib.file_crc(half / "config.json", "config.json")
  (half / "checksums.json").write_text(json.dumps(export.seal.seal({k: checks[k] for k in ("arrays", "files")})))
  with pytest.raises(errors.InputError, match="half computes in float16, and CPUs do not: give --dtype=bfloat16"):
    export.export(half, tmp_path / "out", layout="cpu")
  assert not (tmp_path / "out").exists()


def flip(path: pathlib.Path, place: int) -> None:
  data = bytearray(path.read_bytes())
  data[place] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize("place", [8, 5000, 20_000, -1])
def test_a_flipped_bit_is_told(model, place, tmp_path):
  """In the header, in arrays, in padding: by who maps the file, who reads its parts, and by inspect."""
  flip(weights_file(model), place)
  told = "is damaged: .*checksum.*; export it again"
  with pytest.raises(errors.InputError, match=told):
    runner.read(model, placement.one_device())
  inspected = inspection.inspect(model, hashes=True)
  assert "checksum" in (inspected["problem"] or "") and "\n" not in inspected["problem"]
  if place != -1:  # which is padding
    with pytest.raises(errors.InputError, match=told):
      load.load(model)
    with pytest.raises(errors.InputError, match=told):
      export.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_is_told(model):
  whole = weights_file(model).read_bytes()
  config = folder_lib.read_config(model)

  def told(message: str) -> None:
    for read in (load.load, lambda folder: runner.read(folder, placement.one_device())):
      with pytest.raises(errors.InputError, match=message) as found:
        read(model)
      assert "\n" not in str(found.value)

  weights_file(model).write_bytes(whole[:-100])
  told(rf"params/weights.safetensors has {len(whole) - 100} bytes instead of {len(whole)}; export it again")
  weights_file(model).unlink()
  told("params/weights.safetensors is missing; export it again")
  weights_file(model).mkdir()
  told("params/weights.safetensors is a folder; export it again")
  weights_file(model).rmdir()
  weights_file(model).write_bytes(whole)
  folder_lib.write_config(model, dataclasses.replace(config, model=dataclasses.replace(config.model, mlp_dim=40)))
  told("config.json .checksum differs")


def test_scales_of_several_ranks(tmp_path):
  """As GLM-130B's files have them: parts of the inputs with scales of their own."""
  weight = stored_weights.StoredWeight("layers/attention/out/kernel", (3, 4, 6, 10), "float16", 4, groups=2)
  r = np.random.default_rng(0)
  whole = {
    name: r.integers(-99, 99, shape).astype(dtype) for name, (shape, dtype) in weight.stored(weight.shape).items()
  }

  def part(weight: stored_weights.StoredWeight, region: stored_weights.Region) -> dict[str, np.ndarray]:
    return {name: x[weight.stored_region(name, region)] for name, x in whole.items()}

  written = mapped_write.write(tmp_path, [weight], part, 50)
  reader = blocks.Reader(tmp_path, written["arrays"])
  for region in weight.regions(100):
    for name, x in part(weight, region).items():
      np.testing.assert_array_equal(reader.read(name, weight.stored_region(name, region)), x)
  reader.verify()
  found = tensors.open_safetensors(tmp_path / mapped.FILE)
  np.testing.assert_array_equal(
    found["layers_2/attention/out/kernel/scale_GO"].whole(), whole["layers/attention/out/kernel/scale"][2, :, 0]
  )
  assert found["layers_2/attention/out/kernel/values"].shape == (10, 12)


def test_inspect_tells_the_layout(folders, capsys):
  report = inspection.inspect(folders["untied", 4][1], hashes=True)
  assert (report["problem"], report["verified"], report["layout"], report["bits"]) == (None, True, "cpu", 4)
  inspection.show(report)
  assert "export, layout cpu, INT4 kernels" in capsys.readouterr().out
  assert inspection.inspect(folders["untied", 4][0])["layout"] is None


def test_a_killed_export_leaves_nothing(folders, tmp_path):
  plain, cpu = folders["untied", None]
  code = (
    "import os, sys; from glmjax.checkpoint import export, mapped_write; put, count = mapped_write._put, [0]\n"
    "def dying(*arguments):\n"
    "  count[0] += 1\n"
    "  put(*arguments) if count[0] < 5 else os._exit(9)\n"
    "mapped_write._put = dying; export.export(sys.argv[1], sys.argv[2], layout='cpu')"
  )
  killed = subprocess.run([sys.executable, "-c", code, plain, tmp_path / "out"], capture_output=True, text=True)
  assert killed.returncode == 9, killed.stderr
  assert not (tmp_path / "out").exists()
  export.export(plain, tmp_path / "out", layout="cpu")
  assert weights_file(tmp_path / "out").read_bytes() == weights_file(cpu).read_bytes()
  assert [path.name for path in tmp_path.iterdir() if path.name != ".out.lock"] == ["out"]


def test_overwriting(folders, tmp_path):
  plain, cpu = folders["untied", 4]
  export.export(cpu, tmp_path / "out")
  export.export(plain, tmp_path / "out", layout="cpu", overwrite=True)
  export.export(cpu, tmp_path / "out", overwrite=True)
  assert not weights_file(tmp_path / "out").exists() and load.load(tmp_path / "out").bits == 4
