"""A line in the log for each request."""

import logging
import time
from typing import Any

from glmjax.io import printable

_log = logging.getLogger("glmjax")
_WATCHED = ("/health", "/ready", "/metrics")  # asked every few seconds by what watches a server
_LONGEST_BODY = 10_000  # bytes of it that are logged
_GONE = 499  # the client went before there was an answer; as other servers call it


class Requests:
  """ASGI middleware that logs each request's method, route, status, tokens and seconds, with `prompts` its body too.

  The application puts the reply that it makes, whose usage is logged, into the request's state.
  """

  def __init__(self, app: Any, prompts: bool) -> None:
    """Wraps an application."""
    self._app, self._prompts = app, prompts

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Serves one connection's request."""
    if scope["type"] != "http" or scope["path"] in _WATCHED:
      await self._app(scope, receive, send)
      return
    passing, begun = _Passing(receive, send, _LONGEST_BODY if self._prompts else 0), time.monotonic()
    try:
      await self._app(scope, passing.receive, passing.send)
    except Exception:
      passing.status = 500
      raise
    finally:
      _log.info("%s", printable.line(self._line(scope, passing, time.monotonic() - begun), 2 * _LONGEST_BODY))

  def _line(self, scope: Any, passing: "_Passing", seconds: float) -> str:
    reply = scope.get("state", {}).get("reply")
    usage = reply.usage() if reply is not None else {"prompt_tokens": 0, "completion_tokens": 0}
    tokens = f"{usage['prompt_tokens']}+{usage['completion_tokens']} tokens"
    line = f"{scope['method']} {scope['path'][:200]} {passing.status} {tokens} {seconds:.3f} s"
    return f"{line} {passing.body.decode(errors='replace')}".rstrip()


class _Passing:
  """What passes between a client and the application."""

  def __init__(self, receive: Any, send: Any, most: int) -> None:
    self._receive, self._send, self._most = receive, send, most  # bytes of the body that are kept
    self.status, self.body = _GONE, bytearray()

  async def receive(self) -> Any:
    message = await self._receive()
    self.body += message.get("body", b"")[: self._most - len(self.body)]
    return message

  async def send(self, message: Any) -> None:
    self.status = message.get("status", self.status)
    await self._send(message)
