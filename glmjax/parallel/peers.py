"""How the processes of a run notice that one of them has died, hangs, or has given up.

Each process says every few seconds which step it is at, under its own key of JAX's coordination service. Process 0
reads them all and gives a verdict, which ends every process with one line; the others watch process 0.
"""

import contextlib
import dataclasses
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from glmjax import ranges
from glmjax.parallel import distributed

_VERDICT = "glmjax/verdict"  # of the service's keys: exit status, a space, and the reason
_TRAIN_AGAIN = "start the run again, on as many hosts as there are: it goes on from the last checkpoint"

_log = logging.getLogger("glmjax")


@dataclasses.dataclass(frozen=True)
class Watch:
  """When a process of a run on several counts as gone; all others then end, with one line and status 1.

  A process that ends by itself gives the others its status: all are done, mistaken or stopped alike.
  """

  silent_seconds: float = 30  # without a sign of life: it was killed, or lost its network
  hung_seconds: float = 900  # in the same step, saving and evaluating apart; 0: for ever

  def __post_init__(self) -> None:
    ranges.number("Watch.silent_seconds", self.silent_seconds, 1)
    ranges.number("Watch.hung_seconds", self.hung_seconds, 0)

  @contextlib.contextmanager
  def on(self, advice: str = _TRAIN_AGAIN) -> Iterator["Peers"]:
    """Watches within it; `advice` goes with a verdict.

    An error of the transport waits there for the verdict, which says whose death it tells.
    """
    peers = Peers(self, advice)
    if distributed.joined():
      peers.start()
    try:
      yield peers
    except Exception as error:
      if distributed.joined() and _may_be_a_peers(error):
        peers.await_verdict()
      raise
    finally:
      peers.stop()


class Peers:
  """The other processes of the run; with none, nothing happens."""

  def __init__(self, settings: Watch, advice: str):
    self._settings, self._advice = settings, advice
    self.interval = min(2.0, settings.silent_seconds / 10)
    self._step, self._since = 0, None  # the step last begun, and when; None: nothing is expected to be quick
    self._stopping = threading.Event()
    self._talked = time.monotonic()
    self._threads: list[threading.Thread] = []

  def at(self, step: int) -> None:
    """Notes that the step has been begun."""
    self._step, self._since = step, time.monotonic()

  @contextlib.contextmanager
  def patient(self) -> Iterator[None]:
    """Enters a scope in which a step may take its time: it saves or evaluates."""
    self._since = None
    yield
    self._since = time.monotonic()

  def start(self) -> None:
    """Begins to talk and to watch."""
    self._threads = [
      threading.Thread(target=work, daemon=True, name=f"peers {work.__name__}") for work in (self._talk, self._listen)
    ]
    for thread in self._threads:
      thread.start()

  def stop(self) -> None:
    """Ends that; the others take no harm from silence that was announced."""
    self._stopping.set()
    for thread in self._threads:
      thread.join(2 * self.interval)  # longer only where the service has gone
    if self._threads:
      distributed.within(self.interval, lambda: self._say("{}"))

  def await_verdict(self) -> None:
    """Returns if there is none; otherwise the process ends in here."""
    if not self._stopping.wait(self._settings.silent_seconds + 4 * self.interval):
      return
    time.sleep(60)  # in which `_end` ends it

  def _say(self, message: str) -> None:
    distributed.client().key_value_set(
      f"{distributed.MESSAGES}{distributed.process_id()}", message, allow_overwrite=True
    )

  def _talk(self) -> None:
    """Says where this process is, and looks for the verdict; in process 0, gives it."""
    client, first = distributed.client(), distributed.process_id() == 0
    host, beat, judge = socket.gethostname(), 0, _Judge(self._settings)
    while not self._stopping.is_set():
      beat += 1
      waits = 0 if self._since is None else time.monotonic() - self._since
      try:
        self._say(json.dumps({"beat": beat, "host": host, "step": self._step, "waits": waits}))
        said = dict(client.key_value_dir_get(distributed.MESSAGES)) if first else _of_first(client)
        self._talked = time.monotonic()
        verdict = judge.verdict(said)
        status = judge.status
        if verdict and first:
          client.key_value_set(_VERDICT, f"{status} {verdict}", allow_overwrite=True)
        if verdict is None and not first:  # waiting for it, a process hears at once that the service is gone
          number, verdict = client.blocking_key_value_get(_VERDICT, int(self.interval * 1000)).split(" ", 1)
          status = int(number)
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
          continue
        # At once: JAX's own client hears of it too, and aborts this process in its own words.
        self._end(f"process 0 has died or cannot be reached ({str(error).splitlines()[0][:120]})", 1, seconds=1)
        return
      if verdict:
        if not self._stopping.wait(self.interval):  # an error that all have met each tells by itself
          self._end(verdict, status, len(judge.gone))
        return
      self._stopping.wait(self.interval)

  def _listen(self) -> None:
    """Notices that the service no longer answers: process 0 is stopped, or its network is cut."""
    while not self._stopping.wait(self.interval):
      silent = time.monotonic() - self._talked
      if silent > self._settings.silent_seconds + 2 * self.interval:
        self._end(f"process 0 has not answered for {silent:.0f} s: it is stopped or has lost its network", 1, seconds=1)

  def _end(self, verdict: str, status: int, gone: int = 0, seconds: float = 10) -> None:
    if self._stopping.is_set():
      return
    self._stopping.set()
    _log.error("%s; %s", verdict, self._advice)
    distributed.leave(status, verdict, gone, seconds)


def _may_be_a_peers(error: Exception) -> bool:
  """Tells whether the error may be of another process's death: what the device or the transport says, but for our
  own.
  """
  own = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
  return "Gloo" in str(error) or isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(own)


def _of_first(client: Any) -> dict[str, str]:
  """Returns what process 0 says, if it has begun to."""
  name = f"{distributed.MESSAGES}0"
  try:
    return {name: client.key_value_try_get(name)}
  except jax.errors.JaxRuntimeError as error:
    if "NOT_FOUND" in str(error):
      return {}
    raise


class _Judge:
  """Tells from what the processes say which of them is gone."""

  def __init__(self, settings: Watch):
    self._settings = settings
    self._last: dict[str, tuple[str, float]] = {}  # what each said last, and when it was new
    self.gone: list[str] = []  # of which nothing more will be heard
    self.status = 1  # that the others end with: of the first that has ended by itself, if that is the reason

  def verdict(self, said: dict[str, str]) -> str | None:
    """Returns the reason to end the run, if there is one."""
    now = time.monotonic()
    left, self.gone, states = [], [], {}
    for name, message in said.items():
      number = name.removeprefix(distributed.MESSAGES)
      if ended := distributed.left(message):
        self.status = self.status if left else ended[0]
        left.append(f"process {number} has ended: {ended[1]}")
        continue
      state = json.loads(message)
      if not state:  # it has stopped watching: its part is done
        self._last.pop(name, None)
        continue
      states[number] = state
      if self._last.get(name, ("", 0))[0] != message:
        self._last[name] = message, now
      elif now - self._last[name][1] > self._settings.silent_seconds:
        at = f" (it was at step {state['step']:,})" if state["step"] else ""
        self.gone.append(
          f"process {number} on {state['host']} has not been heard of for {now - self._last[name][1]:.0f} s{at}: "
          "it was killed, is stopped or has lost its network"
        )
    return next(iter(left + self.gone), None) or (self._hung(states) if len(said) > 1 else None)

  def _hung(self, states: dict[str, dict[str, Any]]) -> str | None:
    limit = self._settings.hung_seconds
    if not limit or not any(state["waits"] > limit for state in states.values()):
      return None
    behind = min(state["step"] for state in states.values())
    who = [f"{number} on {state['host']}" for number, state in states.items() if state["step"] == behind]
    if len(who) == len(states) > 1:
      who = ["all"]
    return f"nothing has moved for {limit:g} s; the last step begun by process {', '.join(who[:4])} is step {behind}"
