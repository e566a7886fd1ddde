"""Prompts, answers, seconds, pictures and reports in buckets: as on a disk, and gone on with after a kill."""

import contextlib
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence

import bucket_server
import pytest

from glmjax import display, errors
from glmjax.cli import answers, inference, inputs
from glmjax.evaluate import report, timings
from glmjax.infer import engine
from glmjax.io import bucket, growing, paths
from glmjax.plan import compiler

SCHEMES = pytest.mark.parametrize("scheme", bucket.SCHEMES)


class Model:
  """Answers in capitals; two prompts at a time."""

  max_batch = 2
  config = types.SimpleNamespace(max_length=50, vocab_size=1 << 30)
  room = engine.Engine.room

  def encode(self, text: str) -> list[int]:
    return [ord(letter) for letter in text]

  def generate(self, prompts: Sequence[str], *_) -> list[engine.Generation]:
    if "stop" in prompts:
      raise KeyboardInterrupt
    return [engine.Generation(prompt.upper(), ["x"], [[1]], "stop") for prompt in prompts]


@pytest.fixture(autouse=True)
def model(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(engine.Engine, "load", lambda checkpoint, **options: Model())
  monkeypatch.setattr(inference, "model_folder", pathlib.Path)
  monkeypatch.setattr(inference, "_fingerprint", str)


def generate(prompts: Sequence[str], out: str, samples: str | None = None, overwrite=False, checkpoint="m") -> dict:
  return inference.generate(checkpoint, prompts, output=inference.Output(out, overwrite, samples, "model"))


@SCHEMES
def test_answers_are_those_of_a_disk(server, scheme):
  url = f"{scheme}://bucket"
  server.put("prompts.jsonl", b'{"prompt": "a", "id": 1}\n{"prompt": "b"}\n{"prompt": "c"}\n')
  rows = [row for row, _ in inputs._rows(f"{url}/prompts.jsonl", "")]
  assert len(rows) == 3
  assert generate(rows, "a.jsonl", "s.jsonl")["new"] == 3
  assert generate(rows, f"{url}/x/a.jsonl", f"{url}/x/s.jsonl")["new"] == 3
  for name in ("a.jsonl", "s.jsonl", "a.jsonl.settings.json"):
    assert server.data(f"x/{name}") == pathlib.Path(name).read_bytes()
  assert generate(rows, f"{url}/x/a.jsonl")["new"] == 0
  with pytest.raises(errors.InputError, match="holds answers of other settings .another model, then at m"):
    generate(rows, f"{url}/x/a.jsonl", checkpoint="n")
  with pytest.raises(errors.InputError, match="line 1 is no answer to prompt 1"):
    generate(["z"], f"{url}/x/a.jsonl")
  assert generate(["z"], f"{url}/x/a.jsonl", overwrite=True, checkpoint="n")["new"] == 1
  assert json.loads(server.data("x/a.jsonl"))["output"] == "Z"
  server.put("y.jsonl", b"mine\n")
  with pytest.raises(errors.InputError, match="holds other things than answers"):
    generate(["z"], f"{url}/y.jsonl", overwrite=True)
  with pytest.raises(errors.InputError, match="--samples and --out are both"):
    generate(["z"], f"{url}/z.jsonl", f"{url}/z.jsonl")


def test_a_stopped_run_goes_on(server):
  prompts = ["a", "b", "c", "d", "e"]
  generate(prompts, "a.jsonl")
  with pytest.raises(KeyboardInterrupt):
    generate(["a", "b", "c", "stop", "e"], "gs://bucket/a.jsonl")
  assert len(server.data("a.jsonl").splitlines()) == 2
  server.put("a.jsonl", server.data("a.jsonl") + b'{"prompt": "c", "out')
  assert generate(prompts, "gs://bucket/a.jsonl")["new"] == 3
  assert server.data("a.jsonl") == pathlib.Path("a.jsonl").read_bytes()


def test_settings_never_stand_beside_answers_that_they_did_not_give(server, monkeypatch):
  generate(["a"], "gs://bucket/a.jsonl")

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(answers.publish, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
      generate(["a"], "gs://bucket/a.jsonl", overwrite=True, checkpoint="n")
  assert server.data("a.jsonl") == b""


def test_two_runs_do_not_write_one_file(server):
  with answers.files("gs://bucket/a.jsonl", None, "", [], {}, False):
    with pytest.raises(errors.InputError, match="another process is writing gs://bucket/a.jsonl"):
      generate(["a"], "gs://bucket/a.jsonl")


def test_answers_that_cannot_be_put_are_no_success(server, monkeypatch):
  monkeypatch.setenv(bucket.PATIENCE, "1")
  bucket.named.cache_clear()

  def refuses(method, path):
    return bucket_server.Fault(status=503) if method == "PUT" and path.endswith("/a.jsonl") else None

  with answers.files("gs://bucket/b.jsonl", None, "", [{"prompt": "a"}], {}, False) as files:
    files.write([{"prompt": "a", "output": "b"}])
  with pytest.raises(errors.InputError, match="cannot write gs://bucket/a.jsonl: the last answers are not there"):
    with answers.files("gs://bucket/a.jsonl", None, "", [{"prompt": "a"}], {}, False) as files:
      files.begin()
      files.begin = None
      server.fault = refuses
      files.write([{"prompt": "a", "output": "b"}])
  server.fault = lambda method, path: None
  assert generate(["a"], "gs://bucket/a.jsonl", overwrite=True)["new"] == 1


@pytest.mark.parametrize("out", ["a.jsonl", "gs://bucket/a.jsonl"])
@pytest.mark.parametrize("samples", ["s.jsonl", "gs://bucket/s.jsonl"])
@pytest.mark.parametrize("late", ["a.jsonl", "s.jsonl", None])
def test_samples_follow_from_the_answers_whenever_a_run_is_killed(server, monkeypatch, out, samples, late):
  """Killed before each write to a disk and each put into the bucket, where the file `late` is put at the end alone; the
  same command then completes both files.
  """
  prompts, counts, write = ["a", "b", "c", "d", "e"], {"left": 10**6}, answers._write
  generate(prompts, "wanted.jsonl", "wanted_samples.jsonl")
  wanted = [pathlib.Path(name).read_bytes() for name in ("wanted.jsonl", "wanted_samples.jsonl")]
  other = b'{"model": "other", "prompt": "a", "output": "A"}\n'

  def is_dead() -> bool:
    counts["left"] -= 1
    return counts["left"] < 0

  def write_or_die(file, lines) -> None:
    if is_dead():
      raise KeyboardInterrupt
    write(file, lines)
    time.sleep(0.004)

  def refuses(method, path):
    counted = method == "PUT" and path.endswith(".jsonl")
    return bucket_server.Fault(status=403, code="AccessDenied") if counted and is_dead() else None

  def found(path: str) -> bytes:
    return server.data(path.rpartition("/")[2]) if "//" in path else pathlib.Path(path).read_bytes()

  monkeypatch.setattr(answers, "_write", write_or_die)
  monkeypatch.setattr(growing, "_EVERY", 0.001)
  monkeypatch.setattr(growing, "_SHARE", 0)
  now_and_then = growing.File._put_now_and_then
  monkeypatch.setattr(
    growing.File, "_put_now_and_then", lambda file: None if file.local.name == late else now_and_then(file)
  )
  for moment in range(100):
    server.objects["bucket"].clear()
    for path in map(pathlib.Path, ("a.jsonl", "a.jsonl.settings.json", "s.jsonl")):
      path.unlink(missing_ok=True)
    server.put("s.jsonl", other)
    pathlib.Path("s.jsonl").write_bytes(other)
    counts["left"], server.fault = moment, refuses
    ended = False
    with contextlib.suppress(KeyboardInterrupt, errors.InputError, OSError):
      generate(prompts, out, samples)
      ended = True
    counts["left"], server.fault = 10**6, lambda method, path: None
    generate(prompts, out, samples)
    assert [found(out), found(samples)] == [wanted[0], other + wanted[1]], moment
    if ended:
      break
  assert ended and moment > 4


@pytest.mark.slow
@SCHEMES
def test_killed_runs_go_on(server, scheme):
  """kill -9 after more and more answers; what is there is never lost, and the end is that of a disk."""
  prompts = [f"prompt {i}" for i in range(30)]
  code = f"""
import pathlib, sys, time
sys.path[:0] = {[str(folder) for folder in pathlib.Path(__file__).parents[:2]]!r}
from bucket_test import Model, generate
from glmjax.cli import inference
from glmjax.infer import engine
from glmjax.io import growing
engine.Engine.load = lambda checkpoint, **options: Model()
inference.model_folder = pathlib.Path
inference._fingerprint = str
growing._EVERY = 0.05
def slow(self, prompts, *rest):
  time.sleep(0.1)
  return quick(self, prompts, *rest)
quick, Model.generate = Model.generate, slow
generate({prompts!r}, "{scheme}://bucket/a.jsonl")
"""
  generate(prompts, "a.jsonl")
  expected, kills, done = pathlib.Path("a.jsonl").read_bytes(), 0, b""
  for count in (1, 5, 11, 20, 31):
    process = subprocess.Popen([sys.executable, "-c", code])
    while process.poll() is None:
      if "a.jsonl" in server.keys() and server.data("a.jsonl").count(b"\n") >= count:
        process.send_signal(signal.SIGKILL)
        kills += 1
        break
      time.sleep(0.005)
    process.wait()
    found = server.data("a.jsonl")
    assert found.startswith(done) and expected.startswith(found)
    done = found
  assert kills > 2 and done == expected


@SCHEMES
def test_seconds_of_several_commands_at_once(server, scheme):
  file = f"{scheme}://bucket/x/stages.jsonl"
  timings.prepare(file)
  threads = [threading.Thread(target=timings.append, args=(file, f"stage {i}", 1.0, float(i))) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert timings.read(file) == {f"stage {i}": float(i) for i in range(8)}
  assert timings.read(f"{scheme}://bucket/none.jsonl") == {}


def test_pictures_and_what_was_compiled(server):
  display.Picture(b"png").save("gs://bucket/x/picture.png")
  assert server.data("x/picture.png") == b"png"
  file = paths.named("gs://bucket/fits.jsonl")
  programs = [{"program": str(i), "peak_bytes_per_device": i} for i in range(2)]
  for program in programs:
    compiler.Compiler(0, file)._note(program)
  assert compiler.Compiler(0, file)._known == {each.pop("program"): each for each in programs}
  assert growing.File(paths.named("gs://bucket/fits.jsonl")).close()


@SCHEMES
def test_a_report(server, scheme, tmp_path):
  pytest.importorskip("matplotlib")
  step = {"step": 1, "samples_seen": 4, "tokens_seen": 40, "tokens_per_second": 2.0, "model_flops_per_second": 3.0}
  lines = [json.dumps(step | {"step": i, "loss": 1.0 / i, "loss_gmask": 1.0 / i}) + "\n" for i in (1, 2, 3)]
  figures = {"en": {"tokens": 3, "bytes": 9, "bits_per_byte": 1.5}}
  files = {
    "train/metrics.jsonl": "".join(lines),
    "heldout.json": json.dumps(figures),
    "heldout_int8.json": json.dumps(figures),
    "float/params/x": "12345",
    "int8/params/x": "12",
    "samples.jsonl": '{"model": "float", "prompt": "a", "output": "b"}\n',
    "stages.jsonl": '{"stage": "train", "seconds": 2.5}\n',
  }
  for name, text in files.items():
    (path := tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    server.put(f"run/{name}", text.encode())
  names = {"evaluations": {"float": "heldout.json", "int8": "heldout_int8.json"}}
  names["exports"] = {"float": "float", "int8": "int8"}
  found = report.write(f"{scheme}://bucket/run", **names)
  assert found == report.write(tmp_path / "run", **names)
  for name in ("report.json", "report.md", "loss.png"):
    assert server.data(f"run/{name}") == (tmp_path / "run" / name).read_bytes()
  names["exports"]["int8"] = f"{scheme}://bucket/run/int8"
  assert report.write(tmp_path / "run", **names) == found
  with pytest.raises(errors.InputError, match="no exported model here"):
    report.write(f"{scheme}://bucket/run", exports={"float": "none"}, evaluations={"float": "heldout.json"})
  with pytest.raises(errors.InputError, match="heldout_int4.json: missing"):
    report.write(f"{scheme}://bucket/run", evaluations={"float": "heldout_int4.json"})
