"""An engine read from disk: every array goes straight to the devices that own it, verified there."""

import hashlib
import json
import pathlib

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax import tokens
from glmjax.checkpoint import export
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load
from glmjax.checkpoint import manager
from glmjax.checkpoint import stored
from glmjax.infer import ahead
from glmjax.infer import engine
from glmjax.infer import offload
from glmjax.infer import placement
from glmjax.infer import runner
from glmjax.infer import sampling
from glmjax.io import tokenizer_folder
from glmjax.models import config as config_lib
from glmjax.models import glm

CONFIG = config_lib.GLMConfig(vocab_size=96, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=64)
SPECIALS = tokens.icetk(0, 80)


class Letters:
  """Tokenizer of a model that is never asked."""

  num_image_tokens, vocab_size, specials = 0, 96, SPECIALS

  @classmethod
  def load(cls, path: pathlib.Path) -> "Letters":
    return cls()

  def check_fits(self, size: int) -> None:
    assert size == self.vocab_size


class Numbers(Letters):
  """Tokenizer whose texts are ids, one a word."""

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: list[int]) -> str:
    return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int | None, pathlib.Path]:
  """A run's folder (None) and INT8 and INT4 exports of it."""
  root = tmp_path_factory.mktemp("models")
  source, run = root / "source", root / "run"
  source.mkdir()
  (source / "tokenizer.model").write_bytes(b"pieces")
  layout = {"format": 1, "model_sha256": hashlib.sha256(b"pieces").hexdigest(), "vocab_size": 96}
  (source / "tokenizer.json").write_text(json.dumps(layout))
  tokenizer = tokenizer_folder.copy(source, run / folder_lib.TOKENIZER)
  folder_lib.write_config(run, folder_lib.FolderConfig(CONFIG, {"mixture": "m"}, tokenizer))
  saver = manager.Manager(run / "checkpoints")
  saver.save(1, {"params": glm.init_params(CONFIG, jax.random.key(1)), "step": jnp.int32(1)}, {"samples_seen": 1})
  saver.close()
  for bits in (8, 4):
    export.export(run, root / f"int{bits}", bits)
  return {None: run, 8: root / "int8", 4: root / "int4"}


@pytest.mark.parametrize(
  "bits, mesh, offload_layers",
  [
    (None, None, 0),
    (4, None, 0),
    (None, "tensor=4", 0),
    (8, "data=2,tensor=2", 0),
    (4, "tensor=2", 1),
    (None, None, 2),
  ],
)
def test_parameters_are_those_of_the_folder(folders, monkeypatch, bits, mesh, offload_layers):
  monkeypatch.setattr("glmjax.tokenizer.Tokenizer", Letters)
  whole = load.load(folders[bits])
  expected = runner.Runner(whole.config, whole.params, placement.on_mesh(mesh), offload_layers).params
  read, once = [], stored.StoredArray.read
  monkeypatch.setattr(stored.StoredArray, "read", lambda self, region: read.append(once(self, region)) or read[-1])
  found = engine.Engine.load(folders[bits], mesh=mesh, offload_layers=offload_layers).runner.params
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(ours, theirs)
    assert ours.sharding == theirs.sharding and ours.dtype == theirs.dtype
  in_host_memory = [x for x in jax.tree.leaves(found) if x.sharding.memory_kind == offload.HOST]
  assert len(in_host_memory) == offload_layers * 4 * (1 if bits is None else 2)
  parts = 1 if mesh is None else int(mesh[-1])
  assert max(x.nbytes for x in read) <= max(x.nbytes for x in jax.tree.leaves(expected)) // parts


def test_in_another_dtype(folders, monkeypatch):
  monkeypatch.setattr("glmjax.tokenizer.Tokenizer", Letters)
  found = engine.Engine.load(folders[None], placement.Precision("bfloat16")).runner
  assert found.config.dtype == "bfloat16" and found.params["layers_0"]["mlp_norm"]["scale"].dtype == jnp.float32
  assert found.params["layers_0"]["mlp"]["wi"]["kernel"].nbytes == 2 * 32 * 2 * 48


def test_damage_is_told(folders, monkeypatch, tmp_path):
  monkeypatch.setattr("glmjax.tokenizer.Tokenizer", Letters)
  out = tmp_path / "out"
  export.export(folders[None], out, 4)
  [file] = (out / "params" / "layers.mlp.wo.kernel.values").glob("[0-9]*")
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  with pytest.raises(errors.InputError, match="layers/mlp/wo/kernel/values .checksum differs"):
    engine.Engine.load(out, mesh="tensor=2")


def test_mistakes_are_told_before_anything_is_read(folders, monkeypatch):
  monkeypatch.setattr("glmjax.tokenizer.Tokenizer", Letters)
  monkeypatch.setattr(stored.StoredArray, "read", lambda *_: pytest.fail("read"))
  for options, words in (
    (dict(mesh="tensor=3"), "num_heads 4 does not divide over tensor=3"),
    (dict(offload_layers=3), "offload_layers is 3, and the model has 2"),
  ):
    with pytest.raises(errors.InputError, match=words):
      engine.Engine.load(folders[4], **options)


@pytest.mark.parametrize("bits, mesh", [(None, None), (4, None), (4, "data=2,tensor=2")])
def test_what_is_asked_first_is_compiled_while_weights_are_read(folders, monkeypatch, bits, mesh):
  """Nothing is left to be compiled when it is asked, and the answers are the same."""
  monkeypatch.setattr("glmjax.tokenizer.Tokenizer", Numbers)
  prompts, how = ["5 6 [MASK] 7", "8 9"], sampling.Sampling(1.0, top_k=5)
  late = engine.Engine.load(folders[bits], mesh=mesh).generate(prompts, 6, how)
  jax.clear_caches()
  early = engine.Engine.load(folders[bits], mesh=mesh, first=ahead.First(prompts, 6, how))
  with compilations.noted() as compiled:
    assert early.generate(prompts, 6, how) == late
  assert not compiled


def test_what_cannot_be_asked_first_is_told_when_it_is_asked(folders, monkeypatch):
  monkeypatch.setattr("glmjax.tokenizer.Tokenizer", Numbers)
  model = engine.Engine.load(folders[4], first=ahead.First(["5 " * 70], 6))
  with pytest.raises(errors.InputError, match="shorten the prompt"):
    model.generate(["5 " * 70], 6)
