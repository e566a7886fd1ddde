"""Rows of a batch: how samples of blank infilling fill the model's sequence.

A row is a dict of the features in docs/architecture.md, without the batch axis. GLM-130B's
rows are either one [gMASK] sample over the whole window, or four [MASK] samples side by side,
each seeing only itself.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from glmjax import batch
from glmjax import positions as positions_lib
from glmjax import ranges
from glmjax import tokens as tokens_lib
from glmjax.data import spans
from glmjax.errors import InputError

Row = dict[str, np.ndarray]

PACKINGS = ("fixed", "greedy", "best_fit")
INSTRUCTION_POSITIONS = ("running", "unified")
INSTRUCTION_MASKS = ("mask", "gmask")
INSTRUCTION_CUTS = ("end", "start")
# Settings that came after the first runs, which go on: their descriptions have none of these.
_ADDED = frozenset(("instruction_cut", "instruction_max_inputs", "instruction_max_targets", "instruction_sop_loss"))
_MIN_SLOT = 16  # places; less cannot hold a context, a mask and a span worth learning


@dataclasses.dataclass(frozen=True)
class BlankInfilling:
  """Turns windows of text and instruction pairs into rows of `seq_length` places.

  Sources: the GLM-130B paper (section 2.2, table 11) and its collator (docs/sources.md).
  """

  seq_length: int  # places in a row
  specials: tokens_lib.SpecialTokens
  positions: str = "rotary"  # a name of positions.KINDS
  gmask_rate: float = 0.7  # share of text rows with [gMASK], the others have [MASK]; table 11
  gmask_min_ratio: float = 0.2  # shortest [gMASK] target as a share of the text; table 11
  mask_ratio: float = 0.15  # spans are drawn until they hold this share of the text; table 11
  mean_span_length: float = 3.0  # of the Poisson distribution before it is cut; table 11
  max_span_length: int = 39  # collator: lengths 1..39
  single_span_rate: float = 0.02  # share of [MASK] samples with one span; table 11
  short_sequence_rate: float = 0.02  # share of [MASK] samples cut to a random length; table 11
  short_sequence_min: int = 32  # shortest such length; collator
  samples_per_sequence: int = 4  # [MASK] and instruction samples in a row; section 2.3
  # "fixed": equal slots, as trained; "greedy": each sample right after the last; "best_fit": so, and pairs that fill a
  # row best share it, where all are known (not from seqio).
  packing: str = "fixed"
  truncate_targets: bool = False  # True: fixed text length, targets beyond the slot are lost, as trained
  instruction_positions: str = "running"  # "unified": targets start again at the mask; collator (rotary only)
  instruction_min_inputs: int = 128  # inputs are not cut below this to make room for targets; collator
  instruction_mask: str = "mask"  # the token between inputs and targets; "gmask" in ChatGLM-6B
  instruction_cut: str = (
    "end"  # of inputs that are too long; collator, ChatGLM-6B. "start": the question at the end stays
  )
  instruction_max_inputs: int | None = None  # tokens; ChatGLM-6B's fine-tuning: max_source_length - 1. None: what fits
  instruction_max_targets: int | None = None  # there max_target_length - 2
  instruction_sop_loss: bool = False  # the mask is to predict sop, too; ChatGLM-6B's fine-tuning

  def __post_init__(self) -> None:
    for name, allowed in (
      ("positions", tuple(positions_lib.KINDS)),
      ("packing", PACKINGS),
      ("instruction_positions", INSTRUCTION_POSITIONS),
      ("instruction_mask", INSTRUCTION_MASKS),
      ("instruction_cut", INSTRUCTION_CUTS),
    ):
      ranges.choice(f"BlankInfilling.{name}", getattr(self, name), allowed)
    for name in ("gmask_rate", "gmask_min_ratio", "single_span_rate", "short_sequence_rate"):
      ranges.number(f"BlankInfilling.{name}", getattr(self, name), 0, 1)
    ranges.number("BlankInfilling.mask_ratio", self.mask_ratio, above=0, most=0.25)
    ranges.number("BlankInfilling.mean_span_length", self.mean_span_length, above=0, most=spans.LARGEST_MEAN)
    ranges.whole("BlankInfilling.max_span_length", self.max_span_length, 1, spans.LONGEST)
    for name in ("seq_length", "samples_per_sequence", "short_sequence_min"):
      ranges.whole(f"BlankInfilling.{name}", getattr(self, name), 1)
    ranges.whole("BlankInfilling.instruction_min_inputs", self.instruction_min_inputs)
    for name in ("instruction_max_inputs", "instruction_max_targets"):
      if (most := getattr(self, name)) is not None:
        ranges.whole(f"BlankInfilling.{name}", most, 1)
    for name in ("truncate_targets", "instruction_sop_loss"):
      ranges.flag(f"BlankInfilling.{name}", getattr(self, name))
    if self.slot_length < _MIN_SLOT:
      raise InputError(
        f"BlankInfilling: {self.samples_per_sequence} samples do not fit in seq_length {self.seq_length}: "
        f"each needs {_MIN_SLOT} places, so use a longer sequence or fewer samples_per_sequence"
      )

  @property
  def position_kind(self) -> positions_lib.Positions:
    """The kind of positions, which says how tokens are numbered."""
    return positions_lib.KINDS[self.positions]

  @property
  def slot_length(self) -> int:
    """The places of one [MASK] sample."""
    return self.seq_length // self.samples_per_sequence

  @property
  def window_length(self) -> int:
    """The text tokens that a text row is given.

    A [gMASK] row shows all of them. A [MASK] row needs two places more for every span: it
    takes as many as fit (about 91 %), or with truncate_targets the original's 500 of 512 per slot.
    """
    if self.truncate_targets:
      return self.samples_per_sequence * self._truncated_text_length
    return self.seq_length - 1

  def text_row(self, tokens: np.ndarray, seed: int, index: int) -> Row:
    """Makes the row of example `index`: [gMASK] or [MASK] by its own draw."""
    rng = spans.example_rng(seed, index)
    draw_row = self._gmask_row if rng.random() < self.gmask_rate else self._mask_row
    return draw_row(self._window(tokens), rng)

  def instruction_row(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Row:
    """Lays pairs (inputs, targets) side by side; their instruction_length must add up to seq_length or less."""
    samples = []
    mask = getattr(self.specials, self.instruction_mask)
    for inputs, targets in pairs:
      n_inputs, n_targets = self._cut_instruction(len(inputs), len(targets))
      first = len(inputs) - n_inputs if self.instruction_cut == "start" else 0
      text = np.concatenate([inputs[first : first + n_inputs], targets[:n_targets]]).astype(np.int32)
      samples.append(spans.corrupt_suffix(text, n_inputs, mask, self.specials, eop=True))
    row = self.pack(samples, tokens_lib.OBJECTIVE_INSTRUCTION)
    if self.instruction_sop_loss:
      self._predict_sop(row)
    return row

  def preference_row(self, inputs: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Row:
    """Lays a question with the answer that is preferred beside the same one with the answer that is not.

    Each has half of the row; the question is cut alike in both.
    """
    n_inputs, *kept = self.preference_lengths(len(inputs), len(chosen), len(rejected))
    first = len(inputs) - n_inputs if self.instruction_cut == "start" else 0
    mask = getattr(self.specials, self.instruction_mask)
    samples = []
    for answer, n_answer in zip((chosen, rejected), kept, strict=True):
      text = np.concatenate([inputs[first : first + n_inputs], answer[:n_answer]]).astype(np.int32)
      samples.append(spans.corrupt_suffix(text, n_inputs, mask, self.specials, eop=True))
    counting = self._counting(tokens_lib.OBJECTIVE_INSTRUCTION)
    row = pack(samples, self.position_kind, counting, self.seq_length, self.specials.pad)
    if self.instruction_sop_loss:
      self._predict_sop(row)
    second = len(samples[0].tokens)
    row["objective"][:second], row["objective"][second:] = tokens_lib.OBJECTIVE_CHOSEN, tokens_lib.OBJECTIVE_REJECTED
    return row

  def preference_lengths(self, n_inputs: int, n_chosen: int, n_rejected: int) -> tuple[int, int, int]:
    """Says how many tokens of a question and of both answers are kept in preference_row."""
    places = self.seq_length // 2
    n_inputs, _ = self._cut_instruction(n_inputs, max(n_chosen, n_rejected), places)
    _, n_chosen = self._cut_instruction(n_inputs, n_chosen, places)
    _, n_rejected = self._cut_instruction(n_inputs, n_rejected, places)
    return n_inputs, n_chosen, n_rejected

  def keeps_answers_whole(self, n_inputs: int, n_chosen: int, n_rejected: int) -> bool:
    """Tells whether a question and answers of so many tokens lose none of them in preference_row."""
    return self.preference_lengths(n_inputs, n_chosen, n_rejected) == (n_inputs, n_chosen, n_rejected)

  def _predict_sop(self, row: Row) -> None:
    """Has each sample's mask predict sop."""
    masks = [context_end - 1 for _, context_end, _ in places_of_samples(row)]
    row["targets"][masks], row["loss_weights"][masks] = self.specials.sop, 1

  def instruction_length(self, n_inputs: int, n_targets: int) -> int:
    """Counts the places that a pair takes in instruction_row, for packing in advance."""
    if self.packing == "fixed":
      return self.slot_length
    return sum(self._cut_instruction(n_inputs, n_targets)) + 2  # mask, and sop or eop

  def keeps_whole(self, n_inputs: int, n_targets: int) -> bool:
    """Tells whether a pair of so many tokens loses none of them in instruction_row."""
    return self._cut_instruction(n_inputs, n_targets) == (n_inputs, n_targets)

  def pack(self, samples: Sequence[spans.Sample], objective: int) -> Row:
    """Lays samples side by side, each seeing itself alone; the rest of the row is padding."""
    slot = self.slot_length if self.packing == "fixed" and len(samples) > 1 else 0
    row = pack(samples, self.position_kind, self._counting(objective), self.seq_length, self.specials.pad, slot)
    row["objective"][:] = objective
    return row

  @property
  def _truncated_text_length(self) -> int:
    return self.slot_length * 500 // 512  # stored rows hold 4 x 500 tokens for 4 x 512 places; table 11

  @functools.cached_property
  def _length_cdf(self) -> np.ndarray:
    cdf = np.cumsum(spans.span_length_pmf(self.mean_span_length, self.max_span_length))
    cdf[-1] = 1.0
    return cdf

  @functools.cached_property
  def _masked_of_text(self) -> np.ndarray:
    """The number of tokens to mask in a text of 0, 1, ... seq_length tokens."""
    return (self.mask_ratio * np.arange(self.seq_length + 1)).astype(np.int64)

  def _window(self, tokens: np.ndarray) -> np.ndarray:
    assert 2 <= len(tokens) <= self.window_length, f"{len(tokens)} tokens, window {self.window_length}"
    return np.asarray(tokens, np.int32)

  def _counting(self, objective: int) -> positions_lib.Counting:
    if objective == tokens_lib.OBJECTIVE_MASK:
      return positions_lib.Counting.AT_MASK
    if objective == tokens_lib.OBJECTIVE_INSTRUCTION and self.instruction_positions == "unified":
      return positions_lib.Counting.FROM_MASK
    return positions_lib.Counting.ON

  def _cut_instruction(self, n_inputs: int, n_targets: int, places: int | None = None) -> tuple[int, int]:
    """Says how many input and target tokens are kept: inputs give way first, down to their minimum.

    `places`: how many there are; None: those of a slot, or of a row.
    """
    if self.instruction_max_inputs is not None:
      n_inputs = min(n_inputs, self.instruction_max_inputs)
    if self.instruction_max_targets is not None:
      n_targets = min(n_targets, self.instruction_max_targets)
    if places is None:
      places = self.slot_length if self.packing == "fixed" else self.seq_length
    min_inputs, room = min(self.instruction_min_inputs, places // 4), places - 2
    n_inputs = min(n_inputs, max(min_inputs, room - n_targets))
    return n_inputs, min(n_targets, room - n_inputs)

  def _gmask_row(self, tokens: np.ndarray, rng: np.random.Generator) -> Row:
    shortest = max(int(self.gmask_min_ratio * len(tokens)), 1)
    prefix_length = len(tokens) - int(rng.integers(shortest, len(tokens) + 1))
    sample = spans.corrupt_suffix(tokens, prefix_length, self.specials.gmask, self.specials)
    return self.pack([sample], tokens_lib.OBJECTIVE_GMASK)

  def _mask_row(self, tokens: np.ndarray, rng: np.random.Generator) -> Row:
    """Puts [MASK] samples on consecutive pieces of the window; what does not fit is left out at a random end."""
    pieces: list[tuple[int, int, np.ndarray]] = []  # (first token, tokens, spans)
    begin, room = 0, self.seq_length
    while (
      len(tokens) - begin >= 2
      and room >= _MIN_SLOT
      and (self.packing != "fixed" or len(pieces) < self.samples_per_sequence)
    ):
      slot = min(self.slot_length, room)
      text_length, piece_spans = self._draw_piece(slot, len(tokens) - begin, rng)
      pieces.append((begin, text_length, piece_spans))
      begin += self._truncated_text_length if self.truncate_targets else text_length
      room -= slot if self.packing == "fixed" else min(text_length + 2 * len(piece_spans), slot)
    shift = int(rng.integers(max(len(tokens) - begin, 0) + 1))
    samples = []
    for begin, text_length, piece_spans in pieces:
      text = tokens[begin + shift : begin + shift + text_length]
      sample = spans.corrupt(text, rng.permutation(piece_spans), self.specials.mask, self.specials)
      assert self.truncate_targets or len(sample.tokens) <= self.slot_length
      samples.append(spans.truncate(sample, self.slot_length))
    return self.pack(samples, tokens_lib.OBJECTIVE_MASK)

  def _draw_piece(self, slot: int, available: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """Draws the text length of a [MASK] sample for a slot, and its spans in text order.

    Unless targets may be truncated, the text is the longest for which context and targets fit: a text
    of n tokens with k spans takes n + 2k places, and k is settled by the lengths drawn, so n is too.
    """
    to_mask = self._masked_of_text
    uniform = rng.random(int(to_mask[slot]) + 3)
    single = uniform[0] < self.single_span_rate
    short = uniform[1] < self.short_sequence_rate
    lengths = np.searchsorted(self._length_cdf, uniform[2:], side="right") + 1
    lengths = np.minimum(lengths, slot // 4)  # matters in tiny slots only
    if self.truncate_targets:
      longest = self._truncated_text_length
    elif single:
      longest = slot - 2
    else:
      enough_for = np.searchsorted(to_mask, np.cumsum(lengths), side="right") - 1
      longest = int(np.minimum(enough_for, slot - 2 * np.arange(1, len(lengths) + 1)).max())
    n = min(longest, available)
    if short:
      n = int(rng.integers(min(self.short_sequence_min, n), n + 1))
    lengths = np.minimum(lengths, max(n // 2, 1))
    count = 1 if single else int(np.searchsorted(np.cumsum(lengths), to_mask[n])) + 1
    return n, spans.sample_spans(lengths[:count], n, lambda high, k: rng.integers(high, size=k))


def pack(
  samples: Sequence[spans.Sample],
  kind: positions_lib.Positions,
  counting: positions_lib.Counting,
  length: int,
  pad: int,
  slot: int = 0,
) -> Row:
  """Packs a row of samples side by side, `slot` places from start to start, or each right after the last if 0.

  Its objective is left at 0.
  """
  assert samples
  places = np.arange(length)
  row = {name: padding.copy() for name, padding in _padding(kind, length, pad).items()}
  end = 0
  for i, sample in enumerate(samples):
    start = i * slot if slot else end
    end, context_end = start + len(sample.tokens), start + sample.context_length
    assert end <= length, f"samples need {end} places or more, the row has {length}"
    numbers = sample.positions, sample.block_positions
    row["tokens"][start:end] = sample.tokens
    row["targets"][start:end] = sample.targets
    row["loss_weights"][context_end:end] = 1
    row["positions"][..., start:end] = kind.of_sample(numbers, places[: end - start], counting)
    row["attend_start"][start:end] = start
    row["attend_end"][start:context_end] = context_end
  return row


@functools.lru_cache(maxsize=16)
def _padding(kind: positions_lib.Positions, length: int, pad: int) -> Row:
  """Returns a row without a sample, to be copied."""
  row = {feature.name: feature.padding(1, length, kind)[0] for feature in batch.FEATURES}
  row["tokens"][:] = row["targets"][:] = pad
  return row


def padding(row: Row) -> np.ndarray:
  """Tells which places of a row, bool [L], are padding: they begin at themselves, and no other place begins there."""
  starts = row["attend_start"]
  return (starts == np.arange(len(starts))) & (np.bincount(starts, minlength=len(starts)) == 1)


def places_of_samples(row: Row) -> list[tuple[int, int, int]]:
  """Returns of each sample of a row where it begins, where its context ends, and where it ends itself."""
  firsts, counts = np.unique(row["attend_start"][~padding(row)], return_counts=True)
  return [
    (first, int(row["attend_end"][first]), first + count) for first, count in zip(firsts.tolist(), counts.tolist())
  ]


def describe_samples(row: Row, decode: Callable[[list[int]], str]) -> str:
  """Writes each sample of a row as text: behind | what is seen from both sides, behind > what is predicted."""
  lines = []
  for number, (first, context_end, end) in enumerate(places_of_samples(row), 1):
    wanted = row["targets"][first:end][row["loss_weights"][first:end] > 0].tolist()
    lines.append(
      f"sample {number}, places {first} to {end - 1}: {context_end - first} tokens seen, {len(wanted)} predicted"
    )
    lines += [f"| {line}" for line in decode(row["tokens"][first:context_end].tolist()).split("\n")]
    lines += [f"> {line}" for line in decode(wanted).split("\n")]
  spare = int(padding(row).sum())
  return "\n".join([*lines, f"{spare} places of padding"] if spare else lines)


def described(infilling: Any) -> dict[str, Any]:
  """Returns an infilling's settings as a run records them: those that came later only where they are not as before."""
  settings = dataclasses.asdict(infilling)
  defaults = {field.name: field.default for field in dataclasses.fields(infilling)}
  return {name: value for name, value in settings.items() if name not in _ADDED or value != defaults[name]}


def describe_row(row: Row, decode: Callable[[list[int]], str] | None = None) -> str:
  """Writes one line a place: index, token, target, loss weight, position(s), interval; padding is summed up."""
  name = (lambda token: f"{token} {decode([token])!r}") if decode else str
  lines = [
    f"objective {tokens_lib.OBJECTIVES[int(row['objective'][0])]}, {len(row['tokens'])} places, "
    f"{int(np.count_nonzero(row['loss_weights']))} counted in the loss"
  ]
  lines.append(f"{'place':>5}  {'token':<20} {'target':<20} {'weight':>6}  {'position':<10} sees")
  is_padding = padding(row)
  for i in np.flatnonzero(~is_padding):
    weight = row["loss_weights"][i]
    target = name(int(row["targets"][i])) if weight else "."
    position = ",".join(str(p) for p in np.atleast_1d(row["positions"][..., i]))
    lines.append(
      f"{i:>5}  {name(int(row['tokens'][i])):<20} {target:<20} {weight:>6g}  {position:<10} "
      f"[{row['attend_start'][i]}, {row['attend_end'][i]})"
    )
  if is_padding.any():
    lines.append(f"{int(is_padding.sum())} places of padding")
  return "\n".join(lines)
