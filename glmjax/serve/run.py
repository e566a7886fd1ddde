"""The serve command's work: a model behind HTTP, until a signal ends it."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator

import fastapi
import uvicorn

from glmjax import errors
from glmjax import programs
from glmjax.infer import ahead
from glmjax.infer import scheduler
from glmjax.io import paths
from glmjax.serve import app as app_lib
from glmjax.serve import limits as limits_lib
from glmjax.serve import service as service_lib

_log = logging.getLogger("glmjax")
LOCAL = ("127.0.0.1", "::1", "localhost")
_LEAST_SECONDS = 5  # in which answers that have ended must be read, once the server ends
_WARM, _WARM_TOKENS = "warm", 2  # a prompt that has the programs compiled, and how far it is answered


class _Listener(uvicorn.Server):
  """uvicorn without its own signal handlers: a signal first lets running answers end."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Leaves signals to `run`."""
    yield


def run(server: app_lib.Server, app: fastapi.FastAPI, host: str, port: int, drain_seconds: float) -> None:
  """Serves until SIGTERM or SIGINT; running answers may end, new requests get 503.

  Raises:
    errors.InputError: when nothing can listen at that address.
  """
  if not asyncio.run(_run(server, app, host, port, drain_seconds)):
    logging.shutdown()
    os._exit(0)  # Python's own end would abort, as the model still computes


async def _run(server: app_lib.Server, app: fastapi.FastAPI, host: str, port: int, drain_seconds: float) -> bool:
  """Serves; tells whether all answers that had begun have ended."""
  config = uvicorn.Config(app, http=limits_lib.Heads, log_config=None, access_log=False, timeout_keep_alive=30)
  listener, ended = _Listener(config), asyncio.Event()
  loop = asyncio.get_running_loop()
  for number in (signal.SIGTERM, signal.SIGINT):
    loop.add_signal_handler(number, ended.set)
  listening = _listen(host, port)
  server.begin()
  serving = asyncio.ensure_future(listener.serve([listening]))
  told = asyncio.ensure_future(ended.wait())
  warmed = asyncio.ensure_future(_warm(server))
  await asyncio.wait((serving, told, warmed), return_when=asyncio.FIRST_COMPLETED)
  failure = warmed.exception() if warmed.done() else None
  if warmed.done() and failure is None:
    server.ready = True
    where = "only this machine reaches it" if host in LOCAL else "others reach it"
    _log.info("%s at http://%s:%d, and a page to chat (%s)", server.name, host, listening.getsockname()[1], where)
    await asyncio.wait((serving, told), return_when=asyncio.FIRST_COMPLETED)
  server.ready, begun = False, time.monotonic()
  _log.info("ends: waits up to %.0f s for %d running answers", drain_seconds, server.service.running)
  if not (ended_all := await asyncio.to_thread(server.service.end, drain_seconds)):
    _log.warning("%d answers had not ended", server.service.running)
  # Who reads slowly may have the rest of the time for an answer that has ended.
  config.timeout_graceful_shutdown = max(_LEAST_SECONDS, int(drain_seconds - (time.monotonic() - begun)))
  listener.should_exit = True
  await serving
  if failure is not None:
    raise failure
  return ended_all


def _listen(host: str, port: int) -> socket.socket:
  try:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
  except OSError as error:
    reason = errors.reason(error)
    raise errors.InputError(
      f"nothing can listen at {host}:{port} ({reason}): choose another --host or --port"
    ) from error


def first(capacity: scheduler.Capacity) -> ahead.First:
  """Returns what a server asks its model first."""
  return ahead.First([_WARM], _WARM_TOKENS, capacity=capacity)


async def _warm(server: app_lib.Server) -> None:
  """Has the programs compiled that a first request would wait for, by the service itself: those of its lanes."""
  begun = time.monotonic()
  job = service_lib.Job(server.engine.encode(_WARM), max_tokens=_WARM_TOKENS)
  asked = server.answers.ask([job], measured=False)
  try:
    async for _, event in asked.events():
      if isinstance(event, service_lib.End) and event.error is not None:
        raise event.error
  finally:
    asked.close()
  _log.info("%s, in %.1f s", programs.counts, time.monotonic() - begun)


def read_keys(file: paths.Named) -> list[str]:
  """Returns the keys of a file, one a line; raises InputError where there is none."""
  path = paths.named(file, "--api_keys")
  try:
    keys = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]  # with a BOM or without
  except (OSError, UnicodeDecodeError) as error:
    raise errors.InputError(f"--api_keys: cannot read {path}: {errors.one_line(error)}") from error
  if not (keys := [key for key in keys if key]):
    raise errors.InputError(f"--api_keys: {path} holds no key: write one a line")
  return keys
