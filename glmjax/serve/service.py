"""The service: one thread that owns a model, and answers jobs that come and go.

Whose turn it is goes round among the keys that wait, so that nobody's thousand jobs keep out another's one.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from glmjax import errors
from glmjax.infer import chat
from glmjax.infer import decode
from glmjax.infer import engine as engine_lib
from glmjax.infer import filling as filling_lib
from glmjax.infer import lanes as lanes_lib
from glmjax.infer import pieces
from glmjax.infer import sampling as sampling_lib
from glmjax.infer import scheduler as scheduler_lib

_log = logging.getLogger("glmjax")
# Tokens come together that take no longer than this: a round, and each hand-out, costs some milliseconds besides them.
_ROUND_SECONDS, _MOST_TOKENS = 0.02, 16


class Refused(Exception):
  """A job that is not taken: the queue is full, or the service is ending."""


@dataclasses.dataclass(eq=False, frozen=True)
class Job:
  """One answer that somebody waits for."""

  row: Sequence[int]  # framed by Engine.encode; its blanks are filled one after the other
  max_tokens: int  # for each blank; 0: there is nothing to fill, but something to score
  sampling: sampling_lib.Sampling = sampling_lib.Sampling()
  seed: int = 0
  logprobs: int | None = None  # as lanes.Request has it
  scored: Sequence[int] | None = None  # a text whose tokens' log-probabilities are told before all else
  stops: Sequence[str] = ()  # strings that end the text, and are no part of it
  clean: bool = False  # shown as ChatGLM shows replies
  adapter: str | None = None  # the name of the one that answers; None: the model alone
  key: str = ""  # whose it is


class Scored(NamedTuple):
  """How likely the tokens of a job's `scored` are, each behind those before it."""

  job: Job
  told: list[lanes_lib.Told]


class Part(NamedTuple):
  """What has been added to a job's answer."""

  job: Job
  text: str
  tokens: list[int]
  told: list[lanes_lib.Told]  # of each token, where the job asks for it


class End(NamedTuple):
  """A job's last word."""

  job: Job
  filled: filling_lib.Filled
  finish_reason: str  # stop or length; "" where `error` says why there is no more
  error: Exception | None = None


Event = Scored | Part | End
Events = list[Event]
_NOTHING = filling_lib.Filled([], [], [], "")


class Service:
  """A model at work in a thread of its own; all methods may be called from any other."""

  def __init__(
    self,
    engine: engine_lib.Engine,
    capacity: scheduler_lib.Capacity,
    most_waiting: int,
    deliver: Callable[[Events], None],
  ) -> None:
    """Makes a service that has not begun.

    Args:
      engine: the model.
      capacity: how much is answered at the same time.
      most_waiting: jobs that wait at most, beside those that are answered.
      deliver: is called in the service's thread with what has happened, after every round.
    """
    self.engine, self.most_waiting, self._deliver = engine, most_waiting, deliver
    self._capacity = capacity
    self._scheduler = self._new_scheduler()
    self._queues: collections.OrderedDict[str, collections.deque[Job]] = collections.OrderedDict()
    self._running: dict[scheduler_lib.Answer, _Running] = {}
    self._gone: set[Job] = set()
    self._count = 1  # tokens of a round
    self._scored: Scored | None = None  # the last: answers to one prompt come one after the other
    self._change = threading.Condition()
    self._ending = False
    self._thread = threading.Thread(target=self._work, name="model", daemon=True)

  def start(self) -> None:
    """Starts the thread."""
    self._thread.start()

  def submit(self, job: Job) -> None:
    """Takes a job.

    Raises:
      Refused: when too many wait, or the service is ending.
      errors.InputError: when the model has no room for the row, or memory has none, or the job's settings cannot be.
    """
    if job.max_tokens:
      self.engine.room(job.row)
      self._scheduler.check(*self.engine.filling(job.row, job.max_tokens, job.adapter).longest())
    self.engine.check(job.sampling, job.max_tokens)
    pieces.Stops(job.stops)
    with self._change:
      if self._ending:
        raise Refused("the server is ending: ask another, or again later")
      queue = self._queues.get(job.key, ())
      share = self.most_waiting // (len(self._queues) + (not queue))  # so that nobody's jobs keep out another's
      if self.waiting >= self.most_waiting and len(queue) >= share:
        raise Refused(f"{self.waiting} requests wait already: try again later")
      self._queues.setdefault(job.key, collections.deque()).append(job)
      self._change.notify()

  def cancel(self, job: Job) -> None:
    """Ends a job, whose last event may be under way; one that has ended is no mistake."""
    with self._change:
      if job in (queue := self._queues.get(job.key, ())):
        queue.remove(job)
        if not queue:
          del self._queues[job.key]
      else:
        self._gone.add(job)
        self._change.notify()

  @property
  def waiting(self) -> int:
    """How many jobs wait for a lane."""
    with self._change:
      return sum(map(len, self._queues.values()))

  @property
  def running(self) -> int:
    """How many jobs have a lane, or are on their way into one."""
    return len(self._running)

  def figures(self) -> dict[str, int]:
    """Returns what the model has at hand now: bytes of caches and of contexts that are kept, and drafts so far."""
    scheduler = self._scheduler
    return {
      "cache_bytes": scheduler.cache_bytes,
      "context_bytes": scheduler.contexts.bytes,
      "draft_tokens": scheduler.drafted.read,
      "draft_tokens_right": scheduler.drafted.right,
    }

  def end(self, seconds: float) -> bool:
    """Takes no more jobs, and waits until those that are there have ended; tells whether all did in that time."""
    with self._change:
      self._ending = True
      self._change.notify()
    self._thread.join(seconds)
    return not self._thread.is_alive()

  def _work(self) -> None:
    try:
      self._scheduler.warm()
    except Exception as error:  # what is asked first then fails with the same
      _log.error("the model failed: %s", errors.one_line(error))
      self._scheduler = self._new_scheduler()
    while True:
      with self._change:
        while not (self._queues or self._running or self._gone or self._ending):
          self._change.wait()
        if self._ending and not (self._queues or self._running):
          return
        gone, self._gone = self._gone, set()
        jobs = self._next_jobs()
      events: Events = []
      try:
        self._leave(gone)
        for job in jobs:
          self._begin(job, events)
        self._advance(events)
      except Exception as error:  # of the model: what it was asked has failed, what comes next may not
        _log.error("the model failed: %s", errors.one_line(error))
        ended = {event.job for event in events if isinstance(event, End)}
        held = {each.job: each.filling.filled() for each in self._running.values()}
        events += [
          End(job, held.get(job, _NOTHING), "", error) for job in {**held, **dict.fromkeys(jobs)} if job not in ended
        ]
        self._running.clear()
        self._scheduler = self._new_scheduler()
      if events:
        self._deliver(events)

  def _new_scheduler(self) -> scheduler_lib.Scheduler:
    return self.engine.scheduler(**dataclasses.asdict(self._capacity))

  def _next_jobs(self) -> list[Job]:
    """Takes as many jobs as there are lanes for, a key's after the other's, and those that need none; one at most that
    scores, while the others wait.
    """
    jobs: list[Job] = []
    free = self._scheduler.free
    while self._queues and not (jobs and jobs[-1].scored is not None):
      key, queue = next(iter(self._queues.items()))
      needs_lane = queue[0].max_tokens > 0
      if needs_lane and free <= 0:
        break
      free -= needs_lane
      jobs.append(queue.popleft())
      del self._queues[key]
      if queue:
        self._queues[key] = queue
    return jobs

  def _leave(self, gone: set[Job]) -> None:
    for answer, running in list(self._running.items()):
      if running.job in gone:
        self._scheduler.cancel(answer)
        del self._running[answer]

  def _begin(self, job: Job, events: Events) -> None:
    if job.scored is not None:
      try:
        events.append(self._score(job, job.scored))
      except Exception as error:  # of this text alone
        _log.error("scoring failed: %s", errors.one_line(error))
        events.append(End(job, _NOTHING, "", error))
        return
    if not job.max_tokens:
      events.append(End(job, _NOTHING, "length"))
      return
    running = _Running(job, self.engine)
    request = running.request()
    assert request is not None, "a row has a blank, and room was found for it"
    self._running[self._scheduler.submit(request)] = running

  def _round(self) -> list[tuple[scheduler_lib.Answer, list[int]]]:
    """Returns next tokens, as many of each answer as come in a moment; where all have just begun, the first ones."""
    if not any(answer.tokens for answer in self._running):
      return self._scheduler.advance()
    begun = time.monotonic()
    news = self._scheduler.advance(self._count)
    seconds = time.monotonic() - begun
    if seconds > _ROUND_SECONDS:
      self._count = max(1, self._count // 2)
    elif any(len(tokens) >= self._count for _, tokens in news) and (
      seconds * (self._count + 1) < _ROUND_SECONDS * self._count
    ):
      self._count = min(self._count + 1, _MOST_TOKENS)
    return news

  def _score(self, job: Job, tokens: Sequence[int]) -> Scored:
    """Scores in one pass: always alone, so that the figures are the same whoever else is there."""
    if self._scored is None or self._scored.job.scored is not tokens:
      score = self.engine.score_tokens(tokens, lanes_lib.MOST, job.adapter)
      told = [lanes_lib.Told(*each) for each in zip(score.log_probs.tolist(), score.likeliest)]
      self._scored = Scored(job, told)
    return Scored(job, [each._replace(likeliest=each.likeliest[: job.logprobs]) for each in self._scored.told])

  def _advance(self, events: Events) -> None:
    for answer, tokens in self._round():
      running = self._running[answer]
      if not answer.finite:  # of this one alone
        del self._running[answer]
        events.append(_failed(running))
        continue
      text, behind = running.take(tokens)
      del answer.tokens[len(answer.tokens) - behind :], tokens[len(tokens) - behind :]
      told = answer.told[len(answer.told) - len(tokens) :] if running.job.logprobs is not None else []
      done = answer.ended or running.stopped
      if done:
        self._scheduler.cancel(answer)
        del self._running[answer]
        running.filling.take(answer.tokens)
        following = None if running.stopped else running.request()
        if following is not None:
          self._running[self._scheduler.submit(following)] = running
          done = False
      text += running.end() if done else ""
      if text or tokens:
        events.append(Part(running.job, text, tokens, told))
      if done:
        filled = running.filling.filled()
        events.append(End(running.job, filled, "stop" if running.stopped else filled.finish_reason))


def _failed(running: "_Running") -> End:
  """Returns the end of a job whose logits were not finite."""
  error = decode.not_finite()
  _log.error("an answer failed: %s", errors.one_line(error))
  return End(running.job, running.filling.filled(), "", error)


class _Running:
  """A job on its way, and its text."""

  def __init__(self, job: Job, engine: engine_lib.Engine) -> None:
    self.job, self._engine = job, engine
    self.filling = engine.filling(job.row, job.max_tokens, job.adapter)
    self._bytes = pieces.TokenBytes(engine.tokenizer.decode_bytes)
    self._characters: Any = chat.CleanStream() if job.clean else pieces.Characters()
    self._stops = pieces.Stops(job.stops)

  @property
  def stopped(self) -> bool:
    """Whether a stop string has come."""
    return self._stops.stopped

  def request(self) -> lanes_lib.Request | None:
    """Returns the request that fills the next blank; None: there is none."""
    if (blank := self.filling.blank()) is None:
      return None
    seed = filling_lib.turn_seed(self.job.seed, self.filling.turn)
    return lanes_lib.Request(*blank, self.job.sampling, seed, self.job.logprobs)

  def take(self, tokens: Sequence[int]) -> tuple[str, int]:
    """Returns what tokens add to the text, and how many are left behind a stop string."""
    text = ""
    for i, token in enumerate(tokens):
      if token not in self._engine.stops:
        text += self._stops.add(self._characters.add(self._bytes.add(token)))
      if self.stopped:
        return text, len(tokens) - i - 1
    return text, 0

  def end(self) -> str:
    """Returns the text's end: nothing follows."""
    return self._stops.add(self._characters.end()) + self._stops.end()
