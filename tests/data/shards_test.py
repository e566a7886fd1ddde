"""The token cache on disk: what is written is read back, and what is damaged is named."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from glmjax import errors
from glmjax import tokens
from glmjax.data import builder
from glmjax.data import shards
from glmjax.data import verified
from glmjax.io import owner

SPECIALS = tokens.icetk(0, 1000)


def plan(
  mixture: str = "m", source: str = "v1", rate: float = 1.0, vocab_size: int = 1008, num_shards: int = 3
) -> dict:
  tokenizer = {"fingerprint": "f" * 64, "vocab_size": vocab_size, "specials": dataclasses.asdict(SPECIALS)}
  splits = {"train": {"source": source}, "validation": {"source": source}}
  tasks = {"en": {"kind": "text", "rate": rate, "splits": splits}}
  return builder.make_plan(mixture, num_shards, tokenizer, tasks)


def shard_documents(shard: builder.Shard, vocab_size: int = 1008) -> list[shards.Document]:
  rng = np.random.default_rng([shard.index, len(shard.split)])
  return [shards.Document(rng.integers(0, vocab_size, rng.integers(0, 60)), int(rng.integers(100))) for _ in range(20)]


def build(
  directory: pathlib.Path, overwrite: bool = False, tokenizer: pathlib.Path | None = None, **kwargs: str | float
) -> shards.TokenCache:
  with builder.CacheBuilder(directory, plan(**kwargs), overwrite) as making:
    for shard in making.missing():
      vocab_size = making.plan["tokenizer"]["vocab_size"]
      builder.write_shard(making.partial, shard, shard_documents(shard, vocab_size), vocab_size)
    return making.finish(tokenizer)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("vocab_size,dtype", [(1008, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (150_528, "<u4")])
def test_tokens_and_documents_read_back(tmp_path: pathlib.Path, vocab_size: int, dtype: str) -> None:
  cache = build(tmp_path / "cache", vocab_size=vocab_size)
  assert cache.manifest["dtype"] == dtype and cache.specials == SPECIALS and cache.vocab_size == vocab_size
  written = [
    document
    for shard in builder.all_shards(plan(vocab_size=vocab_size))
    if shard.split == "train"
    for document in shard_documents(shard, vocab_size)
  ]
  reader = cache.split("en", "train")
  assert reader.num_documents == len(written)
  for expected, got in zip(written, reader.documents(), strict=True):
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert (got.utf8_bytes, got.input_length) == (expected.utf8_bytes, 0)
  stream = np.concatenate([document.tokens for document in written])
  assert reader.num_tokens == stream.size
  assert reader.utf8_bytes == sum(document.utf8_bytes for document in written)
  rng = np.random.default_rng(0)
  somewhere = np.sort(rng.integers(0, stream.size, (50, 2))).tolist()
  for start, stop in [(0, stream.size), (0, 0), (stream.size, stream.size), *somewhere]:
    np.testing.assert_array_equal(reader.read(start, stop), stream[start:stop])
  lengths = [(0, len(document.tokens)) for document in written]
  np.testing.assert_array_equal(reader.document_lengths(), lengths)


def test_same_bytes_on_every_run_and_tokenizer_is_copied(tmp_path: pathlib.Path) -> None:
  (tmp_path / "tokenizer").mkdir()
  (tmp_path / "tokenizer/tokenizer.model").write_bytes(b"pieces")
  one = build(tmp_path / "one", tokenizer=tmp_path / "tokenizer")
  build(tmp_path / "two", tokenizer=tmp_path / "tokenizer")
  assert contents(tmp_path / "one") == contents(tmp_path / "two")
  assert (one.tokenizer_folder / "tokenizer.model").read_bytes() == b"pieces"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "tokenizer", "two"]


def flipped(content: bytes, place: int) -> bytes:
  return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def as_before(directory: pathlib.Path) -> None:
  """Makes the cache one of an older glmjax: no sums of blocks, no seal."""
  manifest = shards.read_manifest(directory)
  for split in manifest["tasks"]["en"]["splits"].values():
    for shard in split["shards"]:
      (directory / "en" / shard.pop("sums")["file"]).unlink()
  (directory / "manifest.json").write_text(json.dumps(manifest))


def read_all(cache: shards.TokenCache) -> list[list[int]]:
  """Everything, in each of the ways that there are."""
  readers = [cache.split("en", split) for split in ("train", "validation")]
  for reader in readers:
    reader.document_lengths()
    assert np.array_equal(
      reader.read(0, reader.num_tokens), np.concatenate([document.tokens for document in reader.documents()])
    )
  return [document.tokens.tolist() for reader in readers for document in reader.documents()]


@pytest.mark.parametrize("older", [False, True])
def test_a_flipped_token_is_never_read(tmp_path: pathlib.Path, older: bool) -> None:
  directory = tmp_path / "cache"
  build(directory, num_shards=2)
  if older:
    as_before(directory)
  expected = read_all(shards.TokenCache.open(directory))
  for path in directory.rglob("en/*"):
    good = path.read_bytes()
    for place in (0, len(good) // 2, len(good) - 1):
      path.write_bytes(flipped(good, place))
      with pytest.raises(errors.InputError, match="token cache is damaged: .*checksum.*--overwrite"):
        read_all(shards.TokenCache.open(directory))
    path.write_bytes(good)
  assert read_all(shards.TokenCache.open(directory)) == expected


def test_blocks_are_checked_where_they_are_read(tmp_path: pathlib.Path) -> None:
  documents = [shards.Document(np.arange(i, i + 500) % 1008, 5) for i in range(300)]
  with builder.CacheBuilder(tmp_path / "cache", plan(num_shards=1)) as making:
    for shard in making.missing():
      builder.write_shard(making.partial, shard, documents, 1008)
    cache = making.finish()
  path = tmp_path / "cache/en/train-00000-of-00001.tokens"
  assert path.stat().st_size == 300_000  # ten blocks, the last one short
  path.write_bytes(flipped(path.read_bytes(), 5 * verified.BLOCK))
  reader = shards.TokenCache.open(tmp_path / "cache").split("en", "train")
  stream = np.concatenate([document.tokens for document in documents])
  first = 5 * verified.BLOCK // 2
  for start, stop in ((0, first), (first + verified.BLOCK // 2, 150_000), (149_999, 150_000)):
    np.testing.assert_array_equal(reader.read(start, stop), stream[start:stop])
  for start, stop in ((first, first + 1), (0, 150_000), (first + verified.BLOCK // 2 - 1, first + verified.BLOCK)):
    with pytest.raises(errors.InputError, match="bytes 163840 to 196607 differ from their checksum"):
      reader.read(start, stop)
  assert cache.split("en", "validation").read(first, first + 3).tolist() == stream[first : first + 3].tolist()


def test_any_change_of_the_manifest_is_noticed(tmp_path: pathlib.Path) -> None:
  directory = tmp_path / "cache"
  build(directory, num_shards=1)
  path = directory / "manifest.json"
  good = path.read_bytes()
  rng = np.random.default_rng(0)
  for place in rng.integers(0, len(good), 300):
    path.write_bytes(flipped(good, place))
    try:
      changed = shards.read_manifest(directory)
    except errors.InputError as error:
      assert str(path) in str(error) and "\n" not in str(error)
    else:
      path.write_bytes(good)
      assert changed == shards.read_manifest(directory)  # a blank between


@pytest.mark.parametrize(
  "content",
  [
    "5",
    "[]",
    "{}",
    '{"format": 1}',
    '{"format": 1, "tasks": 5}',
    '{"format": null}',
    '{"format": 1, "dtype": "x", "tasks": {}, "tokenizer": {}}',
    "[" * 10_000,
  ],
)
def test_what_is_no_manifest_is_refused(tmp_path: pathlib.Path, content: str) -> None:
  (tmp_path / "manifest.json").write_text(content)
  with pytest.raises(errors.InputError) as caught:
    shards.TokenCache.open(tmp_path)
  assert "\n" not in str(caught.value)


def test_older_caches_whose_manifest_was_damaged(tmp_path: pathlib.Path) -> None:
  build(tmp_path / "cache")
  as_before(tmp_path / "cache")
  manifest = json.loads((tmp_path / "cache/manifest.json").read_bytes())
  for damage in (
    lambda m: m.pop("dtype"),
    lambda m: m["tasks"]["en"].pop("kind"),
    lambda m: m.update(tokenizer=[]),
    lambda m: m["tasks"]["en"]["splits"]["train"].update(tokens=5),
    lambda m: m["tasks"]["en"]["splits"]["train"]["shards"][0].update(files=None),
    lambda m: m["tasks"]["en"]["splits"]["train"]["shards"][0].update(documents="1"),
  ):
    changed = json.loads(json.dumps(manifest))
    damage(changed)
    (tmp_path / "cache/manifest.json").write_text(json.dumps(changed))
    with pytest.raises(errors.InputError, match="manifest.json: damaged, or changed by hand"):
      shards.TokenCache.open(tmp_path / "cache")


@pytest.mark.parametrize("older", [False, True])
def test_a_cache_that_is_replaced_under_its_reader(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
  """With few open files some are opened again: the new ones are found out, and never mixed with the old."""
  monkeypatch.setattr(verified, "_MOST_OPEN", 4)
  directory = tmp_path / "cache"
  build(directory, num_shards=8)
  if older:
    as_before(directory)
  reader = shards.TokenCache.open(directory).split("en", "train")
  expected = reader.read(0, reader.num_tokens)
  with builder.CacheBuilder(directory, plan(source="v2", num_shards=8), overwrite=True) as making:
    for shard in making.missing():
      others = [
        document._replace(tokens=(np.asarray(document.tokens) + 1) % 1008) for document in shard_documents(shard)
      ]
      builder.write_shard(making.partial, shard, others, 1008)
    making.finish()
  read = 0
  with pytest.raises(errors.InputError, match="cache: the token cache was replaced while it was being read .*again"):
    for read in range(reader.num_tokens):
      at = (read * 101) % (reader.num_tokens - 5)
      np.testing.assert_array_equal(reader.read(at, at + 5), expected[at : at + 5])
  assert shards.TokenCache.open(directory).split("en", "train").read(0, 5).tolist() == [
    (token + 1) % 1008 for token in expected[:5]
  ]


def test_few_file_handles_are_called_what_they_are(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  reader = build(tmp_path / "cache").split("en", "train")

  def refuse(*arguments: object) -> int:
    raise OSError(errno.EMFILE, "Too many open files", arguments[0])

  with monkeypatch.context() as patch:
    patch.setattr(verified.os, "open", refuse)
    with pytest.raises(errors.InputError, match="cannot read .*ulimit -n") as caught:
      reader.read(0, 5)
    assert "damaged" not in str(caught.value) and "overwrite" not in str(caught.value)
  reader.read(0, 5)


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("place", ["fifo", "folder"])
def test_other_things_in_a_files_place(tmp_path: pathlib.Path, place: str, when: str) -> None:
  directory = tmp_path / "cache"
  build(directory)
  cache = shards.TokenCache.open(directory)
  path = directory / "en/train-00001-of-00003.documents"
  path.unlink()
  os.mkfifo(path) if place == "fifo" else path.mkdir()
  with pytest.raises(errors.InputError, match="documents: no regular file"):
    shards.TokenCache.open(directory) if when == "before" else cache.split("en", "train").document_lengths()


def test_every_flipped_byte_is_found(tmp_path: pathlib.Path) -> None:
  directory = tmp_path / "cache"
  build(directory).verify()
  for path in directory.rglob("en/*"):
    good = path.read_bytes()
    path.write_bytes(flipped(good, 5))
    with pytest.raises(errors.InputError, match=re.escape(str(path))):
      shards.TokenCache.open(directory).verify()
    path.write_bytes(good)
  shards.TokenCache.open(directory).verify()


def test_truncated_and_missing_files_are_named_at_open(tmp_path: pathlib.Path) -> None:
  directory = tmp_path / "cache"
  build(directory)
  path = directory / "en/train-00001-of-00003.tokens"
  good = path.read_bytes()
  path.write_bytes(good[:-2])
  with pytest.raises(errors.InputError, match=f"{path}: {len(good) - 2} bytes, {len(good)} expected"):
    shards.TokenCache.open(directory)
  path.unlink()
  with pytest.raises(errors.InputError, match=f"{path}: missing"):
    shards.TokenCache.open(directory)
  with pytest.raises(errors.InputError, match="no finished token cache here"):
    shards.TokenCache.open(tmp_path / "nowhere")
  (directory / "manifest.json").write_text("{")
  with pytest.raises(errors.InputError, match="manifest.json: not JSON .*make the cache again"):
    shards.TokenCache.open(directory)


def test_file_truncated_while_open_is_named(tmp_path: pathlib.Path) -> None:
  reader = build(tmp_path / "cache").split("en", "train")
  (tmp_path / "cache/en/train-00000-of-00003.tokens").write_bytes(b"12")
  with pytest.raises(errors.InputError, match="train-00000-of-00003.tokens: ends too early"):
    reader.read(0, 20)


def test_unknown_task_and_split_are_named(tmp_path: pathlib.Path) -> None:
  cache = build(tmp_path / "cache")
  with pytest.raises(errors.InputError, match="no task 'fr'.*it has en"):
    cache.split("fr", "train")
  with pytest.raises(errors.InputError, match="no split 'test'; it has train, validation"):
    cache.split("en", "test")


def test_other_cache_is_refused_and_replaced_only_with_overwrite(tmp_path: pathlib.Path) -> None:
  directory = tmp_path / "cache"
  build(directory)
  before = contents(directory)
  with pytest.raises(errors.InputError, match="already a cache of mixture m .* not of mixture other"):
    build(directory, mixture="other")
  assert contents(directory) == before and not list(tmp_path.glob("*.partial"))
  with builder.CacheBuilder(directory, plan(mixture="other"), overwrite=True) as making:
    assert contents(directory) == before  # replaced at the end only
    for shard in making.missing():
      builder.write_shard(making.partial, shard, shard_documents(shard), 1008)
    assert contents(directory) == before
    assert making.finish().manifest["mixture"] == "other"
  assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_other_rates_need_no_new_tokens(tmp_path: pathlib.Path) -> None:
  build(tmp_path / "cache")
  with builder.CacheBuilder(tmp_path / "cache", plan(rate=0.25)) as making:
    assert making.finished and not making.missing()
    assert making.finish().tasks["en"]["rate"] == 0.25


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_that_is_no_cache_is_never_touched(tmp_path: pathlib.Path, overwrite: bool) -> None:
  for name in ("cache", "cache.partial"):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(errors.InputError, match="not a token cache|not ours"):
      build(tmp_path / "cache", overwrite=overwrite)
    assert (folder / "thesis.tex").exists()
    folder.rename(tmp_path / f"{name}.moved")


def test_two_processes_do_not_make_one_cache(tmp_path: pathlib.Path) -> None:
  with builder.CacheBuilder(tmp_path / "cache", plan()):
    with pytest.raises(errors.InputError, match="another process is making this cache"):
      build(tmp_path / "cache")
  build(tmp_path / "cache")


def test_unfinished_work_is_kept_when_good_and_redone_when_damaged(tmp_path: pathlib.Path) -> None:
  todo = builder.all_shards(plan())
  with builder.CacheBuilder(tmp_path / "cache", plan()) as making:
    for shard in todo[:3]:
      builder.write_shard(making.partial, shard, shard_documents(shard), 1008)
    damaged = making.partial / (todo[1].stem + ".tokens")
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    (making.partial / "en/.train-00000-of-00003.tokens.1.tmp").write_bytes(b"half")
  with pytest.raises(errors.InputError, match="an unfinished cache of mixture m .*not of mixture other"):
    build(tmp_path / "cache", mixture="other")
  with builder.CacheBuilder(tmp_path / "cache", plan()) as making:
    assert making.missing() == [todo[1], *todo[3:]]
  build(tmp_path / "cache")
  build(tmp_path / "unbroken")
  assert contents(tmp_path / "cache") == contents(tmp_path / "unbroken")


def test_unfinished_work_on_text_that_changed_since_is_dropped(tmp_path: pathlib.Path) -> None:
  with builder.CacheBuilder(tmp_path / "cache", plan()) as making:
    builder.write_shard(making.partial, making.missing()[0], [], 1008)
  changed = plan(source="v2")
  with builder.CacheBuilder(tmp_path / "cache", changed) as making:
    assert making.missing() == builder.all_shards(changed)


def test_folders_of_the_user_with_like_names_stay(tmp_path: pathlib.Path) -> None:
  build(tmp_path / "cache")
  (tmp_path / "cache").rename(tmp_path / "cache.old")
  before = contents(tmp_path / "cache.old")
  build(tmp_path / "cache", mixture="other")
  with builder.CacheBuilder(tmp_path / "cache", plan(), overwrite=True) as making:
    for shard in making.missing():
      builder.write_shard(making.partial, shard, shard_documents(shard), 1008)
    making.finish()
  assert contents(tmp_path / "cache.old") == before


@pytest.mark.parametrize("renamed", [False, True])
def test_death_between_manifest_and_swap_loses_nothing(tmp_path: pathlib.Path, renamed: bool) -> None:
  directory = tmp_path / "cache"
  build(directory)
  old = contents(directory)
  with builder.CacheBuilder(directory, plan(mixture="other"), overwrite=True) as making:
    for shard in making.missing():
      builder.write_shard(making.partial, shard, shard_documents(shard), 1008)
    making._swap = lambda: None
    with pytest.raises(AssertionError):
      assert making.finish().manifest["mixture"] == "other"
  if renamed:
    directory.rename(tmp_path / f".cache.{owner.host()}.999999999.old")
    with pytest.raises(errors.InputError, match="was being replaced when that was killed: rename .cache"):
      shards.TokenCache.open(directory)
    with pytest.raises(errors.InputError, match="already a cache of mixture m"):
      build(directory, mixture="other")
  assert contents(directory) == old
  with builder.CacheBuilder(directory, plan(mixture="other"), overwrite=True) as making:
    assert making.missing() == []
    assert making.finish().manifest["mixture"] == "other"
  assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_full_disk_is_one_line_and_harms_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")

  with builder.CacheBuilder(tmp_path / "cache", plan()) as making:
    todo = making.missing()
    builder.write_shard(making.partial, todo[0], shard_documents(todo[0]), 1008)
    with monkeypatch.context() as patch:
      patch.setattr(os, "fsync", full)
      with pytest.raises(errors.InputError, match="the disk is full") as caught:
        builder.write_shard(making.partial, todo[1], shard_documents(todo[1]), 1008)
      assert "\n" not in str(caught.value)
    assert not list(making.partial.rglob("*.tmp"))
    assert making.missing() == todo[1:]


def test_ids_outside_the_vocabulary_are_refused(tmp_path: pathlib.Path) -> None:
  shard = builder.all_shards(plan())[0]
  with builder.CacheBuilder(tmp_path / "cache", plan()) as making:
    for bad in (1008, -1):
      with pytest.raises(errors.InputError, match=f"token id {bad} is outside the vocabulary of 1008"):
        builder.write_shard(making.partial, shard, [shards.Document([5, bad])], 1008)


SLOW_BUILD = """
import sys, time
sys.path.insert(0, {tests!r})
import shards_test as t
with t.builder.CacheBuilder({directory!r}, t.plan(num_shards=8)) as making:
  for shard in making.missing():
    print(shard.stem, flush=True)
    def documents():
      for document in t.shard_documents(shard):
        time.sleep(0.002)
        yield document
    t.builder.write_shard(making.partial, shard, documents(), 1008)
  making.finish()
"""


def test_kill_9_then_rerun_gives_identical_bytes(tmp_path: pathlib.Path) -> None:
  script = SLOW_BUILD.format(tests=str(pathlib.Path(__file__).parent), directory=str(tmp_path / "cache"))
  for wait in (3, 6, 2):  # shards begun before the kill
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for _ in range(wait):
      process.stdout.readline()
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cache").exists()
  done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
  assert 1 <= len(done.stdout.split()) < 16  # some shards were kept
  build(tmp_path / "unbroken", num_shards=8)
  assert contents(tmp_path / "cache") == contents(tmp_path / "unbroken")
