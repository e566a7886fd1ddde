"""Windows: every held-out token is asked for once, and no question shows its answer."""

import numpy as np
import pytest

from glmjax import positions as positions_lib
from glmjax import tokens
from glmjax.evaluate import windows

SPECIALS = tokens.icetk(0, 1000)


def held_out(lengths: list[int], end: int | None = SPECIALS.eod) -> windows.HeldOut:
  """Documents whose tokens say which document and place they are from."""
  documents = [100 + (np.arange(length, dtype=np.int32) * 7 + i) % 800 for i, length in enumerate(lengths)]
  return windows.HeldOut(documents, b"", 1, end)


@pytest.mark.parametrize("end", [SPECIALS.eos, None])
@pytest.mark.parametrize("length", [16, 33, 64])
def test_every_token_is_a_target_once_and_in_order(length: int, end: int | None) -> None:
  texts = held_out([1, 2, length - 3, length - 2, length - 1, length, 3 * length, 1000], end)
  stream = []
  for row in windows.left_to_right(texts, length, SPECIALS, positions_lib.ROTARY):
    context, targets = row.prompt.tokens[: row.prompt.context_length], list(row.targets)
    assert len(row.prompt.tokens) <= length
    assert row.prompt.tokens[len(context) :] == [SPECIALS.sop, *targets[:-1]]
    *shown, mask = context
    assert mask == SPECIALS.gmask
    if shown and shown[0] == SPECIALS.eos:
      shown = shown[1:]
    assert shown == stream[len(stream) - len(shown) :]  # what stood right before the targets
    stream += targets
  assert stream == np.concatenate(texts.documents).tolist()


def test_later_windows_show_half() -> None:
  rows = windows.left_to_right(held_out([1000]), 64, SPECIALS, positions_lib.ROTARY)
  assert all(row.prompt.context_length >= 32 for row in rows[1:])


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned_2d"])
def test_fills_ask_the_same_span_with_and_without_the_right_side(positions: str) -> None:
  texts = held_out([5, 20, 300, 40])
  stream = np.concatenate(texts.documents).tolist()
  asked = windows.fills(texts, 34, 60, 3, SPECIALS, positions_lib.KINDS[positions], 3.0, 39)
  assert len(asked) == 4 * (1 + 10 + 1)  # the last window of 300 has 12 tokens; 5 and 8 are too short
  for fill in asked:
    both, left = fill.both_sides.prompt, fill.left_only.prompt
    assert fill.both_sides.targets == fill.left_only.targets == fill.targets
    behind = [SPECIALS.sop, *fill.targets[:-1]]
    assert both.tokens[both.context_length :] == left.tokens[left.context_length :] == behind
    place = both.tokens.index(SPECIALS.mask)
    before, after = both.tokens[:place], both.tokens[place + 1 : both.context_length]
    assert left.tokens[: left.context_length] == [*before, SPECIALS.gmask]
    assert len(before) >= 3 and len(after) >= 3  # a quarter of at least 12
    assert len(both.tokens) <= 34
    text = [*before, *fill.targets, *after]
    assert any(stream[i : i + len(text)] == text for i in range(len(stream)))


@pytest.mark.parametrize("length", [1, 2, 3, 13])
def test_windows_that_are_too_short_ask_nothing(length: int) -> None:
  texts = windows.HeldOut([np.arange(10, 100)], b"", 90, None)
  assert windows.fills(texts, length, 5, 0, SPECIALS, positions_lib.ROTARY, 3.0, 39) == []


def test_fills_are_settled_by_the_seed() -> None:
  texts = held_out([500, 700])
  one, two, other = (windows.fills(texts, 34, 20, seed, SPECIALS, positions_lib.ROTARY, 3.0, 39) for seed in (1, 1, 2))
  one, two, other = ([fill.targets for fill in fills] for fills in (one, two, other))
  assert one == two != other
  assert len(set(map(len, one))) > 2
  assert not windows.fills(windows.HeldOut([], b"", 0, None), 34, 20, 0, SPECIALS, positions_lib.ROTARY, 3.0, 39)


def test_documents_up_to_the_limit(cache, tokenizer) -> None:
  reader = cache.split("pretrain_en", "validation")
  every = windows.choose_documents(reader, tokenizer.specials, tokenizer.decode_bytes, 10**9, 0)
  assert len(every.documents) == 5 and every.end == tokenizer.specials.eos
  assert len(every.text) == every.utf8_bytes == reader.utf8_bytes
  assert every.num_tokens == reader.num_tokens - 5
  some = windows.choose_documents(reader, tokenizer.specials, tokenizer.decode_bytes, 100, 0)
  assert some.num_tokens == 100
  assert every.text.startswith(some.text) and len(some.text) == some.utf8_bytes
  other = windows.choose_documents(reader, tokenizer.specials, tokenizer.decode_bytes, 10**9, 1)
  assert sorted(map(len, other.documents)) == sorted(map(len, every.documents)) and other.text != every.text
