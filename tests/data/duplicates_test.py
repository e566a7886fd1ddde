"""Exact and near duplicates, against the exact similarities of all pairs."""

import functools
import random

import numpy as np
import pytest

from glmjax.data import duplicates, units

CHINESE = [chr(code) for code in range(0x4E00, 0x4E00 + 500)]


def document(rng: random.Random, language: str, size: int) -> list[str]:
  return [rng.choice(CHINESE) if language == "zh" else f"word{rng.randrange(500)}" for _ in range(size)]


def text(words: list[str], language: str) -> str:
  return ("" if language == "zh" else " ").join(words)


def changed(rng: random.Random, words: list[str], edits: int, language: str) -> list[str]:
  words = list(words)
  for _ in range(edits):
    words[rng.randrange(len(words))] = document(rng, language, 1)[0]
  return words


@functools.cache
def shingles(each: str) -> frozenset[int]:
  return frozenset(units.grams(units.units(each), duplicates.SHINGLE).tolist())


def jaccard(a: str, b: str) -> float:
  common = len(shingles(a) & shingles(b))
  return common / (len(shingles(a)) + len(shingles(b)) - common)


def signatures(texts: list[str]) -> np.ndarray:
  return np.stack([duplicates.sketch(each).signature() for each in texts])


def test_exact_is_the_first_of_the_same_units():
  texts = ["One, two.", "three", "one TWO", "", "三", "One two", "...", "三。", "two one"]
  fingerprints = np.array([duplicates.sketch(each).fingerprint() for each in texts], np.uint64)
  assert duplicates.exact(fingerprints).tolist() == [-1, -1, 0, -1, -1, 0, -1, 4, -1]
  assert duplicates.exact(np.zeros(0, np.uint64)).tolist() == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_near_finds_what_comparing_all_pairs_finds(language):
  """Of the pairs well above the threshold all are found, and nothing well below it."""
  rng = random.Random(7)
  texts = []
  for size in (40, 120, 300):
    for _ in range(25):
      words = document(rng, language, size)
      texts.append(text(words, language))
      texts += [text(changed(rng, words, edits, language), language) for edits in (1, 1 + rng.randrange(size // 20))]
  rng.shuffle(texts)
  found, alike = duplicates.near(signatures(texts))
  best = [max((jaccard(each, before) for before in texts[:i]), default=0.0) for i, each in enumerate(texts)]
  sure = [i for i, similarity in enumerate(best) if similarity >= 0.9]
  assert len(sure) >= 15 and all(found[i] >= 0 for i in sure)
  within = [i for i, similarity in enumerate(best) if similarity >= duplicates.THRESHOLD]
  assert np.mean(found[within] >= 0) > 0.9  # recall
  for i in np.flatnonzero(found >= 0):  # precision, to within four standard errors
    assert found[i] < i and jaccard(texts[i], texts[found[i]]) > 0.65
    assert abs(alike[i] - jaccard(texts[i], texts[found[i]])) < 0.16


def test_estimates_are_unbiased_with_the_error_that_is_stated():
  rng = random.Random(3)
  exact, estimated = [], []
  for _ in range(150):
    words = document(rng, "en", 200)
    pair = [text(words, "en"), text(changed(rng, words, 4, "en"), "en")]
    exact.append(jaccard(*pair))
    estimated.append(float(duplicates.similarities(signatures(pair), np.array([0]), np.array([1]))[0]))
  errors = np.array(estimated) - np.array(exact)
  assert abs(errors.mean()) < 0.012 and 0.02 < errors.std() < 0.05


def test_a_bucket_of_unlike_documents_finds_the_like_ones(monkeypatch):
  """All fall into one bucket; each pair within is found all the same, up to the number of rounds."""
  monkeypatch.setattr(duplicates, "_keys", lambda signatures, band: np.zeros(len(signatures), np.uint64))
  rng = random.Random(1)
  words = [document(rng, "en", 100) for _ in range(5)]
  texts = [text(each, "en") for each in words] + [text(changed(rng, each, 1, "en"), "en") for each in words]
  found, _ = duplicates.near(signatures(texts))
  assert found.tolist() == [-1] * 5 + list(range(5))


def test_short_documents_are_near_to_the_same_alone():
  found, alike = duplicates.near(signatures(["很好", "不错", "很好！", "很 好"]))
  assert found.tolist() == [-1, -1, 0, 0] and alike[2:].tolist() == [1, 1]
  assert duplicates.near(np.zeros((0, duplicates.BYTES // 4), np.uint32))[0].tolist() == []


def test_documents_without_units_equal_no_other():
  found, alike = duplicates.near(signatures(["!!!", "one two", "???", "", "!!!", "One two."]))
  assert found.tolist() == [-1, -1, -1, -1, -1, 1] and alike.tolist() == [0, 0, 0, 0, 0, 1]


def test_a_long_document_is_sketched_as_in_one_block(monkeypatch):
  words = text(document(random.Random(5), "en", 3000), "en")
  whole = duplicates.sketch(words)
  monkeypatch.setattr(units, "BLOCK", 5000)
  pieces = duplicates.sketch(words)
  assert pieces.fingerprint() == whole.fingerprint() and (pieces.signature() == whole.signature()).all()


def test_growing_keeps_its_rows():
  grown = duplicates.Growing(np.int64, 2)
  for i in range(5000):
    grown.append(np.array([i, -i]))
  assert len(grown) == 5000 and (grown.array() == np.stack([np.arange(5000), -np.arange(5000)], 1)).all()
