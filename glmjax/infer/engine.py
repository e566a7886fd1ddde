"""Engine: a loaded model that fills blanks, continues and scores text."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from glmjax import display
from glmjax import errors
from glmjax import ranges
from glmjax.infer import beam as beam_lib
from glmjax.infer import constraints as constraints_lib
from glmjax.infer import decode
from glmjax.infer import placement as placement_lib
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import reader
from glmjax.infer import rows as rows_lib
from glmjax.infer import runner as runner_lib
from glmjax.infer import sampling as sampling_lib
from glmjax.infer import score as score_lib
from glmjax.infer import vocabulary
from glmjax.io import progress
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib

if TYPE_CHECKING:
  from glmjax.infer import chat as chat_lib

_STREAM_SLOTS = 128  # most empty cache slots that streaming starts with; they grow with the answer


@dataclasses.dataclass(frozen=True)
class Filled:
  """A row of tokens with its blanks filled."""

  tokens: list[int]  # the whole row
  pieces: list[list[int]]  # what each blank took, in the order of filling; without stop tokens
  starts: list[int]  # where in the row each piece begins
  finish_reason: str  # stop: every piece ended by itself; length: one was cut off, or a blank is left


@dataclasses.dataclass(frozen=True)
class Generation:
  """The answer to a prompt."""

  text: str  # the prompt with its blanks filled, or with its continuation
  pieces: list[str]  # what was filled in, blank by blank
  tokens: list[list[int]]  # the same as ids
  finish_reason: str  # stop or length
  places: Sequence[tuple[int, int]] = ()  # where each piece stands in the text, characters [first, end)

  def _repr_html_(self) -> str:
    return display.marked(self.text, self.places)


class Engine:
  """A model ready to answer, and the tokenizer beside it.

  Compiled programs are shared by all calls of like shape: batch, prompt length and number of new tokens
  are rounded up to a few sizes.
  """

  def __init__(
    self,
    runner: runner_lib.Runner,
    tokenizer: vocabulary.Tokenizer,
    max_batch: int = 16,
    stop_tokens: Sequence[int] | None = None,
    suppressed_tokens: Sequence[int] | None = None,
  ):
    """Makes an engine that runs at most `max_batch` prompts together.

    By default eop, eos and eod stop, and everything that is not text is never generated: the other special
    tokens, image ids, and the rows that pad the vocabulary.
    """
    self.runner, self.tokenizer, self.max_batch = runner, tokenizer, max_batch
    vocab_size = self.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
      raise errors.InputError(
        f"the tokenizer has {tokenizer.vocab_size} ids and the model's vocabulary "
        f"{vocab_size}: use the tokenizer that the model was trained with"
      )
    specials = tokenizer.specials
    stops = (specials.eop, specials.eos, specials.eod) if stop_tokens is None else stop_tokens
    if suppressed_tokens is None:
      suppressed_tokens = vocabulary.not_text(tokenizer, vocab_size) - set(stops)
    self._reader = reader.Reader(tokenizer, self.config)
    self._stops = frozenset(stops)
    self._stops_V, self._suppressed_V = (
      runner.placement.everywhere(vocabulary.mask(ids, vocab_size)) for ids in (stops, suppressed_tokens)
    )

  @property
  def config(self) -> config_lib.GLMConfig:
    """The model's configuration, as inference computes it."""
    return self.runner.config

  @classmethod
  def load(
    cls,
    folder: str | os.PathLike,
    dtype: str | None = None,
    mesh: mesh_lib.MeshConfig | str | None = None,
    offload_layers: int = 0,
    **kwargs: Any,
  ) -> "Engine":
    """Reads a model from an exported or a training folder.

    Args:
      folder: either kind.
      dtype: to compute in, where it is not the model's own.
      mesh: the devices to split it over, as "tensor=4"; None: the first device alone.
      offload_layers: how many layers, the last, keep their kernels in the host's memory.
      **kwargs: as `Engine` takes them.
    """
    from glmjax import tokenizer as tokenizer_lib  # here, so that in-memory engines need no SentencePiece

    placement = placement_lib.on_mesh(mesh)
    loaded = runner_lib.read(folder, placement, dtype, offload_layers)
    if not loaded.tokenizer_dir.is_dir():
      raise errors.InputError(
        f"{folder} has no tokenizer, so that no text goes in or out of it: copy there, as "
        f"{loaded.tokenizer_dir.name}/, the one that the model was trained with"
      )
    tokenizer = tokenizer_lib.Tokenizer.load(loaded.tokenizer_dir)
    tokenizer.check_fits(loaded.config.vocab_size)
    return cls(runner_lib.Runner(loaded.config, loaded.params, placement, offload_layers), tokenizer, **kwargs)

  def encode(self, text: str, literal: bool = False) -> list[int]:
    """Returns tokens of a prompt, framed as the model's family wants; masks written in it count unless `literal`."""
    return self.config.position_kind.frame(self._reader.ids(text, literal), self.tokenizer.specials)

  def generate(
    self,
    prompts: Sequence[str],
    max_tokens: int = 128,
    sampling: sampling_lib.Sampling | Sequence[sampling_lib.Sampling] | beam_lib.BeamSearch = sampling_lib.Sampling(),
    seed: int = 0,
    literal: bool = False,
  ) -> list[Generation]:
    """Fills each prompt's blanks from left to right, or continues it where it has none.

    `max_tokens` is for each blank. `sampling` is one for all, one for each, or a beam search, whose best beam fills
    the blank. Prompt i draws with seed + i, whatever else is in the batch. `literal` takes "[MASK]" in prompts as text.
    """
    rows = [self.encode(prompt, literal) for prompt in prompts]
    return [
      self._generation(each)
      for each in self.fill_rows(rows, max_tokens, sampling, [seed + i for i in range(len(rows))])
    ]

  def fill(
    self,
    text: str,
    max_tokens: int = 128,
    sampling: sampling_lib.Sampling | beam_lib.BeamSearch = sampling_lib.Sampling(),
    seed: int = 0,
  ) -> Generation:
    """Fills the blanks of one text, from left to right: each [MASK], [sMASK] or [gMASK] written in it.

    Raises:
      errors.InputError: for a text without a blank.
    """
    if not reader.MASKS.search(text):
      raise errors.InputError(f"there is no blank in {text[:60]!r}: write [MASK] where one is, or use generate")
    [answer] = self.generate([text], max_tokens, sampling, seed)
    return answer

  def chat(self, **settings: Any) -> "chat_lib.Session":
    """Begins a conversation, to be asked; `settings` are as `infer.chat.Session` takes them."""
    from glmjax.infer import chat  # here, as it imports this module

    return chat.Session(self, **settings)

  def _generation(self, filled: Filled) -> Generation:
    """Returns a filled row as text."""
    text = self.tokenizer.decode
    places = [
      (len(text(filled.tokens[:start])), len(text(filled.tokens[: start + len(piece)])))
      for start, piece in zip(filled.starts, filled.pieces)
    ]
    pieces = [text(piece) for piece in filled.pieces]
    return Generation(text(filled.tokens), pieces, filled.pieces, filled.finish_reason, places)

  def fill_rows(
    self,
    rows: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: sampling_lib.Sampling | Sequence[sampling_lib.Sampling] | beam_lib.BeamSearch,
    seeds: Sequence[int],
  ) -> list[Filled]:
    """Does what `generate` does on tokens: rows that hold masks, framed by `encode`."""
    ranges.whole("max_tokens", max_tokens, 1)
    specials, kind = self.tokenizer.specials, self.config.position_kind
    one = isinstance(sampling, sampling_lib.Sampling | beam_lib.BeamSearch)
    how = [sampling] * len(rows) if one else list(sampling)
    for row, settings in zip(rows, how, strict=True):
      self.room(row)
      if settings.min_tokens > max_tokens:
        raise errors.InputError(f"min_tokens is {settings.min_tokens} and max_tokens {max_tokens}: give fewer, or more")
    state = [Filled(list(row), [], [], "stop") for row in rows]
    blanks = [sum(token in specials.masks for token in row) for row in rows]
    size = max(1, self.max_batch // sampling.num_beams) if isinstance(sampling, beam_lib.BeamSearch) else self.max_batch
    for turn in range(max(blanks, default=0)):
      turns = []
      for i, filled in enumerate(state):
        room = self.config.max_length - len(filled.tokens) - 1
        if turn < blanks[i] and room < 1:
          state[i] = dataclasses.replace(filled, finish_reason="length")
        elif turn < blanks[i]:
          turns.append((i, prompt_lib.fill(filled.tokens, specials, kind), min(max_tokens, room)))
      turns.sort(key=lambda x: len(x[1].tokens))  # like lengths together: less padding
      for first in range(0, len(turns), size):
        some = turns[first : first + size]
        prompts, limits = [p for _, p, _ in some], [most for _, _, most in some]
        if isinstance(sampling, beam_lib.BeamSearch):
          new = self._search(prompts, limits, sampling)
        else:
          new = self._continue(
            prompts, limits, [how[i] for i, _, _ in some], [_turn_seed(seeds[i], turn) for i, _, _ in some]
          )
        for (i, _, _), piece in zip(some, new, strict=True):
          state[i] = self._splice(state[i], piece)
    return [self._unframe(filled) for filled in state]

  def stream(
    self, row: Sequence[int], max_tokens: int, sampling: sampling_lib.Sampling = sampling_lib.Sampling(), seed: int = 0
  ) -> Iterator[int]:
    """Yields the tokens that fill the first blank of a row framed by `encode`, one by one, without the stop token.

    The generator's own value is the reason why it ended, stop or length. Programs: one to read prompts for
    each bucket of lengths, and one to decode for each size of the cache, which doubles as the answer grows.
    """
    prompt = prompt_lib.fill(row, self.tokenizer.specials, self.config.position_kind)
    limit = min(max_tokens, self.room(row))
    batch, rows = decode.make_rows([prompt], [limit], self.tokenizer.specials.pad, self.runner.batch_size(1))
    used, most = len(prompt.tokens) - 1, rows_lib.bucket(self.config.max_length)
    size = _cache_size(batch.tokens.shape[1] + min(limit, _STREAM_SLOTS), most)
    state = self.runner.run(decode.prefill, batch, rows, new_tokens=most, all_slots=size)
    draws = self._draws([sampling], [seed], len(rows.limit_B))
    constraints = constraints_lib.make([prompt], [sampling], len(rows.limit_B), self.config.vocab_size)
    for i in range(limit):
      if used + i == size:
        size, before = _cache_size(2 * size, most), size
        state = self.runner.run(decode.grow, state, slots=size - before)
      state = self.runner.run(
        decode.decode, rows, state, draws, self._suppressed_V, self._stops_V, np.int32(1), constraints
      )
      last_B, finite_B = jax.device_get((state.last_B, state.finite_B))
      decode.check_finite(finite_B[:1])
      token = int(last_B[0])
      if token in self._stops:
        return "stop"
      yield token
    return "length"

  def room(self, row: Sequence[int]) -> int:
    """Returns the most tokens that the model can add to a row; one that leaves no place for any, or holds no ids, is
    a mistake.
    """
    prompt_lib.check_ids(row, self.config.vocab_size)
    room = self.config.max_length - len(row) - 1  # sop takes a place
    if room < 1:
      raise errors.InputError(
        f"a prompt takes {len(row) + 1} tokens, and the model has "
        f"{self.config.max_length} for prompt and answer: shorten the prompt"
      )
    return room

  def score(
    self, texts: Sequence[str], contexts: Sequence[str] | None = None, stride: int | None = None
  ) -> list[score_lib.Score]:
    """Returns each text's log-likelihood, read from left to right as the filling of a [gMASK] at its start.

    With `contexts`, of each text behind its context, which is seen from both sides; where that has a [MASK], of the
    text as its filling. Texts longer than the model are scored in windows that see the tokens before them.
    """
    windows = [
      self._reader.text_rows(text, context, stride)
      for text, context in zip(texts, contexts or [""] * len(texts), strict=True)
    ]
    scores = iter(self.score_rows([row for rows in windows for row in rows]))
    return [self._read(score_lib.join([next(scores) for _ in rows]), rows) for rows in windows]

  def score_choices(
    self, contexts: Sequence[str], choices: Sequence[Sequence[str]], mask: str = "[MASK]"
  ) -> list[score_lib.Choices]:
    """Scores how likely each choice is as the filling of its context's blank, as GLM-130B's evaluation does.

    A context without a blank gets `mask` at its end ([MASK] or [gMASK]). Choices are scored without an end token, by
    the sum of their tokens. A context that is too long loses its oldest tokens.
    """
    read = [self._reader.choice_rows(context, some, mask) for context, some in zip(contexts, choices, strict=True)]
    scores = iter(self.score_rows([row for rows, _ in read for row in rows]))
    return [score_lib.Choices([self._read(next(scores), [row]) for row in rows], left_out) for rows, left_out in read]

  def score_rows(self, rows: Sequence[score_lib.Row], batch_tokens: int = 4096) -> list[score_lib.Score]:
    """Scores rows that `infer.score` built; a long run says how far it is."""
    told, read = progress.Progress(sum(len(row.prompt.tokens) for row in rows), "tokens scored"), 0

    def add(tokens: int) -> None:
      nonlocal read
      read += tokens
      told.at(read)

    return score_lib.score_rows(self.runner, rows, self.tokenizer.specials.pad, batch_tokens, add)

  def _read(self, score: score_lib.Score, rows: Sequence[score_lib.Row]) -> score_lib.Score:
    """Returns the score of these rows, which knows what its targets read as."""
    targets = [target for row in rows for target in row.targets]
    return dataclasses.replace(score, read=lambda: [self.tokenizer.decode([target]) for target in targets])

  def _continue(
    self,
    prompts: Sequence[prompt_lib.Prompt],
    limits: Sequence[int],
    samplings: Sequence[sampling_lib.Sampling],
    seeds: Sequence[int],
  ) -> list[list[int]]:
    """Returns new tokens of each prompt, stop token included."""
    batch, rows = decode.make_rows(prompts, limits, self.tokenizer.specials.pad, self.runner.batch_size(len(prompts)))
    draws = self._draws(samplings, seeds, len(rows.limit_B))
    constraints = constraints_lib.make(prompts, samplings, len(rows.limit_B), self.config.vocab_size)
    state = self.runner.run(decode.prefill, batch, rows, new_tokens=rows_lib.bucket(max(limits)))
    state = self.runner.run(
      decode.decode, rows, state, draws, self._suppressed_V, self._stops_V, np.int32(max(limits)), constraints
    )
    return decode.generated(state, len(prompts))

  def _draws(self, samplings: Sequence[sampling_lib.Sampling], seeds: Sequence[int], rows: int) -> sampling_lib.Draws:
    """Returns how each row of a batch draws; those that only fill it take the likeliest token."""
    filling = rows - len(seeds)
    return sampling_lib.draws([*samplings, *[sampling_lib.Sampling()] * filling], [*seeds, *[0] * filling])

  def _search(
    self, prompts: Sequence[prompt_lib.Prompt], limits: Sequence[int], settings: beam_lib.BeamSearch
  ) -> list[list[int]]:
    """Returns the best beam of each prompt, behind the prompt, stop token included; those of one limit run together."""
    found: dict[int, list[int]] = {}
    for limit in sorted({*limits}):
      members = [i for i, each in enumerate(limits) if each == limit]
      beams = beam_lib.search(
        self.runner,
        [prompts[i] for i in members],
        limit,
        settings,
        sorted(self._stops),
        self.tokenizer.specials.pad,
        np.asarray(self._suppressed_V),
      )
      found |= {i: best[0].tokens[len(prompts[i].tokens) :] for i, best in zip(members, beams, strict=True)}
    return [found[i] for i in range(len(prompts))]

  def _splice(self, filled: Filled, piece: list[int]) -> Filled:
    """Puts a piece in place of the blank it was made for."""
    stopped = bool(piece) and piece[-1] in self._stops
    piece = piece[:-1] if stopped else piece
    at = prompt_lib.first_mask(filled.tokens, self.tokenizer.specials)
    return Filled(
      [*filled.tokens[:at], *piece, *filled.tokens[at + 1 :]],
      [*filled.pieces, piece],
      [*filled.starts, at],
      filled.finish_reason if stopped else "length",
    )

  def _unframe(self, filled: Filled) -> Filled:
    """Takes off the eos that `encode` put behind text."""
    if filled.tokens[-1:] == [self.tokenizer.specials.eos]:
      return dataclasses.replace(filled, tokens=filled.tokens[:-1])
    return filled


def _cache_size(slots: int, most: int) -> int:
  """Returns the cache's size for at least `slots`: a power of two, or all that the longest row can take."""
  return min(1 << (slots - 1).bit_length(), most)


def _turn_seed(seed: int, turn: int) -> int:
  """Makes a row's draws for one blank independent of those for the next."""
  return int(np.random.SeedSequence([seed % 2**32, turn]).generate_state(1)[0])
