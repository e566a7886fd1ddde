"""Checkpoints in a bucket: what a disk promises."""

import json
import pathlib
import re
import subprocess
import sys

import bucket_server
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import manager
from glmjax.checkpoint import objects
from glmjax.io import bucket
from glmjax.io import lease
from glmjax.io import lock
from glmjax.io import paths

SCHEMES = pytest.mark.parametrize("scheme", bucket.SCHEMES)
P = jax.sharding.PartitionSpec


def over(count: int, *axes: str | None):
  mesh = jax.make_mesh((count,), ("x",), devices=jax.devices()[:count], axis_types=(jax.sharding.AxisType.Auto,))
  return jax.sharding.NamedSharding(mesh, P(*axes))


def state(count: int = 4, add: float = 0.0):
  w = np.arange(32 * 16, dtype=np.float32).reshape(32, 16) + add
  return {
    "params": {
      "w": jax.device_put(w, over(count, "x")),
      "narrow": jax.device_put(w.astype(jnp.bfloat16), over(count, None, "x")),
      "whole": jax.device_put(np.ones(3, np.float32), over(count)),
      "none": jax.device_put(np.ones((0, 3), np.float32), over(count)),
      "one": jnp.arange(5),
    },
    "key": jax.random.key(7),
    "step": np.int64(3),
    "flag": True,
    "host": np.arange(3.0),
  }


def same(a, b) -> bool:
  plain = [
    jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if arrays._is_key(x) else x).tobytes(), t) for t in (a, b)
  ]
  return plain[0] == plain[1]


def download(server, key: str, to: pathlib.Path) -> pathlib.Path:
  for each in server.keys(prefix=f"{key}/"):
    (to / each).parent.mkdir(parents=True, exist_ok=True)
    (to / each).write_bytes(server.data(each))
  return to / key


def refuse(server, pattern: str, method: str = "PUT", **fault) -> None:
  server.fault = lambda m, path: bucket_server.Fault(**fault) if m == method and re.search(pattern, path) else None


@SCHEMES
def test_a_step_is_restored_on_other_devices(server, scheme):
  """Saved by 4 devices, read on 1 and on 8, which no chunk fits."""
  where = paths.named(f"{scheme}://bucket/run/checkpoints")
  saver = manager.Manager(where)
  assert manager.steps(where) == [] and saver.restore(state()) is None
  saver.save(3, state(4), {"samples": 12})
  saver.close()
  assert manager.steps(where) == [3] and manager.newest_metadata(where) == {"samples": 12}
  for count in (1, 8):
    found, metadata = manager.Manager(where).restore(state(count, add=1))
    assert metadata == {"samples": 12} and same(found, state()) and found["params"]["w"].sharding == over(count, "x")


def test_a_bucket_has_what_a_disk_has(server, tmp_path):
  """The same files, and the same bytes of all arrays and records, of a state that each device has its part of."""
  where = paths.named("gs://bucket/b")
  some = {name: x for name, x in state()["params"].items() if name in ("w", "narrow", "one")} | {"key": state()["key"]}
  for folder in (where, tmp_path / "d"):
    saver = manager.Manager(folder)
    saver.save(3, some, {"samples": 12})
    saver.close()
  ours = download(server, "b/3", tmp_path)
  theirs = tmp_path / "d" / "3"
  names = {str(path.relative_to(root)) for root in (ours, theirs) for path in root.rglob("*") if path.is_file()}
  only_theirs = {"state/_sharding", "state/array_metadatas/process_0"}
  named = {"commit_success.txt", "_CHECKPOINT_METADATA", "_METADATA", "checksums.json"}
  for name in names - only_theirs:
    if pathlib.Path(name).name in named:
      assert (ours / name).is_file() and (theirs / name).is_file(), name
    else:
      assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
  record = "metadata/checksums.json"
  assert json.loads((ours / record).read_bytes()) == json.loads((theirs / record).read_bytes())


def test_orbax_reads_a_downloaded_step(server, tmp_path):
  saver = manager.Manager(paths.named("s3://bucket/run/checkpoints"))
  saver.save(3, state(), {"samples": 12})
  saver.close()
  step = download(server, "run/checkpoints/3", tmp_path)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    found = checkpointer.restore(step / "state")
  assert np.array_equal(found["params"]["w"], state()["params"]["w"])
  assert np.array_equal(found["params"]["narrow"], state()["params"]["narrow"])
  items = ocp.CompositeCheckpointHandler(
    state=ocp.PyTreeCheckpointHandler(), metadata=ocp.JsonCheckpointHandler(filename="checksums.json")
  )
  with ocp.Checkpointer(items) as checkpointer:
    found = checkpointer.restore(
      step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(), metadata=ocp.args.JsonRestore())
    )
  assert found["metadata"]["metadata"] == {"samples": 12} and int(found["state"]["step"]) == 3
  assert manager.steps(step.parent) == [3]  # and glmjax, as a step on a disk
  assert same(manager.Manager(step.parent).restore(state())[0], state())


def test_large_shards_are_cut(server, monkeypatch):
  monkeypatch.setattr(arrays, "CHUNK_BYTES", 256)
  where = paths.named("gs://bucket/run")
  saver = manager.Manager(where)
  saver.save(1, state(4), {})
  saver.close()
  sizes = {
    key: len(server.data(key))
    for key in server.keys(prefix="run/1/state/")
    if re.fullmatch(r"[\d.]+", key.rsplit("/")[-1])
  }
  assert max(sizes.values()) == 256 and sum(size for key, size in sizes.items() if "/params.w/" in key) == 32 * 16 * 4
  assert same(manager.Manager(where).restore(state(1))[0], state())


@pytest.mark.parametrize(
  "shape, itemsize, wanted",
  [
    ((), 4, ()),
    ((0, 3), 4, (1, 3)),
    ((70, 4096, 12288), 4, (1, 2048, 12288)),
    ((24, 1024), 4, (24, 1024)),
    ((1 << 26,), 4, (1 << 25,)),
    ((150528, 12288), 4, (2688, 12288)),
    ((130529, 4096), 4, (130529, 256)),  # the first axis has two divisors alone
    ((3, 67_108_859), 4, (1, 67_108_859)),  # a prime: too large, and not in 67 million objects
  ],
)
def test_chunks_divide_a_shard(shape, itemsize, wanted):
  assert objects.chunk_shape(shape, itemsize) == wanted


@SCHEMES
def test_steps_are_kept_pruned_and_set_aside(server, scheme):
  where = paths.named(f"{scheme}://bucket/run")
  saver = manager.Manager(where, keep=2, keep_best="eval_loss")
  for step in range(1, 6):
    saver.save(step, state(add=step), {"metrics": {"eval_loss": abs(step - 2.0)}})
  saver.wait()
  assert manager.steps(where) == [2, 4, 5]
  saver.close()
  assert {key.split("/")[1] for key in server.keys(prefix="run/")} == {"2", "4", "5"}
  saver.restore(state(), step=2)
  saver.save(4, state(add=40), {})  # goes back behind 4 and 5
  saver.close()
  assert manager.steps(where) == [2, 4] and same(manager.Manager(where).restore(state())[0], state(add=40))
  for old in (4, 5):
    kept = where / f"{old}.aside"
    wanted = arrays.named_leaves(state())
    found, _ = manager.read_step(kept, wanted)
    assert np.array_equal(found["params/w"], state(add=old)["params"]["w"])


@SCHEMES
def test_half_steps_are_none_and_are_removed(server, scheme):
  where = paths.named(f"{scheme}://bucket/run")
  saver = manager.Manager(where)
  saver.save(1, state(), {})
  saver.wait()
  for key in ("2/state/params.w/0.0", "3.aside/state/params.w/.zarray", "7.txt", "notes/x"):
    server.put(f"run/{key}", b"x")
  assert manager.steps(where) == [1]
  assert manager.Manager(where).restore(state(), step=1) is not None
  saver.save(4, state(), {})
  saver.close()
  assert manager.steps(where) == [1, 4]
  assert {key.split("/")[1] for key in server.keys(prefix="run/")} == {"1", "4", "7.txt", "notes"}


def test_damage_is_passed_over(server, caplog):
  where = paths.named("gs://bucket/run")
  saver = manager.Manager(where)
  for step in (1, 2, 3):
    saver.save(step, state(add=step), {})
  saver.close()
  data = bytearray(server.data("run/3/state/params.w/1.0"))
  data[5] ^= 1
  server.put("run/3/state/params.w/1.0", bytes(data))
  server.objects["bucket"].pop("run/2/state/params.narrow/0.2")
  saver = manager.Manager(where)
  assert same(saver.restore(state())[0], state(add=1))
  assert (
    "gs://bucket/run/3 is damaged, step 1 is used instead: params/w (checksum differs: state/params.w)" in caplog.text
  )
  assert "params/narrow (state/params.narrow/0.2 is missing)" in caplog.text
  saver.save(4, state(), {})
  saver.close()
  assert manager.steps(where) == [1, 4]


@pytest.mark.parametrize(
  "fault, words",
  [
    ({"status": 403, "code": "AccessDenied"}, "permission denied"),
    ({"status": 429, "code": "SlowDown"}, "too many requests"),
    ({"status": 503}, "the service reports an error"),
    ({"drop": True}, "no answer for"),
  ],
)
@pytest.mark.parametrize("what", ["params.w/1.0", "params.w/.zarray", "_METADATA", "checksums.json"])
def test_what_cannot_be_written_is_told_and_leaves_the_steps_before(server, monkeypatch, fault, words, what):
  monkeypatch.setenv(bucket.PATIENCE, "1")
  where = paths.named("gs://bucket/run")
  saver = manager.Manager(where)
  saver.save(1, state(), {})
  saver.wait()
  refuse(server, f"run/2/.*{re.escape(what)}", **fault)
  saver.save(2, state(add=1), {})
  with pytest.raises(
    errors.InputError, match=rf"checkpoint gs://bucket/run/2 could not be written \(.*{words}"
  ) as said:
    saver.wait()
  assert str(said.value).endswith("step 1 is still there") and "secret" not in str(said.value)
  server.fault = lambda method, path: None
  saver = manager.Manager(where)
  assert same(saver.restore(state())[0], state())
  saver.save(2, state(add=2), {})
  saver.close()
  assert same(manager.Manager(where).restore(state())[0], state(add=2))


def test_short_outages_lose_nothing(server):
  """Lost answers, answers that break off, refusals and two seconds without any connection."""
  count = 0

  def fault(method: str, path: str) -> bucket_server.Fault | None:
    nonlocal count
    count += 1
    kinds = [{"lose_answer": True}, {"status": 503}, {"status": 429}, {"drop": True}, {"hang": 0.3}, {"cut": 30}]
    return bucket_server.Fault(**kinds[count // 3 % 6]) if count % 3 == 0 else None

  where = paths.named("gs://bucket/run")
  saver = manager.Manager(where)
  server.fault = fault
  saver.save(1, state(add=1), {})
  saver.wait()
  server.down(2)
  saver.save(2, state(add=2), {})
  saver.close()
  server.fault = fault
  saver = manager.Manager(where)
  for step in (1, 2):
    assert same(saver.restore(state(), step)[0], state(add=step))


def test_who_has_lost_the_lock_writes_and_deletes_nothing(server):
  where = paths.named("gs://bucket/run/checkpoints")
  with lock.held(paths.named("gs://bucket/run/.lock"), "in use"):
    saver = manager.Manager(where, keep=1)
    saver.save(1, state(), {})
    saver.wait()
    before = server.keys()
    (held,) = lease._held
    held._lost = "a test"
    with pytest.raises(errors.InputError, match="could not be written .*has lost its lock"):
      saver.save(2, state(), {})
      saver.wait()
    assert server.keys() == before


def test_the_state_may_change_once_save_has_returned(server):
  """Arrays of JAX are donated, and the caller's own written into, while the bucket is slow."""
  where = paths.named("gs://bucket/run")
  saver = manager.Manager(where)
  refuse(server, "run/1/state", hang=0.2)
  mine = state()
  saver.save(1, mine, {})
  mine["host"] += 1
  add = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
  mine["params"] = add(mine["params"])
  saver.close()
  assert same(manager.Manager(where).restore(state())[0], state())


def test_requests_of_a_save(server):
  """Of 16 chunks and 9 headers: those, what Orbax has beside them, two looks at the steps, and what is pruned."""
  where = paths.named("s3://bucket/run")
  saver = manager.Manager(where, keep=2)
  for step in (1, 2, 3):
    before = len(server.log)
    saver.save(step, state(4), {})
    saver.wait()
    made = len(server.log) - before
  assert made < 60


MEMORY = """
import sys, threading, time
import jax
from glmjax.checkpoint import manager
from glmjax.io import paths

split = jax.sharding.NamedSharding(
  jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("x")
)
make = jax.jit(lambda i: jax.numpy.full((512, 1 << 15), i, jax.numpy.float32), out_shardings=split)
state = {f"array{i}": jax.block_until_ready(make(i)) for i in range(4)}  # 256 MiB
saver = manager.Manager(paths.named("gs://bucket/run"))
saver.save(1, {"x": jax.numpy.ones(3)}, {})
saver.wait()

def resident():
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * 4096 / 2**20

def watch():
  global most
  while True:
    most = max(most, resident())
    time.sleep(0.005)

before = most = resident()
threading.Thread(target=watch, daemon=True).start()
saver.save(2, state, {})
saver.close()
print(most - before, resident() - before)
"""


@pytest.mark.slow
def test_a_save_takes_one_copy(server, monkeypatch):
  """Of the state in the host's memory, which is given back."""
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
  most, after = map(float, done.stdout.split())
  assert most < 1.3 * 256 and after < 0.3 * 256, done.stdout
