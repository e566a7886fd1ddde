"""Rows: every sample whole, alone, and reproducible."""

import dataclasses
import math
import re

import numpy as np
import pytest

from glmjax import errors
from glmjax import positions
from glmjax import tokens as tokens_lib
from glmjax.data import glm10b, rows, spans

SPECIALS = tokens_lib.icetk()
FIRST_TOKEN = 20_100
DTYPES = {
  "tokens": np.int32,
  "targets": np.int32,
  "loss_weights": np.float32,
  "positions": np.int32,
  "attend_start": np.int32,
  "attend_end": np.int32,
  "objective": np.int32,
}


def make_window(config: rows.BlankInfilling | glm10b.BlockStrategy) -> np.ndarray:
  return np.arange(FIRST_TOKEN, FIRST_TOKEN + config.window_length, dtype=np.int32)


def split_samples(row: rows.Row) -> list[tuple[int, int, int]]:
  """(start, end of context, end) of each sample; checks that intervals keep to their sample."""
  places = np.arange(len(row["tokens"]))
  starts, ends = row["attend_start"], row["attend_end"]
  padding = (starts == places) & (ends == places + 1) & (np.bincount(starts, minlength=len(places)) == 1)
  assert not row["loss_weights"][padding].any()
  found = []
  for start in np.unique(starts[~padding]):
    inside = np.flatnonzero((starts == start) & ~padding)
    end = int(inside[-1]) + 1
    assert inside.tolist() == list(range(start, end)), "a sample's places lie together"
    context_end = int(ends[start])
    assert (ends[start:end] == np.maximum(places[start:end] + 1, context_end)).all()
    assert (row["loss_weights"][start:context_end] == 0).all()
    found.append((int(start), context_end, end))
  assert (row["targets"][padding] == row["tokens"][padding]).all()
  return found


def restore_text(row: rows.Row, start: int, context_end: int, end: int, eop: int) -> list[int]:
  """The text of a sample: each mask of the context replaced by what is to be predicted for it."""
  blanks: dict[int, list[int]] = {}
  positions = row["positions"] if row["positions"].ndim == 1 else row["positions"][0]
  for i in range(context_end, end):
    blanks.setdefault(int(positions[i]), []).append(int(row["targets"][i]))
  text = []
  for i in range(start, context_end):
    blank = blanks.pop(i - start, None)
    if blank is None:
      text.append(int(row["tokens"][i]))
    else:
      text += blank[:-1] if blank[-1] == eop else blank
  assert not blanks, "targets without a mask"
  return text


@pytest.mark.parametrize("length,samples,draws", [(128, 1, 2000), (128, 4, 800), (512, 4, 800), (2048, 4, 400)])
@pytest.mark.parametrize("packing", rows.PACKINGS)
def test_no_target_is_lost(length: int, samples: int, draws: int, packing: str) -> None:
  config = rows.BlankInfilling(
    length,
    SPECIALS,
    samples_per_sequence=samples,
    packing=packing,
    gmask_rate=0,
    short_sequence_rate=0.1,
    single_span_rate=0.1,
  )
  window = make_window(config)
  for index in range(draws):
    row = config.text_row(window, 1, index)
    assert {name: value.dtype for name, value in row.items()} == DTYPES
    found = split_samples(row)
    assert len(found) == samples if packing == "fixed" else len(found) >= samples
    text = []
    for start, context_end, end in found:
      of_sample = restore_text(row, start, context_end, end, SPECIALS.eop)
      text += of_sample
      masks = np.flatnonzero(row["tokens"][start:context_end] == SPECIALS.mask)
      assert (np.diff(masks) >= 2).all(), "a token between two spans"
      weighted = np.count_nonzero(row["loss_weights"][start:end])
      assert weighted == end - context_end == len(of_sample) - (context_end - start) + 2 * len(masks)
      assert weighted - len(masks) >= int(0.15 * len(of_sample)) or len(masks) == 1
    first = text[0] - FIRST_TOKEN
    assert first >= 0 and text == window[first : first + len(text)].tolist(), "one piece of the window"


@pytest.mark.parametrize("length,samples", [(128, 1), (512, 4), (2048, 4)])
def test_mask_rows_are_full(length: int, samples: int) -> None:
  config = rows.BlankInfilling(length, SPECIALS, samples_per_sequence=samples, gmask_rate=0, short_sequence_rate=0)
  used = [split_samples(config.text_row(make_window(config), 0, index)) for index in range(200)]
  assert np.mean([sum(end - start for start, _, end in row) for row in used]) > 0.98 * length


@pytest.mark.parametrize("length", [16, 128, 2048])
@pytest.mark.parametrize("kind", positions.KINDS)
def test_gmask_rows(length: int, kind: str) -> None:
  config = rows.BlankInfilling(length, SPECIALS, positions=kind, samples_per_sequence=1, gmask_rate=1)
  window = make_window(config)
  for index in range(50):
    row = config.text_row(window, 3, index)
    ((start, context_end, end),) = split_samples(row)
    assert (start, end) == (0, length), "no padding"
    assert row["tokens"][context_end - 1] == SPECIALS.gmask and row["tokens"][context_end] == SPECIALS.sop
    predicted = row["targets"][context_end:]
    assert [*row["tokens"][: context_end - 1], *predicted] == window.tolist()
    assert int(0.2 * len(window)) <= len(predicted) <= len(window)
    if kind == "rotary":
      assert row["positions"].tolist() == list(range(length))
    else:
      assert (row["positions"][0] == np.minimum(np.arange(length), context_end - 1)).all()
      assert (row["positions"][1] == np.maximum(np.arange(length) - context_end + 1, 0)).all()


def test_short_windows_leave_padding() -> None:
  config = rows.BlankInfilling(128, SPECIALS, samples_per_sequence=2)
  for n in (2, 3, 10, 70, config.window_length):
    for index in range(100):
      row = config.text_row(make_window(config)[:n], 0, index)
      shown = sum(
        len(restore_text(row, *of_sample, SPECIALS.eop))
        for of_sample in split_samples(row)
        if row["objective"][0] == tokens_lib.OBJECTIVE_MASK
      )
      assert shown <= n and np.isin(row["tokens"][row["loss_weights"] > 0], SPECIALS.pad).sum() == 0


def test_rows_depend_on_seed_and_index_alone() -> None:
  config = rows.BlankInfilling(128, SPECIALS)
  window = make_window(config)
  first = [config.text_row(window, 5, index) for index in range(20)]
  again = [dataclasses.replace(config).text_row(window, 5, index) for index in reversed(range(20))][::-1]
  other = [config.text_row(window, 6, index) for index in range(20)]
  for a, b, c in zip(first, again, other):
    assert all((a[name] == b[name]).all() for name in a)
    assert any((a[name] != c[name]).any() for name in a)


def test_objectives_are_mixed_at_their_rate() -> None:
  config = rows.BlankInfilling(128, SPECIALS)
  objectives = [config.text_row(make_window(config), 0, index)["objective"][0] for index in range(2000)]
  assert set(objectives) == {tokens_lib.OBJECTIVE_MASK, tokens_lib.OBJECTIVE_GMASK}
  assert abs(np.mean(objectives) - 0.7) < 5 * (0.21 / 2000) ** 0.5


@pytest.mark.parametrize("packing", rows.PACKINGS)
def test_instructions_packed_by_their_lengths_fit(packing: str) -> None:
  config = rows.BlankInfilling(256, SPECIALS, positions="rotary_2d", packing=packing)
  rng = np.random.default_rng(0)
  for _ in range(200):
    pairs, places = [], 0
    while True:
      n_inputs, n_targets = (int(n) for n in rng.integers(0, rng.choice([10, 100, 600]), 2))
      places += config.instruction_length(n_inputs, n_targets)
      if places > config.seq_length:
        break
      pairs.append((np.full(n_inputs, 20_200), np.full(n_targets, 20_300)))
    row = config.instruction_row(pairs)
    found = split_samples(row)
    assert len(found) == len(pairs)
    for (inputs, targets), (start, context_end, end) in zip(pairs, found):
      kept, predicted = row["tokens"][start:context_end], row["targets"][context_end:end]
      assert kept[-1] == SPECIALS.mask and (kept[:-1] == 20_200).all()
      assert predicted[-1] == SPECIALS.eop and (predicted[:-1] == 20_300).all()
      if packing != "fixed":
        assert end - start == config.instruction_length(len(inputs), len(targets))
      if len(inputs) + len(targets) + 2 <= (64 if packing == "fixed" else 256):
        assert len(kept) - 1 == len(inputs) and len(predicted) - 1 == len(targets), "cut without need"


@pytest.mark.parametrize(
  "given,kept",
  [  # the original's rule, for 512 places (docs/sources.md)
    ((300, 600), (128, 382)),
    ((480, 100), (410, 100)),
    ((100, 600), (100, 410)),
    ((600, 5), (505, 5)),
  ],
)
def test_instructions_are_cut_as_in_the_original(given: tuple[int, int], kept: tuple[int, int]) -> None:
  row = rows.BlankInfilling(2048, SPECIALS).instruction_row([(np.zeros(given[0], int), np.zeros(given[1], int))])
  ((_, context_end, end),) = split_samples(row)
  assert (context_end - 1, end - context_end - 1) == kept


def test_original_truncation_loses_targets() -> None:
  config = rows.BlankInfilling(2048, SPECIALS, gmask_rate=0, truncate_targets=True)
  assert config.window_length == 2000
  row = config.text_row(make_window(config), 0, 0)
  masks = np.count_nonzero((row["tokens"] == SPECIALS.mask) & (row["loss_weights"] == 0))
  assert np.count_nonzero(row["tokens"] == SPECIALS.sop) < 0.8 * masks


def test_chatglm_pairs_have_gmask_between() -> None:
  pair = (np.arange(5), np.arange(7, 10))
  config = rows.BlankInfilling(64, SPECIALS, positions="rotary_2d", samples_per_sequence=1, instruction_mask="gmask")
  row = config.instruction_row([pair])
  assert row["tokens"][:10].tolist() == [0, 1, 2, 3, 4, SPECIALS.gmask, SPECIALS.sop, 7, 8, 9]
  assert row["targets"][6:10].tolist() == [7, 8, 9, SPECIALS.eop]
  assert row["positions"][:, :10].tolist() == [[0, 1, 2, 3, 4, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]]


def test_inputs_that_are_too_long_can_keep_their_end() -> None:
  config = rows.BlankInfilling(64, SPECIALS, samples_per_sequence=1, instruction_cut="start")
  pair = (np.arange(200), np.arange(300, 310))
  ((_, context_end, _),) = split_samples(row := config.instruction_row([pair]))
  assert row["tokens"][: context_end - 1].tolist() == list(range(148, 200)) and context_end == 53
  other = dataclasses.replace(config, instruction_cut="end").instruction_row([pair])
  assert other["tokens"][: context_end - 1].tolist() == list(range(52))
  assert (row["targets"] == other["targets"])[context_end:].all()
  assert all((row[name] == other[name]).all() for name in row if name not in ("tokens", "targets"))
  short = (np.arange(20), np.arange(300, 310))
  again = dataclasses.replace(config, instruction_cut="end").instruction_row([short])
  assert all((again[name] == value).all() for name, value in config.instruction_row([short]).items())


@pytest.mark.parametrize("packing", rows.PACKINGS)
def test_pairs_are_cut_as_chatglm_6b_cut_them(packing: str) -> None:
  config = rows.BlankInfilling(  # max_source_length 64, max_target_length 64
    128 * 4, SPECIALS, packing=packing, instruction_max_inputs=63, instruction_max_targets=62
  )
  rng = np.random.default_rng(0)
  for _ in range(50):
    lengths = rng.integers(0, 150, [4, 2]).tolist()
    pairs = [(np.full(a, 7), np.full(b, 8)) for a, b in lengths]
    found = split_samples(config.instruction_row(pairs))
    assert [(c - s - 1, e - c - 1) for s, c, e in found] == [(min(a, 63), min(b, 62)) for a, b in lengths]


def test_the_mask_predicts_sop_where_that_is_asked_for() -> None:
  rng = np.random.default_rng(0)
  for packing, kind in (("greedy", "rotary"), ("fixed", "rotary_2d")):
    config = rows.BlankInfilling(256, SPECIALS, kind, packing=packing, instruction_mask="gmask")
    quirk = dataclasses.replace(config, instruction_sop_loss=True)
    pairs = [(rng.integers(5, 900, a), rng.integers(5, 900, b)) for a, b in ((30, 9), (0, 1), (50, 20), (3, 60))]
    plain, row = config.instruction_row(pairs), quirk.instruction_row(pairs)
    places = [context_end - 1 for _, context_end, _ in split_samples(plain)]
    assert np.flatnonzero(row["loss_weights"] - plain["loss_weights"]).tolist() == places
    assert (row["tokens"][places] == SPECIALS.gmask).all() and (row["targets"][places] == SPECIALS.sop).all()
    changed = np.isin(np.arange(256), places)
    assert (row["targets"] == plain["targets"])[~changed].all()
    assert all((row[name] == plain[name]).all() for name in row if name not in ("targets", "loss_weights"))


def test_settings_that_came_later_are_recorded_where_they_are_used() -> None:
  config = rows.BlankInfilling(64, SPECIALS, samples_per_sequence=2)
  before = dataclasses.asdict(config).keys() - rows._ADDED
  assert rows.described(config).keys() == before
  changed = dataclasses.replace(config, instruction_cut="start", instruction_max_targets=3)
  assert rows.described(changed).keys() == before | {"instruction_cut", "instruction_max_targets"}
  assert rows.described(changed)["specials"] == dataclasses.asdict(SPECIALS)
  strategy = glm10b.BlockStrategy(64, SPECIALS, sentence_ends=(5,))
  assert rows.described(strategy) == dataclasses.asdict(strategy)


@pytest.mark.parametrize("packing", rows.PACKINGS)
def test_places_of_samples(packing: str) -> None:
  rng = np.random.default_rng(0)
  config = rows.BlankInfilling(128, SPECIALS, packing=packing, instruction_sop_loss=True)
  for _ in range(50):
    pairs = [(np.arange(a), np.arange(b)) for a, b in rng.integers(0, 12, [rng.integers(1, 5), 2])]
    row = config.instruction_row(pairs)
    found = rows.places_of_samples(row)
    assert [(c - s - 1, e - c - 1) for s, c, e in found] == [(len(a), len(b)) for a, b in pairs]
    assert found == split_samples(dataclasses.replace(config, instruction_sop_loss=False).instruction_row(pairs))


def test_a_row_reads_as_text() -> None:
  config = rows.BlankInfilling(64, SPECIALS, packing="greedy", instruction_mask="gmask")
  names = {SPECIALS.gmask: "[gMASK]", SPECIALS.sop: "<sop>", SPECIALS.eop: "<eop>"}

  def decode(ids: list[int]) -> str:
    return "".join(names.get(token, chr(token)) for token in ids)

  pairs = [([*map(ord, asked)], [*map(ord, answered)]) for asked, answered in (("问：a\n答：", "b\nc"), ("d", "e"))]
  assert rows.describe_samples(config.instruction_row(pairs), decode).splitlines() == [
    "sample 1, places 0 to 10: 7 tokens seen, 4 predicted",
    "| 问：a",
    "| 答：[gMASK]",
    "> b",
    "> c<eop>",
    "sample 2, places 11 to 14: 2 tokens seen, 2 predicted",
    "| d[gMASK]",
    "> e<eop>",
    "49 places of padding",
  ]
  quirk = dataclasses.replace(config, instruction_sop_loss=True)
  assert "> <sop>e<eop>" in rows.describe_samples(quirk.instruction_row(pairs), decode)


@pytest.mark.parametrize(
  "changed",
  [
    {"positions": "alibi"},
    {"packing": "tight"},
    {"gmask_rate": 1.5},
    {"mask_ratio": 0.9},
    {"samples_per_sequence": 0},
    {"seq_length": 32},
    {"mean_span_length": 0},
    {"instruction_positions": "x"},
    {"max_span_length": 10**9},
    {"mean_span_length": 10**6},
    {"short_sequence_min": 1.5},
    {"instruction_min_inputs": -1},
    {"instruction_cut": "middle"},
    {"instruction_max_inputs": 0},
    {"instruction_max_targets": 1.5},
    {"instruction_sop_loss": 1},
    {"truncate_targets": "no"},
    {"gmask_rate": float("nan")},
  ],
)
def test_wrong_settings_are_named(changed: dict) -> None:
  with pytest.raises(errors.InputError, match=next(iter(changed))) as raised:
    rows.BlankInfilling(**{"seq_length": 512, "specials": SPECIALS, **changed})
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
  "name, values",
  [
    (name, [-0.1, 1.1, 7, math.nan, True])
    for name in (
      "mask_rate",
      "sentence_rate",
      "infill_rate",
      "gmask_min_ratio",
      "dblock_rate",
      "short_sequence_rate",
      "single_span_rate",
    )
  ]
  + [
    ("mask_ratio", [0, 5, -1]),
    ("sentence_ratio", [0, 1.5, math.inf]),
    ("mean_span_length", [0, -3, 10**6]),
    ("max_span_length", [0, -1, 2.5, 10**9]),
    ("seq_length", [0, 63, 64.5]),
    ("task_masks", [1]),
  ],
)
def test_wrong_settings_of_glm10b_are_named(name: str, values: list) -> None:
  for value in values:
    with pytest.raises(errors.InputError, match=f"BlockStrategy.{name} is .*: give ") as raised:
      glm10b.BlockStrategy(**{"seq_length": 512, "specials": SPECIALS, "sentence_ends": (5,), name: value})
    assert "\n" not in str(raised.value)


def test_longest_spans_have_lengths() -> None:
  for mean in (0.01, spans.LARGEST_MEAN):
    for longest in (1, 39, spans.LONGEST):
      assert spans.span_length_pmf(mean, longest).sum() == pytest.approx(1)


def test_a_row_can_be_read() -> None:
  config = rows.BlankInfilling(64, SPECIALS, samples_per_sequence=1, gmask_rate=0, short_sequence_rate=1)
  row = config.text_row(make_window(config), 0, 2)
  picture = rows.describe_row(row, lambda ids: f"<{ids[0]}>")
  lines = picture.splitlines()
  _, context_end, end = split_samples(row)[0]
  assert lines[0].startswith("objective mask, 64 places")
  assert lines[2 + context_end].split()[:2] == [str(context_end), str(SPECIALS.sop)]
  assert f"{SPECIALS.sop} '<{SPECIALS.sop}>'" in lines[2 + context_end]
  assert re.fullmatch(r"\d+ places of padding", lines[-1]) and len(lines) == 2 + end + 1
  config = dataclasses.replace(config, gmask_rate=1)
  assert "objective gmask" in rows.describe_row(config.text_row(make_window(config), 0, 0))


def test_glm10b_rows() -> None:
  strategy = glm10b.BlockStrategy(
    512,
    SPECIALS,
    sentence_ends=tuple(range(FIRST_TOKEN, FIRST_TOKEN + 512, 13)),
    short_sequence_rate=0.1,
    dblock_rate=0,
  )
  window = make_window(strategy)
  window[200] = SPECIALS.eod
  seen = []
  for index in range(200):
    row = strategy.text_row(window, 0, index)
    assert {name: value.dtype for name, value in row.items()} == DTYPES
    assert row["positions"].shape == (2, 512)
    again = strategy.text_row(window, 0, index)
    assert all((row[name] == again[name]).all() for name in row)
    for start, context_end, end in split_samples(row):
      text = restore_text(row, start, context_end, end, SPECIALS.eop)
      assert text[0] == SPECIALS.enc
      plain = np.array(text[1:])
      assert "".join(map(chr, plain % 2**16)) in "".join(map(chr, window % 2**16)), "a piece of the window"
    seen.append(int(row["objective"][0]))
  rates = np.bincount(seen, minlength=4) / len(seen)
  np.testing.assert_allclose(rates, [0.5, 0.2, 0, 0.3], atol=0.12)
  pair = (np.arange(30), np.arange(5))
  assert len(split_samples(strategy.instruction_row([pair, pair]))) == 2
  assert strategy.instruction_length(30, 5) == 37
