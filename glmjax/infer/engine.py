"""Engine: a loaded model that fills blanks, continues and scores text."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from glmjax import display
from glmjax import errors
from glmjax import ranges
from glmjax.infer import adapters as adapters_lib
from glmjax.infer import ahead as ahead_lib
from glmjax.infer import beam as beam_lib
from glmjax.infer import drafts as drafts_lib
from glmjax.infer import filling as filling_lib
from glmjax.infer import lanes as lanes_lib
from glmjax.infer import placement as placement_lib
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import reader
from glmjax.infer import runner as runner_lib
from glmjax.infer import sampling as sampling_lib
from glmjax.infer import scheduler as scheduler_lib
from glmjax.infer import score as score_lib
from glmjax.infer import scoring
from glmjax.infer import vocabulary
from glmjax.io import paths
from glmjax.io import progress
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib

if TYPE_CHECKING:
  from glmjax.infer import chat as chat_lib

MAX_BATCH = 16  # prompts that are answered together
_AT_ONCE = 16  # tokens that are decoded before somebody looks who has ended


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
    max_batch: int = MAX_BATCH,
    stop_tokens: Sequence[int] | None = None,
    suppressed_tokens: Sequence[int] | None = None,
    drafts: int = 0,
    draft_model: "Engine | None" = None,
  ):
    """Makes an engine that runs at most `max_batch` prompts together.

    With `drafts`, up to so many tokens that a text may say next, since they followed the same ones before, are read
    along with its last one (speculative decoding): the text stays as it is in a program of as many rows, and repetitive
    ones come faster. With a `draft_model` these are what that model would say.

    By default eop, eos and eod stop, and everything that is not text is never generated: the other special tokens,
    image ids, and the rows that pad the vocabulary.
    """
    self.runner, self.tokenizer, self.max_batch = runner, tokenizer, max_batch
    ranges.whole("drafts", drafts, 0, drafts_lib.MOST)
    self.drafts, self._draft_model = drafts, draft_model
    if draft_model is not None:
      self._check_draft_model(draft_model)
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
    self.stops = frozenset(stops)
    masks = (runner.placement.everywhere(vocabulary.mask(ids, vocab_size)) for ids in (stops, suppressed_tokens))
    self._vocabulary = lanes_lib.Vocabulary(*masks, specials.pad)

  @property
  def config(self) -> config_lib.GLMConfig:
    """The model's configuration, as inference computes it."""
    return self.runner.config

  @property
  def adapters(self) -> tuple[str, ...]:
    """The names of the adapters that a prompt may be read and answered with."""
    return self.runner.adapters

  @classmethod
  def load(
    cls,
    folder: paths.Named,
    precision: placement_lib.Precision = placement_lib.Precision(),
    mesh: mesh_lib.MeshConfig | str | None = None,
    offload_layers: int = 0,
    first: ahead_lib.First | None = None,
    adapter: adapters_lib.Adapters = None,
    **kwargs: Any,
  ) -> "Engine":
    """Reads a model from an exported or a training folder.

    Args:
      folder: either kind.
      precision: in what to compute, and keep the cache.
      mesh: the devices to split it over, as "tensor=4"; None: the first device alone.
      offload_layers: how many layers, the last, keep their kernels in the host's memory.
      first: what it will be asked first, for which programs are compiled while the weights are being read.
      adapter: a run that trained one beside this model, or its export, which is always on; or several by name, LoRA's,
        of which each prompt may have its own; None: the model alone.
      **kwargs: as `Engine` takes them.
    """
    from glmjax import tokenizer as tokenizer_lib  # here, so that in-memory engines need no SentencePiece

    placement = placement_lib.on_mesh(mesh)
    if adapter is not None:
      first = None  # its programs are others
    with ahead_lib.compiling(first, folder, placement, precision, offload_layers):
      loaded = runner_lib.read(folder, placement, precision, offload_layers, adapter)
    if not loaded.tokenizer_dir.is_dir():
      raise errors.InputError(
        f"{folder} has no tokenizer, so that no text goes in or out of it: copy there, as "
        f"{loaded.tokenizer_dir.name}/, the one that the model was trained with"
      )
    tokenizer = tokenizer_lib.Tokenizer.load(loaded.tokenizer_dir)
    tokenizer.check_fits(loaded.config.vocab_size)
    named = adapters_lib.names(adapter)
    runner = runner_lib.Runner(loaded.config, loaded.params, placement, offload_layers, given_away=True, adapters=named)
    return cls(runner, tokenizer, **kwargs)

  def _check_draft_model(self, other: "Engine") -> None:
    """Raises InputError for a model that cannot draft what this one says."""
    if not self.drafts:
      raise errors.InputError(f"a draft model drafts nothing with drafts=0: give up to {drafts_lib.MOST}")
    for name in ("vocab_size", "max_length"):
      ours, its = getattr(self.config, name), getattr(other.config, name)
      if its < ours or (name == "vocab_size" and its != ours):
        raise errors.InputError(f"the draft model's {name} is {its} and the model's {ours}: take another")
    if other.tokenizer != self.tokenizer:
      raise errors.InputError("the draft model's tokenizer is another one: take a model of the same tokenizer")

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
    adapter: str | None | Sequence[str | None] = None,
  ) -> list[Generation]:
    """Fills each prompt's blanks from left to right, or continues it where it has none.

    `max_tokens` is for each blank. `sampling` is one for all, one for each, or a beam search, whose best beam fills
    the blank. Prompt i draws with seed + i, whatever else is in the batch. `literal` takes "[MASK]" in prompts as text.
    `adapter` is the name of one for all, or one for each; None: the model's own text.
    """
    rows = [self.encode(prompt, literal) for prompt in prompts]
    seeds = [seed + i for i in range(len(rows))]
    return [self.generation(each) for each in self.fill_rows(rows, max_tokens, sampling, seeds, adapter)]

  def fill(
    self,
    text: str,
    max_tokens: int = 128,
    sampling: sampling_lib.Sampling | beam_lib.BeamSearch = sampling_lib.Sampling(),
    seed: int = 0,
    adapter: str | None = None,
  ) -> Generation:
    """Fills the blanks of one text, from left to right: each [MASK], [sMASK] or [gMASK] written in it.

    Raises:
      errors.InputError: for a text without a blank.
    """
    if not reader.MASKS.search(text):
      raise errors.InputError(f"there is no blank in {text[:60]!r}: write [MASK] where one is, or use generate")
    [answer] = self.generate([text], max_tokens, sampling, seed, adapter=adapter)
    return answer

  def chat(self, **settings: Any) -> "chat_lib.Session":
    """Begins a conversation, to be asked; `settings` are as `infer.chat.Session` takes them."""
    from glmjax.infer import chat  # here, as it imports this module

    return chat.Session(self, **settings)

  def generation(self, filled: filling_lib.Filled) -> Generation:
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
    adapter: str | None | Sequence[str | None] = None,
  ) -> list[filling_lib.Filled]:
    """Does what `generate` does on tokens: rows that hold masks, framed by `encode`."""
    ranges.whole("max_tokens", max_tokens, 1)
    one = isinstance(sampling, sampling_lib.Sampling | beam_lib.BeamSearch)
    how = [sampling] * len(rows) if one else list(sampling)
    for row, settings in zip(rows, how, strict=True):
      self.room(row)
      self.check(settings, max_tokens)
    names = [adapter] * len(rows) if adapter is None or isinstance(adapter, str) else list(adapter)
    if len(names) != len(rows):
      raise errors.InputError(f"adapter: {len(names)} names for {len(rows)} prompts: give one for all, or one for each")
    state = [self.filling(row, max_tokens, name) for row, name in zip(rows, names, strict=True)]
    if isinstance(sampling, beam_lib.BeamSearch):
      self._fill_by_beams(state, sampling)
    else:
      self._fill_by_draws(state, how, seeds)
    return [each.filled() for each in state]

  def check(self, sampling: sampling_lib.Sampling | beam_lib.BeamSearch, max_tokens: int) -> None:
    """Raises InputError for settings that do not go with so many tokens, or with the model."""
    if sampling.min_tokens > max_tokens:
      raise errors.InputError(f"min_tokens is {sampling.min_tokens} and max_tokens {max_tokens}: give fewer, or more")
    if isinstance(sampling, sampling_lib.Sampling):
      prompt_lib.check_ids([token for token, _ in sampling.logit_bias], self.config.vocab_size)

  def filling(self, row: Sequence[int], max_tokens: int, adapter: str | None = None) -> filling_lib.Filling:
    """Returns a row framed by `encode` on its way to be filled, with so many tokens for each blank; raises InputError
    where there is no such adapter.
    """
    number = self.runner.adapter_number(adapter)
    return filling_lib.Filling(row, max_tokens, self.config, self.tokenizer.specials, self.stops, number)

  def _fill_by_draws(
    self, state: Sequence[filling_lib.Filling], how: Sequence[sampling_lib.Sampling], seeds: Sequence[int]
  ) -> None:
    """Fills all blanks; a row's next one is begun when the one before is filled."""
    scheduler = self.scheduler(max(min(len(state), self.max_batch), 1 + self.drafts))
    asked: dict[scheduler_lib.Answer, int] = {}

    def ask(i: int) -> None:
      if (blank := state[i].blank()) is not None:
        seed = filling_lib.turn_seed(seeds[i], state[i].turn)
        asked[scheduler.submit(lanes_lib.Request(*blank, how[i], seed))] = i

    for i in range(len(state)):
      ask(i)
    while scheduler.busy:
      for answer, _ in scheduler.advance(_AT_ONCE, fill=True):
        answer.check()
        if answer.ended:
          i = asked.pop(answer)
          state[i].take(answer.tokens)
          ask(i)

  def _fill_by_beams(self, state: Sequence[filling_lib.Filling], settings: beam_lib.BeamSearch) -> None:
    """Fills all blanks, each with its best beam."""
    size = max(1, self.max_batch // settings.num_beams)
    while turns := [(each, *blank) for each in state if (blank := each.blank()) is not None]:
      turns.sort(key=lambda x: len(x[1].tokens))  # like lengths together: less padding
      for first in range(0, len(turns), size):
        some = turns[first : first + size]
        found = self._search([prompt for _, prompt, _ in some], [limit for _, _, limit in some], settings)
        for (each, _, _), piece in zip(some, found, strict=True):
          each.take(piece)

  def scheduler(self, lanes: int, **capacity: Any) -> scheduler_lib.Scheduler:
    """Returns a scheduler of this model, with its drafts; the rest is as `scheduler.Capacity` takes it."""
    small = None if self._draft_model is None else self._draft_model.runner
    how_much = scheduler_lib.Capacity(lanes, **{**capacity, "drafts": self.drafts})
    return scheduler_lib.Scheduler(self.runner, self._vocabulary, how_much, small)

  def stream(
    self,
    row: Sequence[int],
    max_tokens: int,
    sampling: sampling_lib.Sampling = sampling_lib.Sampling(),
    seed: int = 0,
    adapter: str | None = None,
  ) -> Iterator[int]:
    """Yields the tokens that fill the first blank of a row framed by `encode`, one by one, without the stop token.

    The generator's own value is the reason why it ended, stop or length.
    """
    blank = self.filling(row, min(max_tokens, self.room(row)), adapter).blank()
    assert blank is not None, "a row has a blank, and room was found for it"
    scheduler = self.scheduler(1 + self.drafts)
    answer = scheduler.submit(lanes_lib.Request(*blank, sampling, seed))
    while not answer.ended:
      before = len(answer.tokens)
      scheduler.advance()
      answer.check()
      for token in answer.tokens[before:]:
        if token in self.stops:
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
    self,
    texts: Sequence[str],
    contexts: Sequence[str] | None = None,
    stride: int | None = None,
    adapter: str | None = None,
  ) -> list[score_lib.Score]:
    """Returns each text's log-likelihood, read from left to right as the filling of a [gMASK] at its start.

    With `contexts`, of each text behind its context, which is seen from both sides; where that has a [MASK], of the
    text as its filling. Texts longer than the model are scored in windows that see the tokens before them. All are
    scored with the adapter of that name; None: by the model alone.
    """
    windows = [
      self._adapted(adapter, self._reader.text_rows(text, context, stride))
      for text, context in zip(texts, contexts or [""] * len(texts), strict=True)
    ]
    scores = iter(self.score_rows([row for rows in windows for row in rows]))
    return [self._read(score_lib.join([next(scores) for _ in rows]), rows) for rows in windows]

  def score_choices(
    self, contexts: Sequence[str], choices: Sequence[Sequence[str]], mask: str = "[MASK]", adapter: str | None = None
  ) -> list[score_lib.Choices]:
    """Scores how likely each choice is as the filling of its context's blank, as GLM-130B's evaluation does.

    A context without a blank gets `mask` at its end ([MASK] or [gMASK]). Choices are scored without an end token, by
    the sum of their tokens. A context that is too long loses its oldest tokens. `adapter`: as `score` has it.
    """
    read = [self._reader.choice_rows(context, some, mask) for context, some in zip(contexts, choices, strict=True)]
    scores = iter(self.score_rows([row for rows, _ in read for row in self._adapted(adapter, rows)]))
    return [score_lib.Choices([self._read(next(scores), [row]) for row in rows], left_out) for rows, left_out in read]

  def score_rows(self, rows: Sequence[score_lib.Row]) -> list[score_lib.Score]:
    """Scores rows that `infer.score` built; a long run says how far it is."""
    told, read = progress.Progress(sum(len(row.prompt.tokens) for row in rows), "tokens scored"), 0

    def add(tokens: int) -> None:
      nonlocal read
      read += tokens
      told.at(read)

    return scoring.score_rows(self.runner, rows, self.tokenizer.specials.pad, progress=add)

  def score_tokens(self, tokens: Sequence[int], top: int, adapter: str | None = None) -> score_lib.Score:
    """Returns the score of a text's tokens, as `score` has it, in one pass, and the `top` likeliest in each place.

    Raises:
      errors.InputError: where they do not fit into the model, or are no ids.
    """
    kind, specials = self.config.position_kind, self.tokenizer.specials
    rows = score_lib.window_rows(tokens, specials, kind, max(len(tokens) + 1, 2))
    scores = scoring.score_rows(self.runner, self._adapted(adapter, rows), specials.pad, top=top)
    return scores[0] if scores else score_lib.join([])

  def _adapted(self, adapter: str | None, rows: Sequence[score_lib.Row]) -> list[score_lib.Row]:
    """Returns rows that are scored with an adapter; raises InputError where there is none of that name."""
    number = self.runner.adapter_number(adapter)
    return [dataclasses.replace(row, prompt=dataclasses.replace(row.prompt, adapter=number)) for row in rows]

  def _read(self, score: score_lib.Score, rows: Sequence[score_lib.Row]) -> score_lib.Score:
    """Returns the score of these rows, which knows what its targets read as."""
    targets = [target for row in rows for target in row.targets]
    return dataclasses.replace(score, read=lambda: [self.tokenizer.decode([target]) for target in targets])

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
        beam_lib.Ids(sorted(self.stops), self.tokenizer.specials.pad, np.asarray(self._vocabulary.suppressed_V)),
      )
      found |= {i: best[0].tokens[len(prompts[i].tokens) :] for i, best in zip(members, beams, strict=True)}
    return [found[i] for i in range(len(prompts))]
