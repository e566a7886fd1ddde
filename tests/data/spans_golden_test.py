"""Blank infilling against what the original collators built (tests/golden/README.md)."""

import dataclasses
import functools
import json
import os
import pathlib
import random

import numpy as np
import pytest

from glmjax import tokens as tokens_lib
from glmjax.data import glm10b, rows, spans

GOLDEN = pathlib.Path(os.environ.get("GLMJAX_GOLDEN_DIR") or pathlib.Path(__file__).parents[1] / "golden")


@functools.cache
def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
  with np.load(GOLDEN / f"{name}.npz") as arrays:
    return json.loads((GOLDEN / f"{name}.json").read_text()), dict(arrays)


def case(name: str, prefix: str) -> dict[str, np.ndarray]:
  arrays = load(name)[1]
  return {key[len(prefix) + 1 :]: value for key, value in arrays.items() if key.startswith(prefix + "/")}


def pretraining_cases(kind: str) -> list[str]:
  return [name for name in load("pretraining_samples")[0]["cases"] if name.startswith(kind + "/")]


def make_specials(ids: dict[str, int]) -> tokens_lib.SpecialTokens:
  """Special tokens of a golden file; those that it has not are ids that occur nowhere."""
  names = {name.lower(): token for name, token in ids.items()}
  fields = dataclasses.fields(tokens_lib.SpecialTokens)
  return tokens_lib.SpecialTokens(**{f.name: names.get(f.name, -1 - i) for i, f in enumerate(fields)})


def pretraining_specials() -> tokens_lib.SpecialTokens:
  return dataclasses.replace(make_specials(load("pretraining_samples")[0]["special_ids"]), pad=0)


def check_row(row: rows.Row, expected: dict[str, np.ndarray], positions: np.ndarray, contexts: list[int]) -> None:
  """Equal features; positions and intervals are compared where there is a sample, contexts are per sample."""
  np.testing.assert_array_equal(row["tokens"], expected["tokens"])
  np.testing.assert_array_equal(row["targets"], expected["targets"])
  np.testing.assert_array_equal(row["loss_weights"], expected["loss_mask"])
  slot = len(row["tokens"]) // len(contexts)
  for i, context_length in enumerate(contexts):
    start = i * slot
    end = start + int(np.flatnonzero(expected["loss_mask"][start : start + slot])[-1]) + 1
    np.testing.assert_array_equal(row["positions"][..., start:end], positions[..., start:end])
    np.testing.assert_array_equal(row["attend_start"][start:end], start)
    ends = np.maximum(np.arange(start, end) + 1, start + context_length)
    np.testing.assert_array_equal(row["attend_end"][start:end], ends)
    padding = np.arange(end, start + slot)
    np.testing.assert_array_equal(row["attend_start"][padding], padding)
    np.testing.assert_array_equal(row["attend_end"][padding], padding + 1)


@pytest.mark.parametrize("name", pretraining_cases("mask"))
def test_mask_sample(name: str) -> None:
  expected, specials = case("pretraining_samples", name), pretraining_specials()
  sample = spans.corrupt(expected["input_ids"], expected["spans_in_target_order"], specials.mask, specials)
  np.testing.assert_array_equal(sample.tokens, expected["tokens"])
  np.testing.assert_array_equal(sample.targets, expected["targets"])
  np.testing.assert_array_equal([sample.positions, sample.block_positions], expected["positions_2d"])
  assert sample.context_length == expected["context_length"][0]
  for kind, positions in (("rotary", expected["positions_2d"][0]), ("learned_2d", expected["positions_2d"])):
    config = rows.BlankInfilling(len(sample.tokens), specials, positions=kind, samples_per_sequence=1)
    check_row(config.pack([sample], tokens_lib.OBJECTIVE_MASK), expected, positions, [sample.context_length])


@pytest.mark.parametrize("name", pretraining_cases("gmask") + pretraining_cases("gmask2d"))
def test_gmask_row(name: str) -> None:
  expected, specials = case("pretraining_samples", name), pretraining_specials()
  context_length = int(expected["context_length"][0])
  sample = spans.corrupt_suffix(expected["input_ids"], context_length - 1, specials.gmask, specials)
  kind, positions = "rotary", expected.get("positions")
  if positions is None:
    kind, positions = "rotary_2d", expected["positions_2d"]
  config = rows.BlankInfilling(len(expected["tokens"]), specials, positions=kind)
  check_row(config.pack([sample], tokens_lib.OBJECTIVE_GMASK), expected, positions, [context_length])


def spans_of_slot(text: np.ndarray, context: np.ndarray, target_positions: np.ndarray, mask: int) -> np.ndarray:
  """Spans in target order, found from a corrupted sample; those cut off come last, in text order."""
  index_in_text = {int(token): i for i, token in enumerate(text)}
  assert len(index_in_text) == len(text)
  found, at = {}, 0  # by the mask's index in the context
  for i, token in enumerate([*context, None]):
    if token == mask:
      found[i] = at
    elif i in range(1, len(context) + 1) and context[i - 1] == mask:
      end = len(text) if token is None else index_in_text[int(token)]
      found[i - 1] = (found[i - 1], end)
    if token is not None and token != mask:
      at = index_in_text[int(token)] + 1
  order = list(dict.fromkeys(int(p) for p in target_positions))
  return np.array([found[p] for p in [*order, *(p for p in found if p not in order)]])


@pytest.mark.parametrize("name", pretraining_cases("packed_mask"))
def test_packed_mask_row(name: str) -> None:
  expected, specials = case("pretraining_samples", name), pretraining_specials()
  contexts = expected["context_lengths"].tolist()
  config = rows.BlankInfilling(
    len(expected["tokens"]), specials, samples_per_sequence=len(contexts), truncate_targets=True
  )
  assert config.window_length == len(expected["input_ids"])
  samples = []
  for i, text in enumerate(np.split(expected["input_ids"], len(contexts))):
    start, context_end = i * config.slot_length, i * config.slot_length + contexts[i]
    inside = np.flatnonzero(expected["loss_mask"][start : start + config.slot_length]) + start
    context = expected["tokens"][start:context_end]
    last = context[-1]  # the text's last token is this, or the last that it hides, unless that was cut off
    if last == specials.mask:
      hidden = expected["targets"][inside[expected["positions"][inside] == len(context) - 1]]
      last = hidden[-2] if len(hidden) and hidden[-1] == specials.eop else text[-1]
    text = text[: int(np.flatnonzero(text == last)[0]) + 1]  # shorter where a short sequence was drawn
    drawn = spans_of_slot(text, context, expected["positions"][inside], specials.mask)
    sample = spans.corrupt(text, drawn, specials.mask, specials)
    samples.append(spans.truncate(sample, config.slot_length))
  row = config.pack(samples, tokens_lib.OBJECTIVE_MASK)
  check_row(row, expected, expected["positions"], contexts)


@pytest.mark.parametrize("name", pretraining_cases("mip_plain") + pretraining_cases("mip_unified"))
def test_instruction_sample(name: str) -> None:
  expected, specials = case("pretraining_samples", name), pretraining_specials()
  kind = "unified" if name.startswith("mip_unified") else "running"
  config = rows.BlankInfilling(len(expected["tokens"]), specials, samples_per_sequence=1, instruction_positions=kind)
  row = config.instruction_row([(expected["text"], expected["target"])])
  check_row(row, expected, expected["positions"], expected["context_length"].tolist())
  greedy = dataclasses.replace(config, packing="greedy")
  assert greedy.instruction_length(len(expected["text"]), len(expected["target"])) == (
    expected["context_length"][0] + expected["loss_mask"].sum()
  )


def test_span_lengths_are_those_of_both_originals() -> None:
  for pmf in (
    load("pretraining_samples")[0]["statistics"]["block_length_pmf"],
    load("glm_blank_infilling")[1]["stats/span_length_prob_exact"][1:],
  ):
    ours = spans.span_length_pmf()[: len(pmf)]
    np.testing.assert_allclose(ours / ours.sum(), np.array(pmf) / np.sum(pmf), atol=1e-12)


def check_statistics(ours: np.ndarray, golden: dict[str, float], n_golden: int) -> None:
  """Means and quantiles within five standard errors of each other."""
  n, total = len(ours), 1 / len(ours) + 1 / n_golden
  error = np.hypot(ours.std() / n**0.5, golden["std"] / n_golden**0.5)
  assert abs(ours.mean() - golden["mean"]) < 5 * error, (ours.mean(), golden["mean"], error)
  np.testing.assert_allclose(ours.std(), golden["std"], rtol=0.15)
  for name, quantile in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
    error = (quantile * (1 - quantile) * total) ** 0.5
    assert np.mean(ours < golden[name]) < quantile + 5 * error, name
    assert np.mean(ours <= golden[name]) > quantile - 5 * error, name


def test_statistics_of_the_mask_rows_as_trained() -> None:
  statistics, specials = load("pretraining_samples")[0]["statistics"], pretraining_specials()
  config = rows.BlankInfilling(2048, specials, gmask_rate=0, truncate_targets=True)
  window = np.arange(1, config.window_length + 1)
  count, masked, context = [], [], []
  for index in range(1500):
    row = config.text_row(window, seed=0, index=index)
    for slot in range(0, 2048, 512):
      here = {name: value[slot : slot + 512] for name, value in row.items()}
      weighted = here["loss_weights"] > 0
      context.append(here["attend_end"][0] - slot)
      count.append(np.count_nonzero(here["tokens"] == specials.mask))
      masked.append(np.count_nonzero(weighted))
  count, masked, context = map(np.array, (count, masked, context))
  check_statistics(count, statistics["mask_spans_per_500_token_sample"], statistics["n"])
  check_statistics(context, statistics["context_length"], statistics["n"])
  # The file counts every loss place but one for each span, also for spans cut off.
  check_statistics(masked - count, statistics["masked_tokens_per_500_token_sample"], statistics["n"])


def test_statistics_of_the_gmask_rows() -> None:
  statistics, specials = load("pretraining_samples")[0]["statistics"], pretraining_specials()
  config = rows.BlankInfilling(2048, specials, gmask_rate=1, truncate_targets=True)
  window = np.arange(1, config.window_length + 1)
  gmask_rows = (config.text_row(window, seed=0, index=index) for index in range(5000))
  lengths = np.array([np.count_nonzero(row["loss_weights"]) for row in gmask_rows])
  assert lengths.min() >= 400 and lengths.max() <= 2000
  check_statistics(lengths, statistics["gmask_target_length_of_2000"], statistics["n"])


# GLM-10B


def glm10b_specials() -> tokens_lib.SpecialTokens:
  ids = load("glm_blank_infilling")[0]["special_tokens"]
  return make_specials({**ids, "eod": ids["eos"], "pad": 0})


@pytest.mark.parametrize("i", range(len(load("glm_blank_infilling")[0]["core"])))
def test_glm10b_sample(i: int) -> None:
  info, expected = load("glm_blank_infilling")[0]["core"][i], case("glm_blank_infilling", f"core/{i}")
  specials = glm10b_specials()
  mask = getattr(specials, info["mask_token"].lower())
  sample = spans.corrupt(expected["text"], expected["order"], mask, specials)
  np.testing.assert_array_equal(sample.tokens, expected["tokens"])
  np.testing.assert_array_equal(sample.targets, expected["targets"])
  np.testing.assert_array_equal(sample.block_positions > 0, expected["loss_masks"])
  np.testing.assert_array_equal([sample.positions, sample.block_positions], expected["position_ids"])
  assert sample.context_length == expected["sep"]


@pytest.mark.parametrize("info", load("glm_blank_infilling")[0]["sample_spans"])
def test_placing_spans(info: dict) -> None:
  rng = random.Random(info["random_seed"])

  def draw(high, k):
    return [rng.randrange(high) for _ in range(k)]

  placed = spans.sample_spans(info["span_lengths"], info["total_length"], draw, info["offset"])
  np.testing.assert_array_equal(placed, info["spans"])


def make_strategy(args: dict, seq_length: int, vocab_size: int) -> glm10b.BlockStrategy:
  """The strategy with the original's arguments and that code's own defaults."""
  mask_rate = args.get("bert_prob", 1.0)
  return glm10b.BlockStrategy(
    seq_length,
    glm10b_specials(),
    sentence_ends=tuple(t for t in range(vocab_size - 1) if t % 13 == 0),
    mask_rate=mask_rate,
    sentence_rate=args.get("gap_sentence_prob", 0.0),
    infill_rate=args.get("gpt_infill_prob", 0.5),
    gmask_min_ratio=args.get("gpt_min_ratio", 0.5),
    mask_ratio=args.get("bert_ratio", 0.15),
    sentence_ratio=args.get("gap_sentence_ratio", 0.15),
    mean_span_length=args.get("average_block_length", 3),
    max_span_length=args.get("max_block_length", 40) - 1,
    dblock_rate=args.get("block_mask_prob", 0.0),
    short_sequence_rate=args.get("short_seq_prob", 0.0),
    single_span_rate=args.get("single_span_prob", 0.0),
    shuffle_spans=args.get("shuffle_blocks", True),
    task_masks=args.get("task_mask", False),
  )


MODES = {"bert": "mask", "sentence": "sentence", "gpt": "gmask"}


@pytest.mark.parametrize("mode", load("glm_blank_infilling")[0]["construct"])
def test_glm10b_batches(mode: str) -> None:
  info = load("glm_blank_infilling")[0]
  strategy = make_strategy(info["construct"][mode]["args"], info["max_seq_length"], info["V"])
  for i, call in enumerate(info["construct"][mode]["calls"]):
    expected = case("glm_blank_infilling", f"construct/{mode}/call{i}")
    texts = []
    while f"in{len(texts)}_text" in expected:
      texts.append(glm10b.Text(expected[f"in{len(texts)}_text"], expected[f"in{len(texts)}_loss_mask"]))
    objective, built = strategy.construct(
      texts, random.Random(call["rng_seed"]), random.Random(call["global_random_seed"])
    )
    assert tokens_lib.OBJECTIVES[objective] == MODES[call["mode"]]
    assert len(built) == len(expected["out_text"])
    for j, (sample, weights) in enumerate(built):
      n = len(sample.tokens)
      for name, ours in (
        ("text", sample.tokens),
        ("target", sample.targets),
        ("loss_mask", weights),
        ("position_id", np.stack([sample.positions, sample.block_positions])),
      ):
        np.testing.assert_array_equal(ours, expected[f"out_{name}"][j][..., :n])
        assert not expected[f"out_{name}"][j][..., n:].any()
      assert sample.context_length == expected["out_attention_mask"][j]


def test_glm10b_statistics() -> None:
  info, arrays = load("glm_blank_infilling")
  length, specials = info["max_seq_length"], glm10b_specials()
  rng, n = random.Random(0), 2000
  text = glm10b.Text(np.append(specials.enc, np.arange(1, length)), np.ones(length, np.float32))

  def build(args: dict) -> list[spans.Sample]:
    strategy, built = make_strategy(args, length, info["V"]), []
    while len(built) < n:
      built += [b.sample for b in strategy.construct([text], rng, rng)[1]]
    return built

  mask_samples = build({})
  ends = [np.flatnonzero(s.targets == specials.eop) for s in mask_samples]
  lengths = [end - np.flatnonzero(s.block_positions == 1) for end, s in zip(ends, mask_samples)]
  gmask_samples = build({"bert_prob": 0.0, "gpt_infill_prob": 1.0, "gpt_min_ratio": 0.25})
  blanks = [len(s.tokens) - s.context_length for s in gmask_samples]
  for ours, golden in (
    ([len(of_sample) for of_sample in lengths], arrays["stats/span_count"]),
    ([of_sample.sum() for of_sample in lengths], arrays["stats/masked_tokens"]),
    (blanks, arrays["stats/gmask_generation_length"]),
  ):
    error = np.hypot(np.std(ours) / len(ours) ** 0.5, np.std(golden) / len(golden) ** 0.5)
    assert abs(np.mean(ours) - np.mean(golden)) < 5 * error
  shortest, longest = info["stats"]["gmask_length_range"]
  assert shortest <= min(blanks) and max(blanks) <= longest

  golden = arrays["stats/span_length_hist"]
  n_ours, n_golden = sum(map(len, lengths)), golden.sum()
  ours = np.bincount(np.concatenate(lengths), minlength=len(golden)) / n_ours
  np.testing.assert_allclose(ours, golden / n_golden, atol=5 * (0.25 / n_ours + 0.25 / n_golden) ** 0.5)


def test_separator_is_the_interval() -> None:
  arrays, specials = load("glm_blank_infilling")[1], glm10b_specials()
  for separator, mask in zip(arrays["sep_mask/sep"], arrays["sep_mask/mask"]):
    n = len(mask)
    sample = spans.corrupt_suffix(np.arange(1, n), int(separator) - 1, specials.gmask, specials)
    config = rows.BlankInfilling(max(n, 16), specials, samples_per_sequence=1)
    row = config.pack([sample], tokens_lib.OBJECTIVE_GMASK)
    keys = np.arange(n)
    ours = (keys >= row["attend_start"][:n, None]) & (keys < row["attend_end"][:n, None])
    np.testing.assert_array_equal(ours, mask)
