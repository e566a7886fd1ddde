"""A server over a real socket, for tests: of a model whose tokens are letters, or of any other."""

import asyncio
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import engine_models
import uvicorn
import xla_flags

from glmjax.infer import engine
from glmjax.infer import scheduler
from glmjax.serve import app
from glmjax.serve import limits
from glmjax.serve import run


class Letters(engine_models.Letters):
  def decode_bytes(self, ids, show_special=False, dummy_prefix=True):
    if show_special and len(ids) == 1 and ids[0] >= self.specials.mask:
      return f"<{ids[0]}>".encode()
    return self.decode(ids).encode()

  def encode(self, text, allow_special=False):
    return [10 + engine_models.TEXT.index(letter if letter in engine_models.TEXT else " ") for letter in text]


def letters() -> engine.Engine:
  found = engine_models.make("rotary_2d", drafts=3)
  found.tokenizer = found._reader._tokenizer = Letters()
  return found


class Running:
  """A server in a thread."""

  def __init__(self, ask: engine.Engine | None = None, log_prompts: bool = False, seconds: float = 30.0, **settings):
    """`seconds`: for heads and bodies of requests."""
    capacity = scheduler.Capacity(4, 8, few_programs=True)
    self.server = app.Server(ask or letters(), "letters", capacity, **settings)
    self.app = app.create(self.server, limits.Limits(body_bytes=20_000, body_seconds=seconds), log_prompts)
    self.socket = socket.create_server(("127.0.0.1", 0))
    self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
    heads = type("Heads", (limits.Heads,), {"seconds": seconds})
    self.listener = run._Listener(uvicorn.Config(self.app, http=heads, log_config=None))
    self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()))

  async def serve(self):
    self.server.begin()
    await self.listener.serve([self.socket])

  def __enter__(self):
    self.thread.start()
    while not self.listener.started:
      time.sleep(0.01)
    return self

  def __exit__(self, *_):
    assert self.server.service.end(300)
    self.listener.should_exit = True
    self.thread.join(300)
    assert not self.thread.is_alive()

  def post(self, path: str, body, **headers) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json", **headers})
    try:
      with urllib.request.urlopen(request, timeout=300) as answer:
        return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
      return error.code, json.loads(error.read())

  def get(self, path: str) -> tuple[int, bytes]:
    try:
      with urllib.request.urlopen(self.address + path, timeout=300) as answer:
        return answer.status, answer.read()
    except urllib.error.HTTPError as error:
      return error.code, error.read()

  def idle(self) -> None:
    """Waits until no job waits or has a lane."""
    ends = time.monotonic() + 120
    while self.server.service.running or self.server.service.waiting:
      assert time.monotonic() < ends
      time.sleep(0.02)


@contextlib.contextmanager
def started(
  folder: pathlib.Path, *flags: str, xla: str = xla_flags.CHEAP
) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
  """Yields `glmjax serve` of a run, in a process of its own that is ready, its address, and the lines of its log.

  `xla`: its flags of XLA.
  """
  main = [sys.executable, "-c", "import sys; from glmjax import cli; sys.exit(cli.main())"]
  env = {**os.environ, "XLA_FLAGS": xla}
  command = [*main, "serve", f"--checkpoint={folder}", "--port=0", *flags]
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
  said: list[str] = []
  hearing = threading.Thread(target=lambda: said.extend(process.stderr))  # it would wait for who reads its log
  try:
    while not (found := re.search(r"run at (http://127\.0\.0\.1:\d+).*only this machine", "".join(said))):
      assert (line := process.stderr.readline()), said
      said.append(line)
    hearing.start()
    yield process, found[1], said
  finally:
    process.kill()
    process.wait()
    if hearing.is_alive():
      hearing.join()
    process.stderr.close()
