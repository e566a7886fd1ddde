"""Every file of a checkpoint and of an export, damaged in every way: an older step, or one line, and never more."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.checkpoint import export
from glmjax.checkpoint import files
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load
from glmjax.checkpoint import manager
from glmjax.checkpoint import recorded
from glmjax.io import seal
from glmjax.models import config as config_lib
from glmjax.models import glm

CONFIG = config_lib.GLMConfig(vocab_size=32, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=8, max_length=8)


def state(step: int) -> dict[str, Any]:
  kernel = jax.random.normal(jax.random.key(step), (2, 6, 4))
  return {
    "params": {"kernel": kernel, "half": jnp.full(7, step, "bfloat16")},
    "rng": jax.random.key(step),
    "seen": np.int64(step),
  }


def plain(tree: Any) -> dict[str, bytes]:
  data = jax.tree.map(lambda x: jax.random.key_data(x) if x.dtype == jax.random.key(0).dtype else x, tree)
  return {str(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_leaves_with_path(data)}


@pytest.fixture(scope="module", name="good")
def _good(tmp_path_factory) -> pathlib.Path:
  """A checkpoints folder with steps 10 and 20."""
  folder = tmp_path_factory.mktemp("good") / "checkpoints"
  saver = manager.Manager(folder)
  for step in (10, 20):
    saver.save(step, state(step), {"position": step})
  saver.close()
  return folder


@pytest.fixture(name="saved")
def _saved(good: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return shutil.copytree(good, tmp_path / "checkpoints")


@pytest.fixture(scope="module", name="exported")
def _exported(tmp_path_factory) -> pathlib.Path:
  root = tmp_path_factory.mktemp("exported")
  folder_lib.write_config(_made(root / "run"), folder_lib.FolderConfig(CONFIG))
  saver = manager.Manager(root / "run" / "checkpoints")
  saver.save(1, {"params": glm.init_params(CONFIG, jax.random.key(0))}, recorded.of(CONFIG))
  saver.close()
  export.export(root / "run", root / "out", 8)
  return root


def _made(folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir()
  return folder


def flip(place: float) -> Callable[[pathlib.Path], None]:
  def damage(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << 6
    path.write_bytes(data)

  return damage


def written(text: bytes) -> Callable[[pathlib.Path], None]:
  return lambda path: path.write_bytes(text)


def instead(make: Callable[[pathlib.Path], Any]) -> Callable[[pathlib.Path], None]:
  def damage(path: pathlib.Path) -> None:
    path.unlink()
    make(path)

  return damage


DAMAGES = {
  "first byte": flip(0),
  "middle byte": flip(0.5),
  "last byte": flip(1),
  "empty": written(b""),
  "short": lambda path: os.truncate(path, path.stat().st_size // 2),
  "long": lambda path: os.truncate(path, path.stat().st_size + 1),
  "huge": lambda path: os.truncate(path, 1 << 40),
  "nested": written(b"[" * 100_000),
  "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
  "gone": pathlib.Path.unlink,
  "folder": instead(pathlib.Path.mkdir),
  "pipe": instead(os.mkfifo),
  "loop": instead(lambda path: path.symlink_to(path)),
  "dangling": instead(lambda path: path.symlink_to("nowhere")),
}
OF_ORBAX = ("_CHECKPOINT_METADATA", "_sharding", "commit_success.txt", "process_0")  # which glmjax does not read


@contextlib.contextmanager
def damaged(path: pathlib.Path, damage: Callable[[pathlib.Path], None]) -> Iterator[None]:
  """Within it the file is damaged."""
  data = path.read_bytes()
  damage(path)
  yield
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
  path.write_bytes(data)


def said(caplog: pytest.LogCaptureFixture) -> str:
  """The lines that glmjax has logged since this was last asked."""
  messages = [record.getMessage() for record in caplog.records if record.name == "glmjax"]
  caplog.clear()
  return "".join(f"{message}\n" for message in messages)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in folder.rglob("*") if path.is_file())


def restored(saver: manager.Manager) -> tuple[int, dict[str, bytes]]:
  found, metadata = saver.restore(state(0))
  return metadata["position"], plain(found)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_of_a_step(saved, name, caplog):
  saver = manager.Manager(saved)
  for path in files_of(saved / "20"):
    if path.read_bytes() == bytes(path.stat().st_size) and name == "zeros":
      continue
    with damaged(path, DAMAGES[name]):
      step, found = restored(saver)
    assert found == plain(state(step)), path
    line = said(caplog)
    if step == 20:  # bit for bit, for what does not matter to us
      assert not line and (path.name in OF_ORBAX or path.name == "_METADATA" and "byte" in name), path
      continue
    assert line.count("\n") == 1 and "20 is damaged, step 10 is used instead" in line
    assert path.name in line or str(path.parent.relative_to(saved / "20")) in line, line
  assert restored(saver)[0] == 20
  saver.close()


def test_two_files_that_changed_places(saved, caplog):
  saver = manager.Manager(saved)
  there = [path for path in files_of(saved / "20") if path.name not in OF_ORBAX]
  for one, other in [(a, b) for i, a in enumerate(there) for b in there[i + 1 :]]:
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    step, found = restored(saver)
    assert step == (20 if contents[0] == contents[1] else 10) and found == plain(state(step)), (one, other)
    one.write_bytes(contents[0])
    other.write_bytes(contents[1])
  for path in there:  # those of another step are as good as wrong
    other = saved / "10" / path.relative_to(saved / "20")
    with damaged(path, lambda path, other=other: shutil.copyfile(other, path)):
      step, found = restored(saver)
    assert found == plain(state(step))
  caplog.clear()
  saver.close()


@pytest.mark.parametrize("what", ["20", "20/state", "20/metadata", "20/state/params.kernel", "20/state/seen"])
@pytest.mark.parametrize(
  "make",
  [
    lambda path: None,
    lambda path: path.write_bytes(b"x"),
    os.mkfifo,
    pathlib.Path.mkdir,
    lambda path: path.symlink_to(path),
    lambda path: path.symlink_to("nowhere"),
  ],
  ids=["gone", "file", "pipe", "empty", "loop", "dangling"],
)
def test_a_damaged_folder_of_a_step(saved, what, make, caplog):
  shutil.rmtree(saved / what)
  make(saved / what)
  saver = manager.Manager(saved)
  assert restored(saver) == (10, plain(state(10)))
  gone = what == "20" and not os.path.lexists(saved / what)
  assert said(caplog).count("\n") == (not gone)
  saver.save(20, state(21), {"position": 21})
  assert restored(saver) == (21, plain(state(21)))
  saver.close()


HEADERS = {
  "shape": [[2, 6, 5], [2, 6], [], None, "x", [10**12, 6, 4], [-2, 6, 4], [2.0, 6, 4], {}],
  "chunks": [[0, 6, 4], [2, 6, 8], [2, 6], None, "x", [10**12] * 3, [-2, -6, 4], [True, 6, 4], [[], 6, 4]],
  "dtype": ["<i4", "<f8", ">f4", "|O", "x", None, 3, [], [["a", "<f4"]], "bfloat16", "<U1000000000"],
  "order": ["F", None, "x", 1],
  "compressor": [{"id": "zlib", "level": 1}, {"id": "x"}, "x", 1],
  "fill_value": [0, 1.5, "NaN", [], {}],
  "filters": [[{"id": "delta"}], "x", 1, []],
  "dimension_separator": ["/", "", None, 1],
  "zarr_format": [1, 3, None, "2"],
  "unknown": [1],
}


def test_every_field_of_a_header(saved, caplog):
  path, saver = saved / "20/state/params.kernel/.zarray", manager.Manager(saved)
  header = json.loads(path.read_text())
  for field, values in HEADERS.items():
    for value in values:
      with damaged(path, written(json.dumps(header | {field: value}).encode())):
        assert restored(saver) == (10, plain(state(10))), (field, value)
      err = said(caplog)
      assert err.count("\n") == 1 and field in err and "params/kernel (state/params.kernel/.zarray" in err, err
  with damaged(path, written(json.dumps(header | {"chunks": [1, 6, 4]}).encode())):  # which are possible
    assert restored(saver)[0] == 10 and "params.kernel/1.0.0 is missing" in said(caplog)
  for text in (b"null", b"3", b'"x"', b"{}", b"[]", b"\xff\xfe", b"1" * 10_000):
    with damaged(path, written(text)):
      assert restored(saver)[0] == 10, text
  saver.close()


def test_extra_files_do_not_matter(saved, caplog):
  for where in ("20", "20/state", "20/state/params.kernel", "20/metadata", "."):
    (saved / where / "extra").mkdir()
    (saved / where / ".nfs0001").write_bytes(b"x")
    os.mkfifo(saved / where / "pipe")
    (saved / where / "loop").symlink_to("loop")
  for name in ("30.aside", "٣", "007", "-1", "40.orbax-checkpoint-tmp-1", "9" * 200):
    (saved / name).mkdir()
  saver = manager.Manager(saved)
  assert restored(saver) == (20, plain(state(20)))
  saver.save(21, state(21), {"position": 21})
  assert restored(saver) == (21, plain(state(21))) and not said(caplog)
  saver.close()


@pytest.mark.parametrize(
  "make",
  [
    lambda path: path.write_bytes(b"x"),
    os.mkfifo,
    lambda path: path.symlink_to(path),
    lambda path: path.symlink_to("nowhere"),
  ],
  ids=["file", "pipe", "loop", "dangling"],
)
def test_no_folder_of_checkpoints(tmp_path, make):
  """As when a disk is not mounted: nothing begins anew."""
  make(tmp_path / "checkpoints")
  saver = manager.Manager(tmp_path / "checkpoints")
  for call in (lambda: saver.restore(state(0)), saver.latest_step):
    with pytest.raises((errors.InputError, files.DamagedError), match="checkpoints is"):
      call()
  saver.close()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_of_an_export(exported, tmp_path, name, caplog):
  out = shutil.copytree(exported / "out", tmp_path / "out")
  whole = plain(load.load(out).params)
  for path in files_of(out):
    if name == "zeros" and not any(path.read_bytes()):
      continue
    with damaged(path, DAMAGES[name]):
      try:
        assert plain(load.load(out).params) == whole
        assert path.name in OF_ORBAX or path.name == "_METADATA" and "byte" in name, path
      except errors.InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        assert path.name in str(error) or path.parent.name in str(error), error
  assert not said(caplog)


@pytest.mark.parametrize("what", ["params", "params/final_norm.bias", "checksums.json", "config.json"])
def test_a_folder_of_an_export_that_is_gone(exported, tmp_path, what):
  out = shutil.copytree(exported / "out", tmp_path / "out")
  shutil.rmtree(out / what) if (out / what).is_dir() else (out / what).unlink()
  with pytest.raises(errors.InputError, match=rf"{what.rsplit('/')[-1]}.*export|no model's folder|no config.json"):
    load.load(out)


# What the system refuses says nothing about the files.


@pytest.mark.parametrize(
  "number, raised",
  [
    (errno.EMFILE, errors.InputError),
    (errno.ENFILE, errors.InputError),
    (errno.EACCES, errors.InputError),
    (errno.ENOMEM, errors.InputError),
    (errno.EIO, OSError),
    (errno.ESTALE, OSError),
    (errno.ETIMEDOUT, OSError),
  ],
)
def test_a_refusal_is_no_damage(saved, monkeypatch, caplog, number, raised):
  saver, true_open = manager.Manager(saved), os.open
  for victim in ("checksums.json", ".zarray", "0.0.0", "_METADATA"):

    def refuse(path: Any, *arguments: Any, victim: str = victim, **others: Any) -> int:
      if str(path).endswith(victim) and "/20/" in str(path):
        raise OSError(number, os.strerror(number), str(path))
      return true_open(path, *arguments, **others)

    with monkeypatch.context() as patch, pytest.raises(raised) as caught:
      patch.setattr(os, "open", refuse)
      saver.restore(state(0))
    assert errors.reason(OSError(number, os.strerror(number))) in str(caught.value) and victim in str(caught.value)
    assert "\n" not in str(caught.value)
  assert restored(saver)[0] == 20
  saver.save(21, state(21), {})
  saver.close()
  assert manager.steps(saved) == [10, 20, 21] and not said(caplog)


def test_too_little_memory_is_no_damage(saved, exported, monkeypatch):
  def refuse(*_: Any) -> np.ndarray:
    raise MemoryError

  saver = manager.Manager(saved)
  monkeypatch.setattr(np, "empty", refuse)
  with pytest.raises(errors.InputError, match="not enough memory to read .*20/state"):
    saver.restore(state(0))
  with pytest.raises(errors.InputError, match="not enough memory to read .*out/params") as caught:
    load.load(exported / "out")
  assert "damaged" not in str(caught.value)
  monkeypatch.undo()
  assert restored(saver)[0] == 20
  saver.close()


# config.json of a run says the same as its steps.


@pytest.mark.parametrize(
  "change",
  [
    {"layer_norm_epsilon": 0.1},
    {"rotary_base": 500.0},
    {"residual_alpha": 2.0},
    {"norm": "pre"},
    {"mlp": "gelu"},
    {"causal": True},
    {"rotary_rounding": "half_table"},
    {"num_heads": 4},
    {"embedding_norm": True},
  ],
)
def test_a_changed_config(exported, tmp_path, change):
  run = shutil.copytree(exported / "run", tmp_path / "run")
  config = folder_lib.read_config(run)
  try:
    folder_lib.write_config(run, dataclasses.replace(config, model=dataclasses.replace(CONFIG, **change)))
  except errors.InputError:
    return
  (name,) = change
  message = rf"config.json is not the one of this run: {name} is {change[name]!r} there and .* in the checkpoints"
  for read in (load.load, load.fingerprint, lambda folder: export.export(folder, tmp_path / "out")):
    with pytest.raises(errors.InputError, match=message):
      read(run)
  assert not (tmp_path / "out").exists()


def test_what_may_change(exported, tmp_path):
  run = shutil.copytree(exported / "run", tmp_path / "run")
  config = folder_lib.read_config(run)
  free = {"dtype": "bfloat16", "scan_layers": False, "remat": "full", "hidden_dropout": 0.1, "attention_dropout": 0.2}
  free |= {
    "softmax_dtype": "compute",
    "kv_cache_dtype": "int8",
    "activation_bits": 8,
    "head_bits": 4,
    "prefix_dropout": 0.1,
    "lora_dropout": 0.1,
  }
  assert set(free) == set(recorded.FREE)
  folder_lib.write_config(run, dataclasses.replace(config, model=dataclasses.replace(CONFIG, **free)))
  assert load.load(run).config == dataclasses.replace(CONFIG, **free)


def test_what_an_earlier_version_did_not_know_is_as_it_was_then(exported, tmp_path):
  run = shutil.copytree(exported / "run", tmp_path / "run")
  content = json.loads((run / "config.json").read_text())
  assert content["model"].pop("softmax_dtype") == "float32"
  (run / "config.json").write_text(json.dumps(content))
  assert load.load(run).config == CONFIG


LIMITED = """
import resource, sys
import jax
import numpy as np
from glmjax.checkpoint import manager
saver = manager.Manager(sys.argv[1])
state = {"w": np.zeros((1 << 24), np.float32), "b": np.zeros(3, np.float32)}
for step in (1, 2):
  saver.save(step, state, {})
saver.wait()
target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
jax.block_until_ready(saver.restore(target))

def limited(which, limit, action):
  before = resource.getrlimit(which)
  resource.setrlimit(which, (limit, before[1]))
  try:
    action()
    message = "> done"
  except Exception as error:
    message = f"> {type(error).__name__} {error}"
  finally:
    resource.setrlimit(which, before)
  print(message)

with open("/proc/self/statm") as file:
  used = int(file.read().split()[0]) * resource.getpagesize()
limited(resource.RLIMIT_NOFILE, 3, lambda: saver.restore(target))
limited(resource.RLIMIT_NOFILE, 3, lambda: saver.save(3, state, {}))
limited(resource.RLIMIT_AS, used + (40 << 20), lambda: saver.restore(target))
print(">", saver.restore(target) is not None, manager.steps(saver._directory))
saver.close()
"""


def test_limits_of_the_process(tmp_path):
  """Few open files, little memory: said as what they are, by whoever meets them, and no step is passed over."""
  environment = os.environ | {"XLA_FLAGS": ""}
  command = [sys.executable, "-c", LIMITED, str(tmp_path / "c")]
  done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  handles, saving, memory, after = [line for line in done.stdout.splitlines() if line.startswith(">")]
  assert handles.startswith("> InputError cannot read ") and "this process may open no more files" in handles
  assert re.search(
    r"3 could not be written \(.*this process may open no more files.*raise the limit with ulimit -n\)", saving
  )
  assert memory.startswith("> InputError not enough memory to read "), memory
  assert after == "> True [1, 2]" and "damaged" not in done.stdout + done.stderr
  assert {path.name for path in (tmp_path / "c").iterdir()} == {"1", "2"}


def test_a_folder_that_may_not_be_read(saved, monkeypatch):
  """Root may read everything: the refusal is made up."""
  true_listdir = os.listdir

  def refuse(path: Any) -> list[str]:
    if str(path) == str(saved):
      raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return true_listdir(path)

  saver = manager.Manager(saved)
  with monkeypatch.context() as patch:
    patch.setattr(os, "listdir", refuse)
    for call in (lambda: saver.restore(state(0)), lambda: saver.save(30, state(30), {})):
      with pytest.raises(errors.InputError, match="checkpoints: permission denied"):
        call()
  assert restored(saver)[0] == 20 and manager.steps(saved) == [10, 20]
  saver.close()


def test_steps_of_before(saved):
  """Records without versions of sums and without the model's settings are read as they always were."""
  path = saved / "20" / "metadata" / "checksums.json"
  record = json.loads(path.read_text())
  assert record.pop("crc32") and all(entry.pop("version") == 2 for entry in record["arrays"].values())
  path.write_text(json.dumps(seal.seal(record)))
  saver = manager.Manager(saved)
  assert restored(saver) == (20, plain(state(20)))
  assert recorded.difference(CONFIG, record["metadata"]) is None
  saver.close()
