"""Models for inference out of buckets: runs and exports, copied there or written there, loaded, streamed, exported."""

import functools
import hashlib
import json
import operator
import pathlib
import threading

import bucket_server
import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from glmjax import errors
from glmjax.checkpoint import export
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load
from glmjax.checkpoint import manager
from glmjax.checkpoint import stored
from glmjax.infer import placement
from glmjax.infer import runner
from glmjax.io import bucket
from glmjax.io import paths
from glmjax.io import tokenizer_folder
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.thudm import inspection

SCHEMES = pytest.mark.parametrize("scheme", bucket.SCHEMES)
_CONFIG = config_lib.GLMConfig(vocab_size=96, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=88, max_length=16)


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory) -> pathlib.Path:
  """A run's folder with steps 1 and 2; the parameters of step n are n times those of step 1."""
  root = tmp_path_factory.mktemp("models")
  (source := root / "source").mkdir()
  (source / "tokenizer.model").write_bytes(b"pieces")
  layout = {"format": 1, "model_sha256": hashlib.sha256(b"pieces").hexdigest(), "vocab_size": 90}
  (source / "tokenizer.json").write_text(json.dumps(layout))
  run = root / "run"
  tokenizer = tokenizer_folder.copy(source, run / folder_lib.TOKENIZER)
  folder_lib.write_config(run, folder_lib.FolderConfig(_CONFIG, {"mixture": "m"}, tokenizer))
  saver = manager.Manager(run / "checkpoints")
  params = glm.init_params(_CONFIG, jax.random.key(0))
  for step in (1, 2):
    scaled = jax.tree.map(functools.partial(operator.mul, step), params)
    saver.save(step, {"params": scaled, "step": jnp.int32(step)}, {"n": step})
  saver.close()
  return run


def upload(server, folder: pathlib.Path, key: str) -> None:
  for path in folder.rglob("*"):
    if path.is_file():
      server.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@SCHEMES
def test_a_run_that_was_copied_there(server, run, tmp_path, scheme, caplog):
  upload(server, run, "run")
  url = f"{scheme}://bucket/run"
  there = load.load(url)
  chex.assert_trees_all_equal(there.params, load.load(run).params)
  assert there.metadata["step"] == 2 and load.fingerprint(url) == load.fingerprint(run)
  place = placement.on_mesh("tensor=4")
  streamed = [runner.read(folder, place).params for folder in (url, run)]
  chex.assert_trees_all_equal(*streamed)
  export.export(url, f"{url}-int8", 8)
  export.export(run, tmp_path / "int8", 8)
  chex.assert_trees_all_equal(load.load(f"{url}-int8").params, load.load(tmp_path / "int8").params)
  shown, wanted = inspection.inspect(url, hashes=True), inspection.inspect(run, hashes=True)
  assert shown == wanted | {"path": url} and shown["steps"] == [1, 2] and shown["verified"]
  damaged = next(key for key in server.keys(prefix="run/checkpoints/2/state/params") if not key.endswith(".zarray"))
  server.put(damaged, bytes(len(server.data(damaged))))
  assert load.load(url).metadata["step"] == 1 and "is damaged, step 1 is used instead" in caplog.text


def test_requests_of_loading(server, run, tmp_path):
  """Of a tiny model: its few files, and of each array a header, a listing, and its chunks."""
  export.export(run, tmp_path / "out")
  upload(server, tmp_path / "out", "out")
  count = len(json.loads((tmp_path / "out/checksums.json").read_text())["arrays"])
  before = sum(server.requests.values())
  load.load("gs://bucket/out")
  assert server.requests["list"] <= count + 2
  assert sum(server.requests.values()) - before <= 3 * count + 18


def test_chunks_are_fetched_at_the_same_time(server, tmp_path):
  x = {"x": jnp.arange(32, dtype=jnp.float32).reshape(16, 2)}
  folder = tmp_path / "params" / "x"
  folder.mkdir(parents=True)
  (folder / ".zarray").write_text(json.dumps(stored.header((16, 2), "float32", (2, 2))))
  for i in range(8):
    (folder / f"{i}.0").write_bytes(jax.device_get(x["x"])[2 * i : 2 * i + 2].tobytes())
  upload(server, tmp_path / "params", "params")
  record = {"shape": [16, 2], "dtype": "float32"}
  array = stored.StoredArray(paths.named("gs://bucket/params"), "x", record)
  meet = threading.Barrier(8, timeout=20)  # broken unless all eight are under way

  def waits(method, path):
    meet.wait()

  server.fault = waits
  chex.assert_trees_all_equal(array.read(), jax.device_get(x["x"]))


@pytest.mark.parametrize("fault, words", [(bucket_server.Fault(status=403, code="AccessDenied"), "permission denied")])
def test_refusals_are_no_damage(server, run, fault, words):
  upload(server, run, "run")
  server.fault = lambda method, path: fault if "checkpoints/2/state" in path else None
  with pytest.raises(errors.InputError, match=words):  # and not step 1 in its place
    load.load("gs://bucket/run")


def test_description_is_read_by_orbax_after_a_copy_to_a_disk(server, run, tmp_path):
  export.export(run, "gs://bucket/out")
  for key in server.keys(prefix="out/"):
    path = tmp_path / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(server.data(key))
  found = ocp.PyTreeCheckpointer().restore(tmp_path / "out" / "params")
  chex.assert_trees_all_equal(found, load.load("gs://bucket/out").params)


def test_what_was_exported_for_cpus(server, run, tmp_path):
  """Copied to a bucket it is read in parts, as from a mesh; written it can be to a disk alone."""
  for bits in (None, 4):
    export.export(run, folder := tmp_path / f"cpu{bits}", bits, layout="cpu")
    upload(server, folder, folder.name)
    url = f"gs://bucket/{folder.name}"
    chex.assert_trees_all_equal(load.load(url).params, load.load(folder).params)
    there, here = (
      runner.Runner(found.config, found.params).params
      for found in (runner.read(each, placement.one_device()) for each in (url, folder))
    )
    chex.assert_trees_all_equal(there, here)
    assert inspection.inspect(url, hashes=True) == inspection.inspect(folder, hashes=True) | {"path": url}
  with pytest.raises(errors.InputError, match="the layout cpu is for files that are mapped: export to a disk"):
    export.export(run, "gs://bucket/out", layout="cpu")
