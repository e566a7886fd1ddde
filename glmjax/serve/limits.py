"""What a request may be: its head and its body must be there within seconds; the body is read whole, within bytes, once
its key is known.
"""

import asyncio
import dataclasses
import hmac
import json
from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.http import h11_impl


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds what one request may take."""

  body_bytes: int = 1 << 20
  body_seconds: float = 30.0  # until all of it must be there


class Heads(h11_impl.H11Protocol):
  """HTTP/1.1, where whoever has connected must have sent the head of a request within some seconds."""

  seconds = 30.0

  def connection_made(self, transport: asyncio.Transport) -> None:
    """Gives whoever has connected the time for a first head."""
    super().connection_made(transport)
    self._wait()

  def data_received(self, data: bytes) -> None:
    """Waits again where another request begins, and no longer once its head is there."""
    before = self.cycle  # of a request and its answer
    if self._waits.cancelled() and before is not None and before.response_complete:
      self._wait()
    super().data_received(data)
    if self.cycle is not before:
      self._waits.cancel()

  def connection_lost(self, exc: Exception | None) -> None:
    """Waits no longer."""
    self._waits.cancel()
    super().connection_lost(exc)

  def _wait(self) -> None:
    self._waits = self.loop.call_later(self.seconds, self.transport.close)


OPEN = ("/", "/health", "/ready", "/metrics", "/openapi.json")  # what needs no key


class Keys:
  """ASGI middleware that refuses requests whose key is none of some with 401, before their bodies are read."""

  def __init__(self, app: Any, keys: Sequence[bytes]) -> None:
    """Wraps an application; without any keys nobody is refused."""
    self._app, self._keys = app, keys

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Serves one connection's request."""
    if scope["type"] == "http" and self._keys and scope["path"] not in OPEN:
      given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
      if not any([hmac.compare_digest(given, key) for key in self._keys]):
        await _refuse(send, 401, "no such API key: send Authorization: Bearer KEY")
        return
    await self._app(scope, receive, send)


class Bodies:
  """ASGI middleware that hands on requests whose bodies are there, and refuses others with 413 or 408."""

  def __init__(self, app: Any, limits: Limits) -> None:
    """Wraps an application."""
    self._app, self._limits = app, limits

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Serves one connection's request."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    try:
      async with asyncio.timeout(self._limits.body_seconds):
        body = await self._read(receive)
    except TimeoutError:
      await _refuse(send, 408, f"the request's body did not come within {self._limits.body_seconds:g} s")
      return
    if body is None:
      await _refuse(send, 413, f"the request's body has more than {self._limits.body_bytes} bytes")
      return
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Any:
      return given.pop() if given else await receive()

    await self._app(scope, read, send)

  async def _read(self, receive: Any) -> bytes | None:
    """Returns the body; None: it is too long."""
    body = bytearray()
    while True:
      message = await receive()
      if message["type"] != "http.request":
        return bytes(body)
      body += message.get("body", b"")
      if len(body) > self._limits.body_bytes:
        return None
      if not message.get("more_body"):
        return bytes(body)


async def _refuse(send: Any, status: int, message: str) -> None:
  error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
  headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
  await send({"type": "http.response.start", "status": status, "headers": headers})
  await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
