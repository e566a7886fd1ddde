"""Tokenizing in groups gives what seqio's own preprocessors give document by document, to the byte of the shards."""

import json
import pathlib

import numpy as np
import pytest
import seqio

from glmjax import tokenizer as tokenizer_lib
from glmjax.data import file_tasks
from glmjax.data import mixtures
from glmjax.data import seqio_tasks
from glmjax.data import shards
from glmjax.data import splits
from glmjax.data import token_cache
from glmjax.data import tokenizing
from glmjax.tasks import pretrain
from glmjax.tokenizer import encoding

ODD = [
  "x",
  "第一天，小河边的柳树发芽了。" * 30,
  "[MASK] </s> <n> [gMASK]<sop>",
  "a\u2581b \U0010ff00 \U0010ff80",
  " leading,  two   three\t\ttabs \u3000",
  "👩‍👩‍👧 é\u0301 ｆｕｌｌ \u200b",
  "line\n\nline\r\n" * 90,
  "no newline at all " * 400,
  "1998" * 200,
]


def write_jsonl(path: pathlib.Path, records: list[dict]) -> str:
  path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
  return str(path)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, mixtures.Mixture]:
  """A folder with odd corpora and a tokenizer, and the mixture `odd` of them, which is registered with seqio too."""
  here = tmp_path_factory.mktemp("odd")
  many = [text for i in range(12) for text in (*ODD, f"On day {i} the quick brown fox jumps over {i * i} dogs.")]
  (here / "parts").mkdir()
  for i in range(9):  # more files than shards
    write_jsonl(here / "parts" / f"{i}.jsonl", [{"text": text} for text in many[i::9]])
  files = {
    "en": write_jsonl(here / "en.jsonl", [{"text": text} for text in ["", " \n", *many, ""]]),
    "parts": str(here / "parts"),
    "book": str(here / "book.txt"),  # cut into windows
  }
  (here / "book.txt").write_text("\n".join(many[:20]), "utf-8")
  pairs = [{"inputs": text, "targets": other} for text, other in zip(many, many[1:])]
  sets = {"pairs": write_jsonl(here / "pairs.jsonl", [{"inputs": "", "targets": "y"}, *pairs])}
  tokenizer_lib.train(many, here / "tokenizer", vocab_size=400)
  pretrain.register(files, here / "tokenizer", instructions=sets, max_examples=100, mixture="odd")
  return here, mixtures.pretraining(files, here / "tokenizer", instructions=sets, max_examples=100, name="odd")


@pytest.fixture(scope="module")
def folder(odd: tuple[pathlib.Path, mixtures.Mixture]) -> pathlib.Path:
  return odd[0]


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
  """The tasks as they were: seqio's own tokenize, and every document through TensorFlow."""
  for task in seqio.get_subtasks(seqio.MixtureRegistry.get("odd")):
    steps = [seqio.preprocessors.tokenize if step is seqio_tasks.tokenize else step for step in task.preprocessors]
    monkeypatch.setitem(task.__dict__, "preprocessors", steps)  # a cached property
  assert all(isinstance(task, seqio_tasks.SeqioTask) for task in seqio_tasks.mixture("odd").tasks)


def cache(
  folder: pathlib.Path, name: str, num_shards: int, mixture: str | mixtures.Mixture = "odd"
) -> dict[str, bytes]:
  token_cache.cache_mixture(mixture, folder / name, num_shards=num_shards, num_workers=0)
  shards.TokenCache.open(folder / name).verify()
  return {
    str(path.relative_to(folder / name)): path.read_bytes() for path in (folder / name).rglob("*") if path.is_file()
  }


@pytest.fixture(scope="module", params=[3, 7])
def direct(request: pytest.FixtureRequest, odd: tuple[pathlib.Path, mixtures.Mixture]) -> tuple[int, dict[str, bytes]]:
  """A number of shards, and the files of the cache of the text files that has it."""
  folder, mixture = odd
  return request.param, cache(folder, f"direct{request.param}", request.param, mixture)


def test_what_is_registered_is_cached_as_files(folder, direct):
  """By its name in seqio: without TensorFlow, and with the same bytes."""
  num_shards, found = direct
  assert all(isinstance(task, file_tasks.FileTask) for task in seqio_tasks.mixture("odd").tasks)
  assert cache(folder, f"named{num_shards}", num_shards) == found


def test_shards_are_those_of_document_by_document(folder, direct, one_by_one):
  num_shards, found = direct
  assert cache(folder, f"one-by-one{num_shards}", num_shards) == found


def test_groups_and_chunks_do_not_show(odd, direct, monkeypatch):
  (folder, mixture), (num_shards, found) = odd, direct
  monkeypatch.setattr(tokenizing, "_GROUP_CHARACTERS", 50)
  monkeypatch.setattr(encoding, "_CHUNK", 1000)
  monkeypatch.setattr(token_cache, "_READ_TOGETHER", 2)
  monkeypatch.setattr(encoding, "_TOGETHER", 100)
  assert cache(folder, f"small{num_shards}", num_shards, mixture) == found


def test_a_cache_of_before_is_known_as_the_same(folder, direct, one_by_one):
  """Its plan names the steps: `glmjax cache` finds its work done, and does not refuse the folder."""
  num_shards, found = direct
  assert cache(folder, f"direct{num_shards}", num_shards) == found


@pytest.mark.parametrize("split", splits.SPLITS)
def test_the_preprocessor_gives_seqios_examples(folder, split):
  for task in seqio.get_subtasks(seqio.MixtureRegistry.get("odd")):
    dataset = task.source.get_dataset(split, shuffle=False)
    expected = seqio.preprocessors.tokenize(dataset, task.output_features).as_numpy_iterator()
    found = seqio_tasks.tokenize(dataset, task.output_features).as_numpy_iterator()
    for ours, theirs in zip(found, expected, strict=True):
      assert ours.keys() == theirs.keys()
      for name, value in ours.items():
        assert np.array_equal(value, theirs[name]) and getattr(value, "dtype", "") == getattr(theirs[name], "dtype", "")


def test_groups_are_bounded_and_leave_nothing_out():
  examples = [("x" * n, "y") for n in (1, 5, tokenizing._GROUP_CHARACTERS * 2, 3, 4)] * 3
  groups = list(tokenizing.groups(examples))
  assert [example for group in groups for example in group] == examples
  for group in groups:
    assert len(group) == 1 or sum(len(a) + len(b) for a, b in group) <= tokenizing._GROUP_CHARACTERS
  assert len(groups) == 7
