"""The scheduler: requests wait, are read, decode among others, and leave, in rounds.

Prompts are read one by one, a group of layers in a round (infer/prefill.py), and then decode in lanes (infer/lanes.py),
of which there are more when more is asked. Nothing here runs by itself: whoever wants tokens asks for the next round.
"""

import collections
import dataclasses

from glmjax import errors
from glmjax.infer import contexts as contexts_lib
from glmjax.infer import decode
from glmjax.infer import draft_model as draft_model_lib
from glmjax.infer import drafting as drafting_lib
from glmjax.infer import lanes as lanes_lib
from glmjax.infer import prefill as prefill_lib
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import rows as rows_lib
from glmjax.infer import runner as runner_lib
from glmjax.models import config as config_lib

_CONTEXT_BYTES = 1 << 28
_AHEAD = 128  # most empty places of a cache that a request joins with; they grow with its answer


@dataclasses.dataclass(eq=False)
class Answer:
  """What came of a request so far."""

  request: lanes_lib.Request
  tokens: list[int] = dataclasses.field(default_factory=list)  # the stop token included
  told: list[lanes_lib.Told] = dataclasses.field(default_factory=list)  # of each token, if the request asks for it
  ended: bool = False
  finite: bool = True  # False: it has ended, since the model's logits were not finite, and its last tokens mean nothing

  def check(self) -> None:
    """Raises NotFiniteError where the model's logits were not finite."""
    if not self.finite:
      raise decode.not_finite()


@dataclasses.dataclass(frozen=True)
class Capacity:
  """How much is done at the same time, and by how many programs."""

  lanes: int  # rows of one program; rounded up to what divides over the mesh
  most: int | None = None  # requests that decode at the same time, `lanes` and a multiple; None: `lanes`
  cache_bytes: int | None = None  # what the lanes' caches take at most; None: there is no bound
  context_bytes: int = _CONTEXT_BYTES  # what contexts that were read take, for who asks with the same prompt again
  few_programs: bool = False  # one for all kinds of sampling, and few sizes of caches: for whatever may be asked
  drafts: int = 0  # tokens of each text's draft, read by lanes that are free; the texts stay the same

  def first_slots(self, config: config_lib.GLMConfig, read: int, limit: int) -> int:
    """Returns the places of the cache that a request joins with whose prompt was read in so many."""
    return self.slots(config, read + min(rows_lib.bucket(limit), _AHEAD))

  def slots(self, config: config_lib.GLMConfig, needed: int) -> int:
    """Returns the cache's size for at least so many places: a power of two (of four, from 256 on, where programs are
    few), or all that the longest row can take.
    """
    bits = (needed - 1).bit_length()
    if self.few_programs:
      bits = max(8, bits + bits % 2)
    return min(1 << bits, rows_lib.bucket(config.max_length + self.drafts))


class Scheduler:
  """Requests of one model, in lanes of a fixed number.

  `submit`, `cancel` and `advance` are for one thread.
  """

  def __init__(
    self,
    runner: runner_lib.Runner,
    vocabulary: lanes_lib.Vocabulary,
    capacity: Capacity,
    draft_model: runner_lib.Runner | None = None,
  ) -> None:
    """Makes a scheduler.

    Args:
      runner: the model.
      vocabulary: which ids end an answer, and which never come out.
      capacity: how much is done at the same time.
      draft_model: drafts what comes next; None: the texts do themselves, of what came before.
    """
    self._runner, self._vocabulary, self._capacity = runner, vocabulary, capacity
    self._draft_model = draft_model
    self.drafted = drafting_lib.Count()
    self.contexts = contexts_lib.Contexts(capacity.context_bytes)
    self._size = runner.batch_size(capacity.lanes)
    self._most = max(1, (capacity.most or self._size) // self._size)  # sets of lanes
    self._waiting: collections.deque[Answer] = collections.deque()
    self._sets: list[lanes_lib.Lanes] = []
    self._reading: tuple[Answer, prefill_lib.Prefill] | None = None
    self._held: dict[tuple[lanes_lib.Lanes, int], Answer] = {}
    self._short = False  # the first that waits has no lane, or no memory
    self._slot_bytes = sum(lanes_lib.slot_bytes(each, self._size) for each in (runner, draft_model) if each is not None)

  @property
  def cache_bytes(self) -> int:
    """What the lanes' caches take now."""
    return self._slot_bytes * sum(lanes.slots for lanes in self._sets)

  @property
  def busy(self) -> bool:
    """Whether a request waits or decodes."""
    return bool(self._waiting or self._reading or self._held)

  @property
  def free(self) -> int:
    """How many more requests could be begun at once."""
    begun = len(self._waiting) + (self._reading is not None) + len(self._held)
    if self._capacity.cache_bytes is None:
      return self._most * self._size - begun
    # Where memory may be short only few wait here, first come, first served: whose turn it is is decided elsewhere.
    return 0 if self._short else min(self._most * self._size - begun, self._size - len(self._waiting))

  def warm(self) -> None:
    """Has the programs compiled that add tokens, for caches of the smallest size."""
    lanes = self._new_set()
    lanes.grow(self._slots(1))
    lanes.warm()

  def check(self, prompt: int, limit: int) -> None:
    """Raises InputError where there is no memory for a request with a prompt of so many tokens and that limit, ever."""
    needed = self._slot_bytes * self._needed(prompt, limit)
    if self._capacity.cache_bytes is not None and needed > self._capacity.cache_bytes:
      raise errors.InputError(
        f"a prompt of {prompt} tokens and {limit} more take {needed / 2**20:,.0f} MiB of cache in a program of "
        f"{self._size} lanes, and there are {self._capacity.cache_bytes / 2**20:,.0f}: ask for less, or serve with "
        "fewer --lanes or more --cache_gib"
      )

  def submit(self, request: lanes_lib.Request) -> Answer:
    """Takes a request, whose prompt and limit fit the model; it is begun when a lane is free, and memory for it.

    Raises:
      errors.InputError: where there is never memory for it.
    """
    self.check(len(request.prompt.tokens), request.limit)
    self._waiting.append(answer := Answer(request))
    return answer

  def cancel(self, answer: Answer) -> None:
    """Ends a request, wherever it is."""
    if answer in self._waiting:
      self._waiting.remove(answer)
    if self._reading is not None and self._reading[0] is answer:
      self._reading = None
    for place, held in list(self._held.items()):
      if held is answer:
        self._leave(*place)
    answer.ended = True

  def advance(self, count: int = 1, fill: bool = False) -> list[tuple[Answer, list[int]]]:
    """Reads on in what waits, and adds up to `count` tokens to each request that decodes.

    Args:
      count: of tokens; one with a draft may be given more.
      fill: read until no lane is free, or nothing waits; False: while others decode, no more at a time than goes with
        their tokens, one group of layers at least.

    Returns:
      the requests that decode, with their new tokens. Those of which logits were not finite have ended (`check`).
    """
    left = prefill_lib.TOKENS * sum(1 if lanes.one_pass else count for lanes in self._sets if _decodes(lanes))
    while (read := self._read_on()) and (fill or not self._held or left > read):
      left -= read
    news = []
    for lanes in list(self._sets):
      for lane, tokens, told, ended, finite in self._run(lanes, count) if _decodes(lanes) else ():
        answer = self._held[lanes, lane]
        answer.tokens += tokens
        answer.told += told
        answer.finite = finite
        news.append((answer, tokens))
        if ended or not finite:
          answer.ended = True
          self._leave(lanes, lane)
    return news

  def _place(self, request: lanes_lib.Request) -> tuple[lanes_lib.Lanes, int] | None:
    """Returns a free lane, with memory for all that the request may come to say; None: there is none now."""
    if (place := self._find_place(request)) is not None or self._capacity.cache_bytes is None:
      return place
    self._sets = [lanes for lanes in self._sets if any(each is not None for each in lanes.requests)]
    return self._find_place(request)

  def _find_place(self, request: lanes_lib.Request) -> tuple[lanes_lib.Lanes, int] | None:
    needed = self._needed(len(request.prompt.tokens), request.limit)
    reserved = {lanes: self._reserved(lanes) for lanes in self._sets}
    left = (
      float("inf")
      if self._capacity.cache_bytes is None
      else self._capacity.cache_bytes // self._slot_bytes - sum(reserved.values())
    )
    for lanes in self._sets:
      if (lane := lanes.free()) is not None and needed - reserved[lanes] <= left:
        return lanes, lane
    if len(self._sets) == self._most or needed > left:
      return None
    self._sets.append(self._new_set())
    return self._sets[-1], 0

  def _new_set(self) -> lanes_lib.Lanes:
    drafting = None
    if self._capacity.drafts and self._size > 1:
      drafting = drafting_lib.Drafting(self._source(), self._size, self._capacity.drafts, self.drafted)
    return lanes_lib.Lanes(self._runner, self._vocabulary, self._size, drafting, self._capacity.few_programs)

  def _source(self) -> drafting_lib.Source:
    if self._draft_model is None:
      return drafting_lib.Texts()
    few_programs = self._capacity.few_programs
    return draft_model_lib.DraftModel(self._draft_model, self._vocabulary, self._size, few_programs)

  def _reserved(self, lanes: lanes_lib.Lanes) -> int:
    """Returns how many slots a set's cache has, or will come to have."""
    held = [self._needed(len(each.prompt.tokens), each.limit) for each in lanes.requests if each is not None]
    return max(lanes.slots, *held) if held else lanes.slots

  def _read_on(self) -> int:
    """Takes the next step of what waits, if there is a lane for it; returns what it took, as tokens that go through all
    layers (one at least), and 0 where there was none.
    """
    if self._reading is None:
      self._short = bool(self._waiting) and self._place(self._waiting[0].request) is None
      if not self._waiting or self._short:
        return 0
      answer = self._waiting.popleft()
      if (read := self.contexts.find(answer.request.prompt)) is not None:
        self._join(answer, read)
        return 1
      self._reading = answer, self._prefill(answer.request.prompt)
    answer, prefill = self._reading
    prefill.advance()
    if prefill.done:
      self._reading, read = None, prefill.state()
      self.contexts.add(answer.request.prompt, read)
      self._join(answer, read)
    return prefill.step

  def _prefill(self, prompt: prompt_lib.Prompt) -> prefill_lib.Prefill:
    new_tokens = lanes_lib.new_tokens(self._runner.config)
    return prefill_lib.Prefill(self._runner, prompt, self._vocabulary.pad, new_tokens)

  def _join(self, answer: Answer, read: decode.State) -> None:
    place = self._place(answer.request)
    assert place is not None, "a lane was free when its reading began"
    lanes, lane = place
    lanes.grow(self._capacity.first_slots(self._runner.config, read.slots, answer.request.limit))
    lanes.join(lane, answer.request, read)
    self._held[lanes, lane] = answer

  def _run(self, lanes: lanes_lib.Lanes, count: int) -> list[lanes_lib.News]:
    lanes.grow(self._slots(lanes.slots - lanes.room() + lanes.step))
    return lanes.run(min(count, lanes.room()))

  def _needed(self, prompt: int, limit: int) -> int:
    """Returns the slots that the cache of such a request's lanes comes to have."""
    at_first = self._capacity.first_slots(self._runner.config, rows_lib.bucket(prompt - 1), limit)
    return max(at_first, self._slots(prompt - 1 + limit + self._capacity.drafts))

  def _slots(self, needed: int) -> int:
    return self._capacity.slots(self._runner.config, needed)

  def _leave(self, lanes: lanes_lib.Lanes, lane: int) -> None:
    lanes.leave(lane)
    del self._held[lanes, lane]
    if lanes.slots > self._slots(1) and not _decodes(lanes):
      self._sets.remove(lanes)  # every pass goes over all of a cache: the next request begins with a small one


def lanes_that_fit(runner: runner_lib.Runner, lanes: int, cache_bytes: int, drafts: int) -> int:
  """Returns how many lanes, up to so many and one at least, hold the model's longest texts within so many bytes."""
  slots = rows_lib.bucket(runner.config.max_length + drafts)
  while lanes > 1 and slots * lanes_lib.slot_bytes(runner, runner.batch_size(lanes)) > cache_bytes:
    lanes //= 2
  return lanes


def _decodes(lanes: lanes_lib.Lanes) -> bool:
  """Tells whether a lane is taken."""
  return any(each is not None for each in lanes.requests)
