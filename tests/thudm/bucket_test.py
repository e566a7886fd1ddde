"""THUDM's files and ours from buckets to buckets: as on a disk, object for object; killed and gone on with."""

import dataclasses
import functools
import io
import json
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile

import bucket_server
import chex
import killed_imports
import numpy as np
import pytest

from glmjax import cli
from glmjax import errors
from glmjax.checkpoint import blocks
from glmjax.checkpoint import export
from glmjax.checkpoint import load as load_lib
from glmjax.checkpoint import stored_weights
from glmjax.io import bucket
from glmjax.io import paths
from glmjax.io import publish
from glmjax.thudm import inspection
from glmjax.thudm import load
from glmjax.thudm import source as source_lib
from glmjax.thudm import torch_files
from glmjax.thudm import write

SCHEMES = pytest.mark.parametrize("scheme", bucket.SCHEMES)


def upload(server, folder: pathlib.Path, key: str) -> None:
  """Copies a folder as `gcloud storage cp -r` would."""
  for path in folder.rglob("*"):
    if path.is_file():
      server.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def download(server, key: str, folder: pathlib.Path) -> pathlib.Path:
  for name in server.keys(prefix=f"{key}/"):
    path = folder / name.removeprefix(f"{key}/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(server.data(name))
  return folder


def is_timed(name: str) -> bool:
  """Orbax notes when it wrote its description."""
  return name in ("params/_CHECKPOINT_METADATA", "params/commit_success.txt")


def on_disk(folder: pathlib.Path) -> dict[str, bytes]:
  found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  return {name: b"" if is_timed(name) else data for name, data in sorted(found.items())}


def in_bucket(server, key: str) -> dict[str, bytes]:
  names = [name.removeprefix(f"{key}/") for name in server.keys(prefix=f"{key}/")]
  return {name: b"" if is_timed(name) else server.data(f"{key}/{name}") for name in names}


@pytest.fixture(name="few")
def _few(monkeypatch):
  """Blocks small enough for a tiny model to have many."""
  monkeypatch.setattr(stored_weights, "ELEMENTS", 4096)


@pytest.mark.parametrize(
  "family, scheme, made, options",
  [
    ("chatglm-6b", "gs", {"shard_bytes": 100_000}, {}),
    ("chatglm-6b", "s3", {"kind": "bin"}, {"bits": 4}),
    ("chatglm-6b", "gs", {"bits": 8}, {}),
    ("glm-130b", "s3", {"degree": 2, "bits": 4}, {}),
    ("glm-130b", "gs", {"degree": 2}, {"bits": 8}),
    ("glm-10b", "gs", {}, {}),
  ],
)
def test_imports_are_those_of_a_disk(make, server, tmp_path, few, family, scheme, made, options):
  source = make(tmp_path / "source", family, **made)
  expected = load.import_model(family, source, tmp_path / "out", **options)
  upload(server, source, "theirs")
  url = f"{scheme}://bucket"
  found = load.import_model(family, f"{url}/theirs", f"{url}/models/ours", **options)
  assert found == expected | {"out": f"{url}/models/ours"}
  assert in_bucket(server, "models/ours") == on_disk(tmp_path / "out")
  assert not server.uploads()
  there, here = load_lib.load(f"{url}/models/ours"), load_lib.load(tmp_path / "out")
  chex.assert_trees_all_equal(there.params, here.params)
  assert load_lib.fingerprint(f"{url}/models/ours") == load_lib.fingerprint(tmp_path / "out")
  shown, wanted = inspection.inspect(f"{url}/theirs", hashes=True), inspection.inspect(source, hashes=True)
  assert shown == wanted | {"path": f"{url}/theirs"} and shown["problem"] is None
  shown, wanted = inspection.inspect(f"{url}/models/ours", hashes=True), inspection.inspect(tmp_path / "out")
  assert shown == wanted | {"path": f"{url}/models/ours", "verified": True}


@pytest.mark.parametrize("scheme, bits", [("gs", 4), ("s3", None)])
def test_exports_are_those_of_a_disk(make, server, tmp_path, few, scheme, bits):
  load.import_model("chatglm-6b", make(tmp_path / "source", "chatglm-6b"), tmp_path / "float")
  export.export(tmp_path / "float", tmp_path / "out", bits)
  url = f"{scheme}://bucket"
  upload(server, tmp_path / "float", "float")
  for source in (tmp_path / "float", f"{url}/float"):
    export.export(source, f"{url}/out", bits, overwrite=True)
    assert in_bucket(server, "out") == on_disk(tmp_path / "out")
  with pytest.raises(errors.InputError, match="there already"):
    export.export(tmp_path / "float", f"{url}/out", bits)
  export.export(f"{url}/out", tmp_path / "again")
  assert on_disk(tmp_path / "again").keys() == on_disk(tmp_path / "out").keys()
  copied = download(server, "out", tmp_path / "copied")
  chex.assert_trees_all_equal(load_lib.load(copied).params, load_lib.load(f"{url}/out").params)


@pytest.mark.parametrize(
  "family, name, scheme, bits",
  [
    ("chatglm-6b", "safetensors", "gs", 4),
    ("chatglm-6b", "chatglm-hf", "s3", None),
    ("glm-130b", "glm130b-sat", "gs", 8),
  ],
)
def test_formats_written_to_a_bucket_are_read_back(make, server, tmp_path, family, name, scheme, bits):
  load.import_model(family, make(tmp_path / "source", family), tmp_path / "ours", bits=bits)
  degree = 2 if name == "glm130b-sat" else None
  export.export(tmp_path / "ours", tmp_path / "disk", write_format=write.write_format(name, degree))
  export.export(tmp_path / "ours", f"{scheme}://bucket/theirs", write_format=write.write_format(name, degree))
  here, there = on_disk(tmp_path / "disk"), in_bucket(server, "theirs")
  assert here.keys() == there.keys()
  for file in here:  # those of torch have the sizes of their members behind these, as nothing is written twice
    assert file.endswith(".pt") or here[file] == there[file], file
  if name != "safetensors":
    expected = load.import_model(family, tmp_path / "disk", tmp_path / "expected")["out"]
    for source in (f"{scheme}://bucket/theirs", download(server, "theirs", tmp_path / "copied")):
      load.import_model(family, source, tmp_path / "back", overwrite=True)
      chex.assert_trees_all_equal(load_lib.load(tmp_path / "back").params, load_lib.load(expected).params)
  assert inspection.inspect(f"{scheme}://bucket/theirs", hashes=True)["problem"] is None


def test_what_is_half_written_is_no_source(make, server, tmp_path):
  upload(server, make(tmp_path / "source", "chatglm-6b"), "theirs")
  server.put("theirs/.unfinished", b'{"last": null}')
  with pytest.raises(errors.InputError, match="gs://bucket/theirs is half-written"):
    load.import_model("chatglm-6b", "gs://bucket/theirs", tmp_path / "out")
  with pytest.raises(errors.InputError, match="name a folder in it"):
    load.import_model("chatglm-6b", tmp_path / "source", "gs://bucket")


def test_what_fails_or_was_killed_leaves_nothing(make, server, tmp_path):
  load.import_model("glm-130b", make(tmp_path / "source", "glm-130b"), tmp_path / "ours")
  for key in ("out/.unfinished", "out/params/x/0", "out/config.json"):  # of an export that was killed
    server.put(key, b'{"last": "checksums.json"}')
  export.export(tmp_path / "ours", "gs://bucket/out")
  assert in_bucket(server, "out") == on_disk(tmp_path / "ours")
  before = server.keys()

  def fails(name, content, folder):
    def read(weight, region):
      if weight.name == "final_norm/bias":
        raise OSError(5, "it fails")
      return content.read(weight, region)

    write.write_format(name)(dataclasses.replace(content, read=read), folder)

  for name in ("safetensors", "glm130b-sat"):
    with pytest.raises(errors.InputError, match="could not be written .*: nothing was left there"):
      export.export(tmp_path / "ours", "gs://bucket/new", write_format=functools.partial(fails, name))
    assert [key for key in server.keys() if not key.endswith(".lock")] == [key for key in before if key[-5:] != ".lock"]
    assert not server.uploads()


def test_an_import_goes_on_in_its_place(make, server, tmp_path, monkeypatch, few):
  monkeypatch.setattr(blocks, "_WORKERS", 1)
  source = make(tmp_path / "source", "chatglm-6b")
  load.import_model("chatglm-6b", source, tmp_path / "whole")
  done = 0
  for count in (5, 7):
    with monkeypatch.context() as patch:
      names = killed_imports.stop_after(patch, count)
      with pytest.raises(killed_imports.Killed):
        load.import_model("chatglm-6b", source, "gs://bucket/out")
    done += len(names)
    with pytest.raises(errors.InputError, match="half-written"):
      load_lib.load("gs://bucket/out")
  with pytest.raises(errors.InputError, match="an import of other files or options that stopped"):
    load.import_model("chatglm-6b", source, "gs://bucket/out", bits=8)
  with monkeypatch.context() as patch:
    names = killed_imports.stop_after(patch, 10**9)
    load.import_model("chatglm-6b", source, "gs://bucket/out")
  weights = source_lib.open_source("chatglm-6b", source).weights(None, None)
  assert len(names) + done == sum(len(list(weight.regions())) for weight in weights)
  assert in_bucket(server, "out") == on_disk(tmp_path / "whole")
  with monkeypatch.context() as patch:  # a damaged block is written again, and another import begins anew
    killed_imports.stop_after(patch, 9)
    with pytest.raises(killed_imports.Killed):
      load.import_model("chatglm-6b", source, "gs://bucket/other")
  for key in [key for key in server.keys(prefix="other/params/") if not key.endswith(".zarray")][:3]:
    server.put(key, b"x" * len(server.data(key)))
  load.import_model("chatglm-6b", source, "gs://bucket/other")
  assert in_bucket(server, "other") == on_disk(tmp_path / "whole")


def test_one_writer(make, server, tmp_path):
  source = make(tmp_path / "source", "chatglm-6b")
  load.import_model("chatglm-6b", source, tmp_path / "float")
  reached, go = threading.Event(), threading.Event()

  def slow(content, folder):
    reached.set()
    assert go.wait(60)
    export.write_folder(content, folder)

  thread = threading.Thread(target=export.export, args=(tmp_path / "float", "gs://bucket/out", None, None, False, slow))
  thread.start()
  assert reached.wait(60)
  with pytest.raises(errors.InputError, match="is being written by another export or import"):
    export.export(tmp_path / "float", "gs://bucket/out")
  go.set()
  thread.join()
  assert publish.IN_WORK not in in_bucket(server, "out")
  assert in_bucket(server, "out") == on_disk(tmp_path / "float")


@pytest.mark.parametrize(
  "scheme, fault",
  [
    ("gs", bucket_server.Fault(drop=True)),
    ("s3", bucket_server.Fault(lose_answer=True)),
    pytest.param("s3", bucket_server.Fault(status=503), marks=pytest.mark.slow),
    pytest.param("gs", bucket_server.Fault(status=429, code="SlowDown"), marks=pytest.mark.slow),
    pytest.param("gs", bucket_server.Fault(cut=70), marks=pytest.mark.slow),
    pytest.param("s3", bucket_server.Fault(cut=70), marks=pytest.mark.slow),
    pytest.param("gs", bucket_server.Fault(lose_answer=True), marks=pytest.mark.slow),
  ],
  ids=["gs-drop", "s3-lose_answer", "s3-503", "gs-429", "gs-cut", "s3-cut", "gs-lose_answer"],
)
def test_faults_on_the_way(make, server, tmp_path, few, monkeypatch, scheme, fault):
  """Every fifth request meets a fault, and the result is the same."""
  monkeypatch.setenv(bucket.PATIENCE, "30")
  bucket.named.cache_clear()
  source = make(tmp_path / "source", "chatglm-6b", num_layers=1)
  load.import_model("chatglm-6b", source, tmp_path / "out", bits=4)
  upload(server, source, "theirs")
  count = iter(range(10**9))
  server.fault = lambda method, path: fault if next(count) % 5 == 4 else None
  load.import_model("chatglm-6b", f"{scheme}://bucket/theirs", f"{scheme}://bucket/out", bits=4)
  there = load_lib.load(f"{scheme}://bucket/out")
  server.fault = lambda method, path: None
  assert in_bucket(server, "out") == on_disk(tmp_path / "out")
  chex.assert_trees_all_equal(there.params, load_lib.load(tmp_path / "out").params)


@pytest.mark.slow
@pytest.mark.parametrize("scheme, kind", [("gs", "lost"), ("s3", "lost"), ("gs", "hang")])
def test_seconds_without_a_network(make, server, tmp_path, few, monkeypatch, scheme, kind):
  """In the middle of an import: the connection is lost for five seconds, or answers that do not come."""
  monkeypatch.setenv(bucket.PATIENCE, "60")
  monkeypatch.setattr(bucket, "_UNANSWERED", 2.0)
  bucket.named.cache_clear()
  source = make(tmp_path / "source", "chatglm-6b")
  load.import_model("chatglm-6b", source, tmp_path / "out")
  upload(server, source, "theirs")
  met = []

  def fault(method, path):
    if "/out/params/" not in path:
      return None
    met.append(time.monotonic())
    if kind == "lost" and len(met) > 40 and met[-1] < met[40] + 5:
      return bucket_server.Fault(drop=True)
    return bucket_server.Fault(hang=20) if kind == "hang" and len(met) in (40, 50) else None

  server.fault = fault
  load.import_model("chatglm-6b", f"{scheme}://bucket/theirs", f"{scheme}://bucket/out")
  assert len(met) > 50 and in_bucket(server, "out") == on_disk(tmp_path / "out")


def test_an_outage_ends_an_import_in_one_line_and_it_goes_on(make, server, tmp_path, few, monkeypatch):
  monkeypatch.setenv(bucket.PATIENCE, "1")
  bucket.named.cache_clear()
  source = make(tmp_path / "source", "chatglm-6b", num_layers=1)
  load.import_model("chatglm-6b", source, tmp_path / "whole")

  def fault(method, path):
    """Drops all once some blocks are there."""
    blocks = [key for key in server.keys(prefix="out/params/") if not key.endswith((".zarray", ".jsonl"))]
    return bucket_server.Fault(drop=True) if len(blocks) > 5 else None

  server.fault = fault
  with pytest.raises(errors.InputError, match="could not be written .*no answer.*: the same command goes on") as caught:
    load.import_model("chatglm-6b", source, "gs://bucket/out")
  assert "\n" not in str(caught.value)
  server.fault = lambda method, path: None
  with pytest.raises(errors.InputError, match="half-written"):
    load_lib.load("gs://bucket/out")
  monkeypatch.setattr("glmjax.io.lease.LEASE", 2.0)  # of the lock that could not be freed
  load.import_model("chatglm-6b", source, "gs://bucket/out")
  assert in_bucket(server, "out") == on_disk(tmp_path / "whole")


def test_damage_is_named_as_on_a_disk(make, server, tmp_path):
  load.import_model("chatglm-6b", make(tmp_path / "source", "chatglm-6b"), tmp_path / "out")
  upload(server, tmp_path / "out", "out")

  def refused(model) -> str:
    with pytest.raises(errors.InputError) as caught:
      load_lib.load(model)
    return str(caught.value)

  for name in ("params/embedding.table/0.0", "config.json", "params/final_norm.bias/.zarray", "checksums.json"):
    for damage in (lambda data: data[:-5], lambda data: data[:-2] + bytes([data[-2] ^ 1]) + data[-1:], None):
      before = (tmp_path / "out" / name).read_bytes()
      if damage is None:
        (tmp_path / "out" / name).unlink()
        del server.objects["bucket"][f"out/{name}"]
      else:
        (tmp_path / "out" / name).write_bytes(damage(before))
        server.put(f"out/{name}", damage(before))
      assert refused("gs://bucket/out").replace("gs://bucket/out", "OUT") == refused(tmp_path / "out").replace(
        str(tmp_path / "out"), "OUT"
      )
      (tmp_path / "out" / name).write_bytes(before)
      server.put(f"out/{name}", before)


@pytest.mark.slow
@SCHEMES
def test_killed_imports_go_on(make, server, tmp_path, scheme):
  """kill -9 at any moment, while what is complete stays so."""
  source = make(tmp_path / "source", "chatglm-6b")
  upload(server, source, "theirs")
  code = (
    "import sys; from glmjax.checkpoint import blocks, stored_weights; from glmjax.io import lease;"
    "stored_weights.ELEMENTS = 2048; blocks._PUT_EVERY = 0.1; lease.LEASE = 2.0;"
    "from glmjax.thudm import load; load.import_model('chatglm-6b', *sys.argv[1:])"
  )
  subprocess.run([sys.executable, "-c", code, source, tmp_path / "whole"], check=True)
  command = [sys.executable, "-c", code, f"{scheme}://bucket/theirs", f"{scheme}://bucket/out"]
  kills = 0
  for count in (2, 15, 40, 90, 140):
    process = subprocess.Popen(command)
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
      if len(server.keys(prefix="out/params/")) > count:
        process.send_signal(signal.SIGKILL)
        kills += 1
        break
      time.sleep(0.002)
    process.wait()
    if "out/checksums.json" in server.keys():
      break
    with pytest.raises(errors.InputError, match="half-written|no such folder|no config.json"):
      load_lib.load(f"{scheme}://bucket/out")
  subprocess.run(command, check="out/checksums.json" not in server.keys(), stderr=subprocess.DEVNULL)
  assert kills > 1 and in_bucket(server, "out") == on_disk(tmp_path / "whole")


@SCHEMES
def test_commands(make, server, tmp_path, capsys, monkeypatch, scheme):
  """import, inspect, generate and score, every folder and file in a bucket: what they give is that of a disk."""
  monkeypatch.chdir(tmp_path)
  upload(server, make(tmp_path / "theirs", "chatglm-6b"), "theirs")
  (tmp_path / "prompts.txt").write_text("On day\nthe quick [MASK] fox\n第\n")
  server.put("prompts.txt", (tmp_path / "prompts.txt").read_bytes())
  said = []
  for where in ("", f"{scheme}://bucket/"):
    for line in (
      f"import chatglm-6b {where}theirs {where}ours --bits=8 --stages={where}stages.jsonl",
      f"inspect {where}ours --hashes",
      f"generate --checkpoint={where}ours --file={where}prompts.txt --out={where}answers.jsonl --max_tokens=3",
      f"generate --checkpoint={where}ours --file={where}prompts.txt --out={where}answers.jsonl --max_tokens=3",
      f"score --checkpoint={where}ours --text=day",
    ):
      assert cli.main(line.split()) == 0, capsys.readouterr().err
    said.append(capsys.readouterr().out.replace(where or f"{tmp_path}/", ""))
  assert said[0] == said[1] and "everything is as recorded" in said[0]
  assert server.data("answers.jsonl") == (tmp_path / "answers.jsonl").read_bytes()
  assert json.loads(server.data("stages.jsonl"))["stage"] == "import"
  assert cli.main(["inspect", f"{scheme}://bucket/none"]) == 2
  assert f"glmjax: {scheme}://bucket/none: no such file or folder" in capsys.readouterr().err


@SCHEMES
def test_pickles_are_zip_files_of_the_form_that_torch_reads(server, scheme, tmp_path):
  """Stored, aligned, with CRC and sizes in the directory and in the local headers or, flagged, behind the data."""
  arrays = {
    "a": np.arange(7, dtype=np.float32),
    "b": np.arange(5_000_000).astype(np.int8),
    "c": np.zeros((2, 3), "<i8"),
  }
  there, here = paths.named(f"{scheme}://bucket/x.pt"), tmp_path / "x.pt"
  for path in (there, here):
    with torch_files.TorchWriter(path, {name: (x.dtype, x.shape) for name, x in arrays.items()}, "module") as writer:
      for x in arrays.values():
        writer.write([x.tobytes()])
    found = torch_files.open_state_dict(path)
    chex.assert_trees_all_equal({name: tensor.whole() for name, tensor in found.items()}, arrays)
  contents = []
  for data in (server.data("x.pt"), here.read_bytes()):
    archive = zipfile.ZipFile(io.BytesIO(data))
    assert archive.testzip() is None
    for info in archive.infolist():
      at = info.header_offset
      (flags,) = struct.unpack_from("<H", data, at + 6)
      (crc,), (name, extra) = struct.unpack_from("<I", data, at + 14), struct.unpack_from("<HH", data, at + 26)
      start, sizes = at + 30 + name + extra, struct.unpack_from("<QQ", data, at + 30 + name + extra - 16)
      if flags & 8:
        mark, crc, *sizes = struct.unpack_from("<4sIQQ", data, start + info.file_size)
        assert mark == b"PK\7\x08"
      assert crc == info.CRC and list(sizes) == [info.file_size] * 2
      assert start % 64 == 0 and info.compress_type == zipfile.ZIP_STORED
    contents.append({info.filename: archive.read(info) for info in archive.infolist()})
  assert contents[0] == contents[1]
