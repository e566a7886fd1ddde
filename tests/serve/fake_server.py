"""A server of the chat page for its tests: answers by script, in streams, slowly, or with errors. It has no model."""

import base64
import hashlib
import http.server
import json
import pathlib
import re
import threading
import time

PAGE = pathlib.Path(__file__).parents[2] / "glmjax" / "serve" / "page.html"


def policy(page):
  """The page's Content-Security-Policy: its own script and style by their hashes, requests to its own server."""
  own = {
    tag: base64.b64encode(hashlib.sha256(re.search(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.S)[1].encode()).digest())
    for tag in ("script", "style")
  }
  return (
    f"default-src 'none'; script-src 'sha256-{own['script'].decode()}'; style-src 'sha256-{own['style'].decode()}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
  )


class Server(http.server.ThreadingHTTPServer):
  """Serves the page, and answers with what its attributes say; `asked` holds the bodies of requests."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.pieces = ["Hello", " there"]  # of every answer
    self.seconds = 0.0  # between two pieces
    self.drop_after = None  # pieces, after which the connection breaks
    self.error_after = None  # pieces, after which the stream tells an error
    self.finish_reason = "stop"
    self.refusals = []  # (status, headers, message) of the next requests to POST
    self.most_messages = 99  # that a question may have
    self.key = None  # that requests must have
    self.fillings = [{"text": "a b c", "places": [[2, 3]], "finish_reason": "stop"}]
    self.asked = []
    self.headers_seen = []
    self.gone = threading.Event()  # a client went away during a stream

  @property
  def address(self):
    return f"http://127.0.0.1:{self.server_address[1]}/"

  def __enter__(self):
    threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return self

  def __exit__(self, *exc):
    self.shutdown()
    self.server_close()

  def handle_error(self, request, client_address):
    """Clients may go away."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *arguments):
    """Says nothing."""

  def do_GET(self):
    if self.path == "/":
      page = PAGE.read_text(encoding="utf-8")
      headers = {
        "Content-Security-Policy": policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
      }
      self._send(200, "text/html; charset=utf-8", page.encode(), headers)
    elif self.path == "/v1/models":
      if self._is_allowed():
        self._json(200, {"object": "list", "data": [{"id": "chatglm-tiny"}, {"id": "poems"}]})
    else:
      self._error(404, "no such page")

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    self.server.headers_seen.append(dict(self.headers))
    if not self._is_allowed():
      return
    self.server.asked.append((self.path, body))
    if self.server.refusals:
      status, headers, message = self.server.refusals.pop(0)
      self._error(status, message, headers)
    elif self.path == "/v1/fill":
      self._fill(body)
    elif len(body["messages"]) > self.server.most_messages:
      self._error(400, "too long", code="context_length_exceeded")
    else:
      self._stream(body)

  def _is_allowed(self):
    if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
      return True
    self._error(401, "a key is needed")
    return False

  def _fill(self, body):
    time.sleep(self.server.seconds)
    choices = [{"index": i, "pieces": [], **each} for i, each in enumerate(self.server.fillings)]
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    self._json(
      200,
      {"id": "fill-1", "object": "fill", "created": 1, "model": body.get("model"), "choices": choices, "usage": usage},
    )

  def _stream(self, body):
    server = self.server
    self.send_response(200)
    self.send_header("Content-Type", "text/event-stream")
    self.send_header("Connection", "close")
    self.end_headers()
    self.close_connection = True
    try:
      self.wfile.write(b": still reading the prompt\r\n\r\n")
      self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
      for i, piece in enumerate(server.pieces):
        if i == server.drop_after:
          return
        if i == server.error_after:
          self._event({"error": {"message": "out of memory", "type": "server_error", "param": None, "code": None}})
          return
        time.sleep(server.seconds)
        self._event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
      self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": server.finish_reason}]})
      if body.get("stream_options", {}).get("include_usage"):
        usage = {"prompt_tokens": 11, "completion_tokens": len(server.pieces), "total_tokens": 11 + len(server.pieces)}
        self._event({"choices": [], "usage": usage})
      self.wfile.write(b"data: [DONE]\n\n")
    except OSError:
      server.gone.set()

  def _event(self, chunk):
    text = json.dumps(
      {"id": "c1", "object": "chat.completion.chunk", "model": "chatglm-tiny", **chunk}, ensure_ascii=False
    )
    self.wfile.write(f"data: {text}\n\n".encode())

  def _error(self, status, message, headers=None, code=None):
    self._json(status, {"error": {"message": message, "type": "error", "param": None, "code": code}}, headers)

  def _json(self, status, content, headers=None):
    self._send(status, "application/json", json.dumps(content).encode(), headers)

  def _send(self, status, kind, body, headers=None):
    self.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body)
