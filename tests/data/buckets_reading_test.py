"""Token caches in buckets, read: the very rows of the same cache on a disk, whatever the network and the disk do."""

import dataclasses
import json
import logging
import os
import pathlib
import types

import bucket_server
import numpy as np
import pytest

from glmjax import errors
from glmjax import tokens
from glmjax.data import builder
from glmjax.data import loader
from glmjax.data import nearby
from glmjax.data import rows
from glmjax.data import shards
from glmjax.data import verified
from glmjax.io import bucket

SPECIALS = tokens.icetk(0, 500)
INFILLING = rows.BlankInfilling(64, SPECIALS, samples_per_sequence=2)
PLAN = [(0, 8), (8, 8), (100, 4), (10**9, 8), (10**12, 12)]
SCHEMES = pytest.mark.parametrize("scheme", bucket.SCHEMES)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A cache on the disk: text of several blocks a shard, and pairs."""
  folder = tmp_path_factory.mktemp("local") / "cache"
  about = {"fingerprint": "f" * 64, "vocab_size": 508, "specials": dataclasses.asdict(SPECIALS)}
  splits = {"train": {"source": ""}}
  tasks = {name: {"kind": kind, "rate": 1, "splits": splits} for name, kind in [("en", "text"), ("qa", "instruction")]}
  with builder.CacheBuilder(folder, builder.make_plan("m", 2, about, tasks)) as making:
    for shard in making.missing():
      rng = np.random.default_rng([shard.index, ord(shard.task[0])])
      many, inputs = (3000, 0) if shard.task == "en" else (1000, 5)
      documents = [shards.Document(rng.integers(4, 500, rng.integers(10, 30)), 1, inputs) for _ in range(many)]
      builder.write_shard(making.partial, shard, documents, 508)
    making.finish()
  return folder


@pytest.fixture
def there(server, local, tmp_path, monkeypatch) -> str:
  """The same cache in the server's bucket, copied file by file, below a scheme's address; an own folder nearby."""
  monkeypatch.setenv(nearby.FOLDER, str(tmp_path / "near"))
  for path in local.rglob("*"):
    if path.is_file():
      server.put(f"cache/{path.relative_to(local)}", path.read_bytes())
  return "://bucket/cache"


def batches(directory, **settings) -> list[loader.Batch]:
  return list(loader.CachedMixture(directory, INFILLING, seed=5, **settings).batches(iter(PLAN)))


def same(a: list[loader.Batch], b: list[loader.Batch]) -> bool:
  return len(a) == len(b) and all(np.array_equal(x[name], y[name]) for x, y in zip(a, b) for name in y)


def kept(tmp_path: pathlib.Path) -> list[pathlib.Path]:
  return sorted((tmp_path / "near" / "buckets").iterdir())


@SCHEMES
@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_are_those_of_the_disk(server, there, local, scheme, num_workers) -> None:
  assert same(batches(f"{scheme}{there}", num_workers=num_workers), batches(local, num_workers=0))


def test_a_second_epoch_makes_no_requests(server, there, local) -> None:
  source = loader.CachedMixture(f"gs{there}", INFILLING, num_workers=0)
  size = sum(source.sampler.describe()["rows_per_epoch"].values()) + 10
  first = list(source.batches([(0, size)]))
  before = server.requests.total()
  assert same(list(source.batches([(0, size), (size, size)]))[:1], first)
  assert server.requests.total() == before
  again = loader.CachedMixture(f"gs{there}", INFILLING, num_workers=1)  # another process
  again.describe()
  before = server.requests.total()
  assert same(list(again.batches([(0, size)])), first) and server.requests.total() == before


def test_only_what_is_read_is_fetched(server, there, local) -> None:
  source = loader.CachedMixture(f"gs{there}", INFILLING, num_workers=0, rates={"en": 1})
  source.check()
  server.log.clear()
  list(source.batches([(0, 1)]))
  fetched = [path for kind, path in server.log if kind == "read"]
  assert len(fetched) == len(set(fetched)) <= 4, fetched  # a block, or two, and their shards' sums


def test_everything_that_readers_give(server, there, local) -> None:
  caches = [shards.TokenCache.open(local), shards.TokenCache.open(f"s3{there}")]
  caches[1].verify()
  assert caches[0].fingerprint == caches[1].fingerprint
  for task in ("en", "qa"):
    here, far = (cache.split(task, "train") for cache in caches)
    assert np.array_equal(here.read(0, here.num_tokens), far.read(0, far.num_tokens))
    assert np.array_equal(here.document_lengths(), far.document_lengths())
    for one, other in zip(here.documents(), far.documents(), strict=True):
      assert np.array_equal(one.tokens, other.tokens) and one[1:] == other[1:]
    some = here.documents_between(900, 1100)  # of two shards
    for i, one in enumerate(some, 900):
      assert np.array_equal(one.tokens, far.document(i).tokens) and one[1:] == far.document(i)[1:]


@SCHEMES
@pytest.mark.parametrize(
  "fault",
  [
    bucket_server.Fault(status=503),
    bucket_server.Fault(status=429, code="SlowDown"),
    bucket_server.Fault(cut=1000),
    bucket_server.Fault(drop=True),
    bucket_server.Fault(hang=0.5, drop=True),
  ],
  ids=["503", "429", "cut", "dropped", "hangs"],
)
def test_what_passes_is_waited_for(server, there, local, scheme, fault) -> None:
  seen = set()

  def once(method: str, path: str) -> bucket_server.Fault | None:
    first = method == "GET" and path not in seen
    seen.add(path)
    return fault if first else None

  server.fault = once
  assert same(batches(f"{scheme}{there}", num_workers=0), batches(local, num_workers=0))


def test_lost_connections_are_waited_for(server, there, local) -> None:
  source = loader.CachedMixture(f"gs{there}", INFILLING, seed=5, num_workers=2)
  source.check()
  server.down(1.5)
  assert same(list(source.batches(iter(PLAN))), batches(local, num_workers=0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_answer_ends_in_one_line_that_names_the_sample(server, there, num_workers) -> None:
  source = loader.CachedMixture(f"gs{there}", INFILLING, num_workers=num_workers)
  source.check()
  server.down(1000)
  with pytest.raises(errors.InputError, match=r"^sample \d+ \((en|qa)\): cannot read .*gs://.*no answer") as caught:
    list(source.batches([(0, 40)]))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "replaced"])
def test_a_damaged_object_is_named(server, there, damage) -> None:
  source = loader.CachedMixture(f"gs{there}", INFILLING, num_workers=0, rates={"en": 1})
  source.check()
  for key in server.keys(prefix="cache/en/"):
    if key.endswith(".tokens"):
      content = server.data(key)
      if damage == "gone":
        del server.objects["bucket"][key]
      else:
        server.put(key, content[:100] if damage == "short" else content[:-1000][::-1] + content[-1000:])
  if damage == "replaced":
    server.put("cache/manifest.json", server.data("cache/manifest.json").replace(b'"m"', b'"n"'))
  wanted = {
    "flipped": r"gs://bucket/cache/en/.*: bytes \d+ to \d+ differ from their checksum",
    "short": "gs://bucket/cache/en/.*: ends too early",
    "gone": "gs://bucket/cache/en/.*: missing",
    "replaced": "gs://bucket/cache/en/",
  }
  with pytest.raises(errors.InputError, match=rf"^sample \d+ \(en\): .*{wanted[damage]}"):
    list(source.batches([(0, 40)]))
  with pytest.raises(errors.InputError, match="gs://bucket/cache"):
    loader.CachedMixture(f"gs{there}", INFILLING).cache.verify()


def test_what_is_kept_is_never_believed(server, there, local, tmp_path) -> None:
  """Torn, damaged and emptied copies are fetched again."""
  expected = batches(local, num_workers=0)
  for damage in (lambda data: data[:-5000], lambda data: b"\1" + data[1:], lambda data: b"", lambda data: data[::-1]):
    assert same(batches(f"gs{there}", num_workers=0), expected)
    for path in kept(tmp_path):
      path.write_bytes(damage(path.read_bytes()))
  before = server.requests["read"]
  assert same(batches(f"gs{there}", num_workers=0), expected) and server.requests["read"] > before


def test_copies_of_files_that_differ_have_different_names() -> None:
  names = {nearby.name_of(*each) for each in [("a", 1, "b"), ("a", 1, "c"), ("a", 2, "b"), ("c", 1, "b")]}
  assert len(names) == 4


def test_the_bound_of_what_is_kept(server, there, local, tmp_path, monkeypatch) -> None:
  monkeypatch.setattr(nearby, "SEGMENT", 1 << 16)
  limit = 1 << 18
  source = loader.CachedMixture(f"gs{there}", INFILLING, seed=5, num_workers=0, local_gib=limit / 2**30)
  plain = loader.CachedMixture(local, INFILLING, seed=5, num_workers=0)
  most = 0
  for first in range(0, 2000, 50):
    assert same(list(source.batches([(first, 50)])), list(plain.batches([(first, 50)])))
    most = max(most, sum(path.stat().st_blocks * 512 for path in kept(tmp_path)))
  assert limit // 2 < most <= limit
  assert source.describe() == plain.describe()


def test_a_disk_that_is_nearly_full_is_not_filled(tmp_path, monkeypatch) -> None:
  """Of 1 MB that is free, never more than two thirds are taken, whatever the limit."""
  folder, size = nearby.Folder(tmp_path, 1 << 40), 1 << 20
  monkeypatch.setattr(nearby, "SEGMENT", 1 << 15)

  def taken() -> int:
    return sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())

  monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_bavail=size - taken(), f_frsize=1))
  for place in range(0, 4 * size, 1 << 14):
    folder._unseen = None  # as of a process that begins
    folder.write("0" * 32, place, os.urandom(1 << 14))
    assert taken() <= size * 2 // 3
  assert taken() > size // 3 and folder.writes


def test_processes_that_share_the_folder_keep_within_its_bound(server, there, local, tmp_path, monkeypatch) -> None:
  limit = 1 << 19
  plain = loader.CachedMixture(local, INFILLING, seed=5, num_workers=0)
  source = dataclasses.replace(plain, directory=f"gs{there}", num_workers=3, local_gib=limit / 2**30)
  plan = [(first, 40) for first in range(0, 1600, 40)]
  most = 0
  for one, other in zip(source.batches(iter(plan)), plain.batches(plan), strict=True):
    assert same([one], [other])
    most = max(most, sum(path.stat().st_blocks * 512 for path in kept(tmp_path)))
  assert 0 < most <= limit


def test_nothing_is_kept_where_nothing_may_be(server, there, local, tmp_path) -> None:
  assert same(batches(f"gs{there}", num_workers=0, local_gib=0), batches(local, num_workers=0))
  assert not (tmp_path / "near").exists()


@pytest.mark.parametrize("when", ["at first", "later"])
def test_a_disk_that_takes_nothing_is_told_of_once(server, there, local, tmp_path, monkeypatch, caplog, when) -> None:
  if when == "at first":
    (tmp_path / "near").write_text("a file is in the way")
  else:
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
  with caplog.at_level(logging.WARNING, "glmjax"):
    assert same(batches(f"gs{there}", num_workers=0), batches(local, num_workers=0))
  assert len([record for record in caplog.records if "takes no more bytes" in record.getMessage()]) == 1


def test_caches_without_sums_of_blocks_are_read_whole(server, there, local) -> None:
  manifest = shards.read_manifest(local)
  for task in manifest["tasks"].values():
    for shard in task["splits"]["train"]["shards"]:
      shard.pop("sums")
  for key in server.keys(prefix="cache/"):
    if key.endswith(".sums"):
      del server.objects["bucket"][key]
  server.put("cache/manifest.json", json.dumps(manifest).encode())
  assert same(batches(f"gs{there}", num_workers=0), batches(local, num_workers=0))
  key = "cache/en/train-00000-of-00002.tokens"
  server.put(key, bytes(len(server.data(key))))
  with pytest.raises(errors.InputError, match=f"gs://bucket/{key}: contents differ"):
    batches(f"gs{there}", num_workers=0)


def test_opening_ends_in_one_line(server, there, monkeypatch) -> None:
  monkeypatch.setenv(bucket.PATIENCE, "1")
  server.down(1000)
  with pytest.raises(errors.InputError, match="^cannot open the token cache gs://bucket/cache: no answer") as caught:
    shards.TokenCache.open(f"gs{there}")
  assert "\n" not in str(caught.value)
  with pytest.raises(errors.InputError, match="no finished token cache here"):
    server.fault = lambda method, path: None
    shards.TokenCache.open("gs://bucket/elsewhere")


def test_an_opened_cache_costs_one_listing(server, there) -> None:
  shards.TokenCache.open(f"gs{there}")
  assert server.requests["head"] + server.requests["read"] <= 6  # of the manifest; none of a shard
  assert not [path for kind, path in server.log if kind in ("head", "read") and "manifest" not in path]


def test_blocks_that_lack_side_by_side_are_one_request(server, there) -> None:
  cache = shards.TokenCache.open(f"gs{there}")
  reader = cache.split("en", "train")
  block = verified.BLOCK // 2  # tokens
  reader.read(block, block + 1)
  server.log.clear()
  reader.read(0, 3 * block)
  assert [kind for kind, path in server.log if path.endswith(".tokens")] == ["read", "read"]  # before and behind it
