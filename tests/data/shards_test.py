"""The token cache on disk: what is written is read back, and what is damaged is named."""

import dataclasses
import errno
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

SPECIALS = tokens.icetk(0, 1000)


def plan(mixture: str = "m", source: str = "v1", rate: float = 1.0, vocab_size: int = 1008,
         num_shards: int = 3) -> dict:
  tokenizer = {"fingerprint": "f" * 64, "vocab_size": vocab_size, "specials": dataclasses.asdict(SPECIALS)}
  splits = {"train": {"source": source}, "validation": {"source": source}}
  tasks = {"en": {"kind": "text", "rate": rate, "splits": splits}}
  return builder.make_plan(mixture, num_shards, tokenizer, tasks)


def shard_documents(shard: builder.Shard, vocab_size: int = 1008) -> list[shards.Document]:
  rng = np.random.default_rng([shard.index, len(shard.split)])
  return [shards.Document(rng.integers(0, vocab_size, rng.integers(0, 60)), int(rng.integers(100)))
          for _ in range(20)]


def build(directory: pathlib.Path, overwrite: bool = False, tokenizer: pathlib.Path | None = None,
          **kwargs: str | float) -> shards.TokenCache:
  with builder.CacheBuilder(directory, plan(**kwargs), overwrite) as making:
    for shard in making.missing():
      vocab_size = making.plan["tokenizer"]["vocab_size"]
      builder.write_shard(making.partial, shard, shard_documents(shard, vocab_size), vocab_size)
    return making.finish(tokenizer)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("vocab_size,dtype", [
    (1008, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (150_528, "<u4")])
def test_tokens_and_documents_read_back(tmp_path: pathlib.Path, vocab_size: int, dtype: str) -> None:
  cache = build(tmp_path / "cache", vocab_size=vocab_size)
  assert cache.manifest["dtype"] == dtype and cache.specials == SPECIALS and cache.vocab_size == vocab_size
  written = [document for shard in builder.all_shards(plan(vocab_size=vocab_size)) if shard.split == "train"
             for document in shard_documents(shard, vocab_size)]
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


def test_every_flipped_byte_is_found(tmp_path: pathlib.Path) -> None:
  directory = tmp_path / "cache"
  build(directory).verify()
  for path in directory.rglob("en/*"):
    good = path.read_bytes()
    path.write_bytes(good[:10] + bytes([good[10] ^ 1]) + good[11:])
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
  with pytest.raises(errors.InputError, match="damaged"):
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
    directory.rename(tmp_path / ".cache.replaced")
    with pytest.raises(errors.InputError, match="already a cache of mixture m"):
      build(directory, mixture="other")
  assert contents(directory) == old
  with builder.CacheBuilder(directory, plan(mixture="other"), overwrite=True) as making:
    assert making.missing() == []
    assert making.finish().manifest["mixture"] == "other"
  assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_full_disk_is_one_line_and_harms_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
  with builder.CacheBuilder(tmp_path / "cache", plan()) as making:
    todo = making.missing()
    builder.write_shard(making.partial, todo[0], shard_documents(todo[0]), 1008)
    with monkeypatch.context() as patch:
      patch.setattr(shards.os, "fsync", full)
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
