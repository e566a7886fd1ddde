"""Jobs of a request, and their events as they come, within the event loop of the server."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from glmjax import errors
from glmjax.serve import metrics as metrics_lib
from glmjax.serve import service as service_lib


class Answers:
  """Hands each job's events to who waits for them."""

  def __init__(self, metrics: metrics_lib.Metrics) -> None:
    """Has no service yet: it is given to `begin`, as it delivers here."""
    self.metrics = metrics
    self.asked: dict[service_lib.Job, Asked] = {}
    self._loop: asyncio.AbstractEventLoop | None = None
    self.service: service_lib.Service

  def begin(self, service: service_lib.Service) -> None:
    """Takes events from here on, in the running event loop."""
    self.service, self._loop = service, asyncio.get_running_loop()

  def deliver(self, events: service_lib.Events) -> None:
    """Takes events from the service's thread."""
    assert self._loop is not None
    self._loop.call_soon_threadsafe(self._hand_out, events)

  def _hand_out(self, events: service_lib.Events) -> None:
    served = sum(isinstance(event, service_lib.Part) and bool(event.tokens) for event in events)
    if served:
      self.metrics.batch.observe(served)
    for event in events:
      if (asked := self.asked.get(event.job)) is not None:
        asked.take(event)

  def check_count(self, count: int) -> None:
    """Raises InputError for more answers at once than can ever wait."""
    if count > max(1, most := self.service.most_waiting):
      raise errors.InputError(f"{count} answers are asked for at once, and {most} may wait: ask for fewer")

  def ask(self, jobs: Sequence[service_lib.Job], measured: bool = True) -> "Asked":
    """Submits jobs; their events come from what is returned, which must be closed. `measured`: they count in metrics.

    Raises:
      service.Refused: when they are not taken.
      errors.InputError: when they are more than can ever wait, or the model has no room for one.
    """
    self.check_count(len(jobs))
    asked = Asked(self, jobs, measured)
    try:
      for job in jobs:
        self.asked[job] = asked
        self.service.submit(job)
    except BaseException:
      asked.close()
      raise
    return asked


class Asked:
  """Jobs whose events somebody waits for."""

  def __init__(self, answers: Answers, jobs: Sequence[service_lib.Job], measured: bool) -> None:
    """Listens for the events of these jobs."""
    self._answers, self._jobs, self._measured = answers, jobs, measured
    self._queue: asyncio.Queue = asyncio.Queue()
    self._begun = time.monotonic()
    self._last: dict[service_lib.Job, float] = {}  # when each job's last tokens came

  def take(self, event: service_lib.Event) -> None:
    """Takes an event, and measures when it comes: whoever reads may be slow."""
    metrics, stops = self._answers.metrics, self._answers.service.engine.stops
    if self._measured and isinstance(event, service_lib.Part) and event.tokens:
      now, last = time.monotonic(), self._last.get(event.job)
      metrics.new_tokens.inc(sum(token not in stops for token in event.tokens))
      if last is None:
        metrics.first_token.observe(now - self._begun)
      else:
        for _ in event.tokens:  # several come at a time
          metrics.next_token.observe((now - last) / len(event.tokens))
      self._last[event.job] = now
    self._queue.put_nowait(event)

  async def events(self) -> AsyncIterator[tuple[int, service_lib.Event]]:
    """Yields (number of the job, event) until all jobs have ended."""
    numbers, left = {job: i for i, job in enumerate(self._jobs)}, len(self._jobs)
    while left:
      event = await self._queue.get()
      left -= isinstance(event, service_lib.End)
      yield numbers[event.job], event

  def close(self) -> None:
    """Ends what has not ended."""
    for job in self._jobs:
      self._answers.asked.pop(job, None)
      self._answers.service.cancel(job)
