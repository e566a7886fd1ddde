"""Lanes: the rows of one program of a fixed shape. Each is free or holds a request, whatever the others do.

A request joins with the state that reading its prompt left, and leaves when it has ended, between two runs of the same
program. As the number of rows never changes, no sum is taken in another order because of who else is there: a request
gets the same text, bit for bit, alone or among others.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.infer import constraints as constraints_lib
from glmjax.infer import decode
from glmjax.infer import drafts as drafts_lib
from glmjax.infer import drafting as drafting_lib
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import rows as rows_lib
from glmjax.infer import runner as runner_lib
from glmjax.infer import sampling as sampling_lib
from glmjax.models import config as config_lib
from glmjax.models import kv_cache
from glmjax.parallel import partitioning


MOST = 20  # tokens whose log-probabilities are told: as many as OpenAI's interface has


class Request(NamedTuple):
  """What one row is to generate."""

  prompt: prompt_lib.Prompt
  limit: int  # most tokens, the stop token included
  sampling: sampling_lib.Sampling = sampling_lib.Sampling()
  seed: int = 0
  logprobs: int | None = None  # of each token its log-probability, and so many of the likeliest ones' (up to MOST)


class Told(NamedTuple):
  """How likely a token was: by the model alone, without constraints and temperature."""

  logprob: float
  likeliest: list[tuple[int, float]]  # tokens and their log-probabilities, the likeliest first


class News(NamedTuple):
  """What a run has added to a lane's request."""

  lane: int
  tokens: list[int]
  told: list[Told]  # of each token, where the request asks for it
  ended: bool
  finite: bool  # whether the logits were that the tokens were taken from; if not, these mean nothing


class Vocabulary(NamedTuple):
  """Which ids end an answer, and which never come out; bool [V], on the devices."""

  stops_V: jax.Array
  suppressed_V: jax.Array
  pad: int


# Who is in a free lane.
FREE = Request(prompt_lib.Prompt([0], np.zeros((2, 1), np.int32), 0, (0, 0)), 0)


class Lanes:
  """Rows that decode together: `requests` by lane, None where one is free."""

  def __init__(
    self,
    runner: runner_lib.Runner,
    vocabulary: Vocabulary,
    lanes: int,
    drafting: drafting_lib.Drafting | None = None,
    few_programs: bool = False,
  ) -> None:
    """Makes free lanes, a multiple of the mesh's row parts; their cache grows with what they hold.

    Those that are free read drafts of the others' texts, if there are any. With `few_programs` greedy requests have
    none of their own.
    """
    self._runner, self._vocabulary, self._few_programs = runner, vocabulary, few_programs
    self.drafting = drafting
    self._state = runner.run(free, lanes=lanes, slots=rows_lib.bucket(1), new_tokens=new_tokens(runner.config))
    self.requests: list[Request | None] = [None] * lanes
    self._taken = [0] * lanes  # tokens that were returned of each
    self._spoilt: set[int] = set()  # lanes with what is not finite in their caches
    self._given: Any = None  # what the program takes besides the state; made anew when who is there changes
    self._owners: list[int] = []  # of each lane the one that it reads for, when that was made

  @property
  def slots(self) -> int:
    """Places of the cache."""
    return self._state.slots

  @property
  def new_tokens(self) -> int:
    """Tokens of each row that the state has room for."""
    return self._state.generated_BT.shape[1]

  @property
  def step(self) -> int:
    """Places that one pass writes at most, in each row."""
    return 1 if self.drafting is None else 1 + self.drafting.most

  @property
  def one_pass(self) -> bool:
    """Whether a run is one pass, whatever its count: there are drafts, or somebody is told how likely tokens were."""
    return self._tells or (self.drafting is not None and self.drafting.reads)

  @property
  def _tells(self) -> bool:
    """Whether somebody is told how likely tokens were."""
    return any(each is not None and each.logprobs is not None for each in self.requests)

  def free(self) -> int | None:
    """Returns a free lane; None where none is."""
    return next((lane for lane, request in enumerate(self.requests) if request is None), None)

  def join(self, lane: int, request: Request, read: decode.State) -> None:
    """Gives a lane to a request, whose prompt `read` has read: a state of one row."""
    self.grow(read.slots)
    if lane in self._spoilt:  # behind what is put there: a weight of 0 times NaN is NaN
      self._state = self._runner.run(_clear, self._state, np.int32(lane))
      self._spoilt.remove(lane)
    self._state = self._runner.run(put, self._state, read, np.int32(lane))
    self.requests[lane], self._taken[lane], self._given = request, 0, None
    if self.drafting is not None:
      self.drafting.begin(lane, request)

  def leave(self, lane: int) -> None:
    """Frees a lane, whether its request has ended or not."""
    self.requests[lane], self._given = None, None
    if self.drafting is not None:
      self.drafting.end(lane)

  def grow(self, slots: int) -> None:
    """Gives the cache so many places, if it has fewer."""
    if slots > self.slots:
      self._state = self._runner.run(decode.grow, self._state, slots=slots - self.slots)

  def run(self, count: int) -> list[News]:
    """Adds up to `count` tokens to every request that has not ended, but one where log-probabilities are asked for;
    or, where there are drafts, one and what they have right.
    """
    tells = self._tells
    self._add(1 if tells else count, self._draft())
    return self._news(self._runner.run(_tell, self._state) if tells else None)

  def warm(self) -> None:
    """Has the programs compiled that add tokens to free lanes, which leave them as they are."""
    for how in (sampling_lib.Sampling(), sampling_lib.Sampling(min_tokens=1)):  # without constraints, and with them
      self._given = self._make_given([FREE._replace(sampling=how)] * len(self.requests))
      self._owners = [*range(len(self.requests))]
      self._add(0, None)
      if self.drafting is not None:
        self._add(0, self.drafting.drafts({}, self._vocabulary.pad))
    if self.drafting is not None:
      self._state = self._runner.run(drafts_lib.copy, self._state, np.int32(0), np.int32(0))
    self._given = None

  def _add(self, count: int, drafts: drafts_lib.Drafts | None) -> None:
    """Adds up to `count` tokens to every request; or, with drafts, one and what they have right."""
    rows, draws, constraints = self._make_ready()
    state, (stops_V, suppressed_V, _) = self._named(self._state), self._vocabulary
    program, how = (decode.decode, np.int32(count)) if drafts is None else (drafts_lib.verify, drafts)
    self._state = self._runner.run(program, rows, state, draws, suppressed_V, stops_V, how, constraints)

  def _make_ready(self) -> Any:
    """Returns what is known of every lane's request: its own, or that which it reads for."""
    owners = self._owners_now()
    if self._given is None or owners != self._owners:
      self._owners, self._given = owners, self._make_given([self.requests[owner] or FREE for owner in owners])
    return self._given

  def _owners_now(self) -> list[int]:
    """Returns of each lane the one that it reads for: its own, or another's."""
    count = len(self.requests)
    return [*range(count)] if self.drafting is None else [self.drafting.owner(lane) for lane in range(count)]

  def _draft(self) -> drafts_lib.Drafts | None:
    """Returns which free lanes read what in the next pass, once they have the caches for it."""
    if self.drafting is None:
      return None
    drafted = self.drafting.draft(self._state)
    for lane, other in self.drafting.deal(drafted):
      self._state = self._runner.run(drafts_lib.copy, self._state, np.int32(lane), np.int32(other))
    return self.drafting.drafts(drafted, self._vocabulary.pad) if self.drafting.reads else None

  def _news(self, told: Any) -> list[News]:
    step_B, done_B, finite_B, generated_BT, told = jax.device_get(
      (self._state.step_B, self._state.done_B, self._state.finite_B, self._state.generated_BT, told)
    )
    there = [lane for lane, request in enumerate(self.requests) if request is not None]
    news = []
    for lane in there:
      tokens = generated_BT[lane, self._taken[lane] : step_B[lane]].tolist()
      news.append(News(lane, tokens, self._told(lane, told), bool(done_B[lane]), bool(finite_B[lane])))
      self._taken[lane] = int(step_B[lane])
      if not finite_B[lane]:
        self._spoilt |= {other for other, owner in enumerate(self._owners_now()) if owner == lane}
      if self.drafting is not None:
        self.drafting.add(lane, tokens)
    return news

  def _told(self, lane: int, told: Any) -> list[Told]:
    request = self.requests[lane]
    if request is None or request.logprobs is None:
      return []
    chosen_B, ids_BK, logprobs_BK = told
    likeliest = zip(ids_BK[lane].tolist(), logprobs_BK[lane].tolist())
    return [Told(float(chosen_B[lane]), list(likeliest)[: request.logprobs])]

  def follow(self, state: decode.State, count: int) -> dict[int, list[int]]:
    """Returns up to `count` tokens that each lane's request would say next, from where another model's lanes are.

    Keys and values of the text until there must be in the cache, in the same places.
    """
    self.grow(state.slots)
    behind = dataclasses.replace(state, cache=None, logits_BV=None)
    self._state = self._runner.run(_follow, self._state, behind)
    self._add(count, None)
    step_B, generated_BT = jax.device_get((self._state.step_B, self._state.generated_BT))
    first_B = jax.device_get(state.step_B)
    there = [lane for lane, request in enumerate(self.requests) if request is not None]
    return {lane: generated_BT[lane, first_B[lane] : step_B[lane]].tolist() for lane in there}

  def room(self) -> int:
    """Returns how many tokens every row can take before the cache must grow."""
    used = [len(each.prompt.tokens) - 1 + taken for each, taken in zip(self.requests, self._taken) if each is not None]
    return self.slots - max(used, default=0)

  def _named(self, state: decode.State) -> decode.State:
    """Returns the state with one name for how its tokens and logits lie: XLA calls [1, T] split over axes of one
    device, at will, and JAX would compile the program again for another name.
    """
    placement = self._runner.placement
    tokens_BT = jax.device_put(state.generated_BT, placement.replicated)
    logits_BV = jax.device_put(state.logits_BV, placement.logits(len(self.requests)))
    return dataclasses.replace(state, generated_BT=tokens_BT, logits_BV=logits_BV)

  def _make_given(self, requests: list[Request]) -> Any:
    return self._runner.on_devices(given(requests, self._runner.config, self._vocabulary.pad, self._few_programs))


def given(requests: Sequence[Request], config: config_lib.GLMConfig, pad: int, few_programs: bool = False) -> Any:
  """Returns what the program takes besides the state for these lanes: rows, draws and constraints, on the host."""
  prompts = [each.prompt for each in requests]
  samplings = [each.sampling for each in requests]
  rows = decode.known_rows(prompts, [each.limit for each in requests], pad, len(requests))
  draws = sampling_lib.draws(samplings, [each.seed for each in requests], few_programs)
  return rows, draws, constraints_lib.make(prompts, samplings, len(requests), config.vocab_size)


def new_tokens(config: config_lib.GLMConfig) -> int:
  """Returns for how many tokens of each row there is room in the state: as many as the model can take."""
  return rows_lib.bucket(config.max_length)


def slot_bytes(runner: runner_lib.Runner, lanes: int) -> int:
  """Returns the bytes of one slot of the cache of so many lanes, all devices together."""
  with runner.placement.scope():
    cache = jax.eval_shape(lambda: kv_cache.empty(partitioning.target(), runner.config, lanes, 1))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


@functools.partial(jax.jit, static_argnames=("config", "lanes", "slots", "new_tokens"))
def free(config: config_lib.GLMConfig, params: Any, lanes: int, slots: int, new_tokens: int) -> decode.State:
  """Returns the state of lanes that are all free."""
  del params
  number = jnp.zeros(lanes, jnp.int32)
  return decode.constrain(
    decode.State(
      cache=kv_cache.empty(partitioning.target(), config, lanes, slots),
      length_B=number,
      step_B=number,
      last_B=number,
      generated_BT=jnp.full((lanes, new_tokens), decode.UNUSED, jnp.int32),
      done_B=jnp.ones(lanes, bool),
      finite_B=jnp.ones(lanes, bool),
      logits_BV=jnp.zeros((lanes, config.vocab_size), jnp.float32),
    )
  )


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _follow(config: config_lib.GLMConfig, params: Any, state: decode.State, other: decode.State) -> decode.State:
  """Returns the state with its own cache, come as far as another's, of which copies are taken: both are given away."""
  del config, params
  other = jax.tree.map(jnp.copy, other)
  return decode.constrain(dataclasses.replace(other, cache=state.cache, logits_BV=state.logits_BV))


@functools.partial(jax.jit, static_argnames=("config",))
def _tell(config: config_lib.GLMConfig, params: Any, state: decode.State) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the last tokens' log-probabilities [B], and the likeliest tokens with theirs [B, MOST]."""
  del params
  logprobs_BV = jax.nn.log_softmax(state.logits_BV)
  found_BK, ids_BK = jax.lax.top_k(logprobs_BV, min(MOST, config.vocab_size))
  return jnp.take_along_axis(logprobs_BV, state.last_B[:, None], axis=1)[:, 0], ids_BK, found_BK


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _clear(config: config_lib.GLMConfig, params: Any, state: decode.State, lane: jax.Array) -> decode.State:
  """Returns the state with zeros in the cache of a lane."""
  del config, params

  def clear(x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, jnp.zeros(x.shape[1:], x.dtype), lane, 0)

  return decode.constrain(dataclasses.replace(state, cache=jax.tree.map(clear, state.cache)))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def put(
  config: config_lib.GLMConfig, params: Any, state: decode.State, read: decode.State, lane: jax.Array
) -> decode.State:
  """Returns the state with the first row of `read` in a lane; on a mesh others fill its batch."""
  del config, params

  def put_row(x: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, row[:1], (lane, *[jnp.int32(0)] * (x.ndim - 1)))

  return decode.constrain(jax.tree.map(put_row, state, read))
