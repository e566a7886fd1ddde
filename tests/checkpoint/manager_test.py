"""Saving, restoring, retention, damage, kills and full disks."""

import contextlib
import gc
import json
import logging
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from typing import Any
import warnings

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import manager
from glmjax.cli import process

pytestmark = pytest.mark.filterwarnings("error")


def _mesh(*shape: int) -> jax.sharding.Mesh:
  return jax.make_mesh(
    shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: int(np.prod(shape))]
  )


def _state(seed: int = 0) -> dict[str, Any]:
  """A state with every kind of leaf."""
  w = jax.random.normal(jax.random.key(seed), (2, 16, 8))
  return {
    "step": jnp.int32(seed),
    "samples_seen": np.int64(2**40 + seed),
    "count": seed,
    "params": {"kernel": w, "bias": w[0, 0].astype(jnp.bfloat16), "half": w[1].astype(jnp.float16)},
    "opt_state": ({"mu": jnp.zeros_like(w), "nu": w * w}, None, (), [jnp.int8(3), w > 0]),
    "rng": jax.random.key(seed + 1),
    "old_rng": jax.random.PRNGKey(seed),
    "loss_scale": None,
  }


def _abstract(state: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, state)


def _assert_equal(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for name, x in arrays.named_leaves(a).items():
    y = arrays.named_leaves(b)[name]
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).dtype == np.asarray(y).dtype, name
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


@pytest.fixture(name="saved")
def _saved(tmp_path: pathlib.Path) -> pathlib.Path:
  """A folder with steps 10, 20 and 30."""
  saver = manager.Manager(tmp_path / "checkpoints")
  for step in (10, 20, 30):
    assert saver.save(step, _state(step), {"position": step})
  saver.close()
  return tmp_path / "checkpoints"


def test_restores_every_kind_of_leaf(saved: pathlib.Path):
  saver = manager.Manager(saved)
  assert saver.latest_step() == 30
  state, metadata = saver.restore(_abstract(_state()))
  _assert_equal(state, _state(30))
  assert metadata == {"position": 30}
  assert jax.random.key_impl(state["rng"]) == jax.random.key_impl(jax.random.key(0))
  state, metadata = saver.restore(_state(), step=10)
  _assert_equal(state, _state(10))
  assert metadata == {"position": 10}
  with pytest.raises(errors.InputError, match="no step 15: it has 10, 20, 30"):
    saver.restore(_abstract(_state()), step=15)
  saver.close()


def test_nothing_there_is_none(tmp_path: pathlib.Path):
  saver = manager.Manager(tmp_path / "none")
  assert saver.restore(_state()) is None and saver.latest_step() is None
  saver.close()
  assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("to", [(1, 1), (8, 1), (2, 2), (4, 2)])
def test_restores_onto_another_mesh(tmp_path: pathlib.Path, to: tuple[int, int]):
  def place(mesh: jax.sharding.Mesh) -> tuple[dict, dict]:
    shardings = {
      "w": NamedSharding(mesh, P("fsdp", "tensor")),
      "b": NamedSharding(mesh, P()),
      "rng": NamedSharding(mesh, P()),
    }
    values = {"w": jnp.arange(64.0).reshape(8, 8), "b": jnp.arange(3), "rng": jax.random.key(5)}
    return jax.tree.map(jax.device_put, values, shardings), shardings

  state, _ = place(_mesh(2, 4))
  saver = manager.Manager(tmp_path)
  saver.save(1, state, {})
  expected, shardings = place(_mesh(*to))
  target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), expected, shardings)
  restored, _ = saver.restore(target)
  saver.close()
  _assert_equal(restored, expected)
  assert jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, shardings) == {
    "w": True,
    "b": True,
    "rng": True,
  }


def test_keeps_newest_and_best(tmp_path: pathlib.Path):
  saver = manager.Manager(tmp_path, keep=2, keep_best="loss")
  losses = [3.0, 1.0, float("nan"), 2.0, 1.5, 1.6]
  for step, loss in enumerate(losses):
    saver.save(step, {"w": jnp.ones(3)}, {"metrics": {"loss": loss}} if step != 4 else {})
  saver.wait()
  assert manager.steps(tmp_path) == [1, 4, 5]
  assert {child.name for child in tmp_path.iterdir()} == {"1", "4", "5"}
  saver.close()


def test_what_cannot_be_deleted_ends_no_training(tmp_path: pathlib.Path, monkeypatch, caplog):
  """The steps are saved all the same; what was to be deleted is at the next save."""

  def refuse(*_):
    raise PermissionError(13, "Permission denied")

  with contextlib.closing(manager.Manager(tmp_path, keep=1)) as saver:
    saver.save(0, {"w": jnp.ones(3)}, {})
    saver.wait()
    (tmp_path / "1").mkdir()
    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path, "rename", refuse)
      saver._prune()
    assert "0 stays for now: permission denied" in caplog.text
    saver._prune()
    assert manager.steps(tmp_path) == [1]


def test_same_step_is_not_written_twice(tmp_path: pathlib.Path):
  saver = manager.Manager(tmp_path)
  assert saver.save(1, {"w": jnp.ones(3)}, {"n": 1})
  assert not saver.save(1, {"w": jnp.ones(3)}, {"n": 2})
  assert saver.restore({"w": jnp.ones(3)})[1] == {"n": 1}
  assert saver.save(1, {"w": jnp.ones(3)}, {"n": 3}, force=True)
  assert saver.restore({"w": jnp.ones(3)})[1] == {"n": 3}
  saver.close()


def test_going_back_sets_the_later_steps_aside(saved: pathlib.Path, caplog: pytest.LogCaptureFixture):
  saver = manager.Manager(saved, keep=2)
  saver.restore(_state(), step=10)
  saver.save(15, _state(15), {})
  saver.close()
  assert {child.name for child in saved.iterdir()} == {"10", "15", "20.aside", "30.aside"}
  assert caplog.text.count("is set aside as") == 2


def test_donating_right_after_save_does_not_reach_the_disk(tmp_path: pathlib.Path):
  advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  saver = manager.Manager(tmp_path, keep=10)
  on_host = np.zeros(100_000)
  state = {"a": jnp.zeros((512, 512)), "b": [jnp.zeros(100_000) for _ in range(8)]}
  for step in range(6):
    saver.save(step, state | {"on_host": on_host}, {})
    for _ in range(3):  # writes into the very buffers that are being saved, if nothing holds them
      state = advance(state)
    on_host += 3
  for step in range(6):
    restored, _ = saver.restore(state | {"on_host": on_host}, step)
    for name, x in arrays.named_leaves(restored).items():
      assert np.all(np.asarray(x) == 3 * step), (step, name)
  saver.close()


def test_quiet(saved: pathlib.Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture):
  process.begin()  # as a command: Orbax alone is not
  process.quieten()
  saver = manager.Manager(saved)
  saver.restore(_state())
  saver.save(40, _state(), {})
  saver.close()
  captured = capfd.readouterr()
  assert captured.out == "" and captured.err == ""
  assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def _largest_file(folder: pathlib.Path) -> pathlib.Path:
  return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def _flip(file: pathlib.Path, count: int = 64) -> None:
  data = bytearray(file.read_bytes())
  for i in range(min(count, len(data))):
    data[-1 - i] ^= 0x40
  file.write_bytes(data)


def _truncate(file: pathlib.Path) -> None:
  file.write_bytes(file.read_bytes()[:-1])


_DAMAGES = pytest.mark.parametrize(
  "damage", [_flip, _truncate, pathlib.Path.unlink], ids=["flip", "truncate", "missing"]
)


@pytest.mark.parametrize("array", ["params.kernel", "opt_state.0.nu", "rng", "samples_seen", "step"])
@_DAMAGES
def test_damaged_array_is_named_and_an_older_step_used(
  saved: pathlib.Path, caplog: pytest.LogCaptureFixture, array: str, damage: Any
):
  damage(next(file for file in (saved / "30" / "state" / array).iterdir() if file.name != ".zarray"))
  saver = manager.Manager(saved)
  state, metadata = saver.restore(_abstract(_state()))
  _assert_equal(state, _state(20))
  assert metadata == {"position": 20}
  [said] = caplog.messages
  assert "step 20 is used instead" in said
  assert array.replace(".", "/") in said and f"state/{array}" in said
  saver.save(30, _state(30), {"position": 31})  # written anew in its place
  state, metadata = saver.restore(_abstract(_state()))
  assert metadata == {"position": 31}
  saver.close()


@pytest.mark.parametrize("file", ["metadata/checksums.json", "state/_METADATA", "state/params.kernel/.zarray"])
@_DAMAGES
def test_damaged_bookkeeping_is_passed_over(
  saved: pathlib.Path, caplog: pytest.LogCaptureFixture, file: str, damage: Any
):
  damage(saved / "30" / file)
  saver = manager.Manager(saved)
  _, metadata = saver.restore(_abstract(_state()))
  saver.close()
  assert metadata == {"position": 20}
  assert len(caplog.messages) == 1


def test_all_damaged_is_an_error_naming_them(saved: pathlib.Path):
  for step, array in (("10", "params.half"), ("20", "opt_state.0.nu"), ("30", "params.kernel")):
    _flip(_largest_file(saved / step / "state" / array))
  saver = manager.Manager(saved)
  with pytest.raises(errors.InputError) as caught:
    saver.restore(_abstract(_state()))
  for text in ("step 10: params/half", "step 20: opt_state/0/nu", "step 30: params/kernel"):
    assert text in str(caught.value)
  with pytest.raises(errors.InputError, match="step 30: params/kernel"):
    saver.restore(_abstract(_state()), step=30)
  saver.close()


def test_damaged_steps_do_not_push_out_good_ones(saved: pathlib.Path):
  _flip(_largest_file(saved / "30" / "state" / "params.kernel"))
  saver = manager.Manager(saved, keep=1)
  saver.restore(_abstract(_state()))
  saver.save(25, _state(25), {})
  saver.close()
  assert manager.steps(saved) == [25] and (saved / "30.aside").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda s: s["params"].update(kernel=jnp.zeros((2, 16, 9))),
      r"params/kernel has \[2, 16, 8\] there and \[2, 16, 9\] here",
    ),
    (lambda s: s["params"].update(extra=jnp.zeros(3)), r"params/extra has no such array there and \[3\] here"),
    (lambda s: s["params"].pop("half"), r"params/half has \[16, 8\] there and no such array here"),
  ],
)
def test_another_model_is_an_error(saved: pathlib.Path, change: Any, message: str):
  state = _state()
  change(state)
  saver = manager.Manager(saved)
  with pytest.raises(errors.InputError, match=message):
    saver.restore(state)
  saver.close()


@pytest.fixture(name="forgives_orbax")
def _forgives_orbax():
  """After a failed write Orbax drops coroutines that it never awaited; the rest is as in a command."""
  process.begin()
  process.quieten()
  sys.unraisablehook = process._report_unraisable  # not pytest's
  yield
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gc.collect()


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.usefixtures("forgives_orbax")
def test_failed_save_is_one_error_and_the_last_step_stays(saved: pathlib.Path, capfd: pytest.CaptureFixture):
  saver = manager.Manager(saved)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))  # params/kernel has 1024 bytes
  try:
    expected = "40 could not be written .*the file may grow no further.*step 30 is still there"
    with pytest.raises(errors.InputError, match=expected):
      saver.save(40, _state(40), {})
      saver.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert {child.name for child in saved.iterdir()} == {"10", "20", "30"}
  assert capfd.readouterr().err == ""
  assert saver.save(41, _state(41), {})  # the manager goes on once there is room
  saver.close()
  assert manager.steps(saved) == [20, 30, 41]


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.usefixtures("forgives_orbax")
def test_full_disk_is_one_error_and_the_last_step_stays(tmp_path: pathlib.Path):
  if subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False
  ).returncode:
    pytest.skip("may not mount a small disk here")
  try:
    saver = manager.Manager(tmp_path / "checkpoints", keep=5)
    state = {"w": jnp.ones(60_000)}
    with pytest.raises(errors.InputError, match="the disk is full, free some space.*step 3 is still there"):
      for step in range(1, 9):
        saver.save(step, state, {})
    saver.close()
    assert {child.name for child in (tmp_path / "checkpoints").iterdir()} == {"1", "2", "3"}
    assert saver.restore(state) is not None
  finally:
    subprocess.run(["umount", str(tmp_path)], check=True)


_SAVER = """
import sys, jax, jax.numpy as jnp
from glmjax.checkpoint import manager
from glmjax.cli import process
process.begin()
process.quieten()
saver = manager.Manager(sys.argv[1], keep=2)
state = {"w": [jnp.zeros((64, 64)) for _ in range(12)], "step": jnp.int32(0)}
found = saver.restore(state)
if found is not None:
  state, metadata = found
  assert metadata["step"] == int(state["step"]), metadata
print("first", int(state["step"]), flush=True)
advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
while True:
  state = advance(state)
  saver.save(int(state["step"]), state, {"step": int(state["step"])})
  print("saving", int(state["step"]), flush=True)
"""


def test_killed_at_any_moment_leaves_a_complete_checkpoint(tmp_path: pathlib.Path):
  env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  rng = np.random.default_rng(0)
  reached = 0
  for _ in range(4):
    process = subprocess.Popen(
      [sys.executable, "-c", _SAVER, str(tmp_path)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
      first = process.stdout.readline().split()
      assert first and int(first[1]) >= reached, process.communicate()[1]
      for _ in range(2):
        process.stdout.readline()
      time.sleep(rng.uniform(0, 0.3))
    finally:
      process.send_signal(signal.SIGKILL)
      out, err = process.communicate()
    assert err == "", err
    saving = [int(line.split()[1]) for line in out.splitlines(keepends=True) if line.endswith("\n")]
    reached = (saving[-1] if saving else int(first[1]) + 2) - 1  # the one before the one being saved
  saver = manager.Manager(tmp_path, keep=2)
  state = {"w": [jnp.zeros((64, 64)) for _ in range(12)], "step": jnp.int32(0)}
  state, metadata = saver.restore(state)
  assert metadata["step"] == int(state["step"]) >= reached >= 4
  assert all(np.all(np.asarray(w) == metadata["step"]) for w in state["w"])
  saver.close()


def test_record_is_plain_json(saved: pathlib.Path):
  record = json.loads((saved / "30" / "metadata" / "checksums.json").read_text())
  assert record["metadata"] == {"position": 30} and record["arrays"]["params/kernel"]["shape"] == [2, 16, 8]
