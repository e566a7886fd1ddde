"""A server of buckets on the loopback, for the tests: Google's XML interface and Amazon's, which are nearly one.

It keeps objects in memory and is faithful where glmjax leans on it: conditions on generations and ETags, listings in
pages, uploads in parts, ranges, copies. It misbehaves on demand (`Fault`). As a program it prints its address:

    python tests/bucket_server.py --bucket=corpus
"""

import argparse
import collections
from collections.abc import Callable
import dataclasses
import email.utils
import functools
import hashlib
import http.server
import itertools
import json
import threading
import time
import urllib.parse
from xml.etree import ElementTree
from xml.sax import saxutils

PAGE = 1000  # keys of one answer to a listing


@dataclasses.dataclass
class Object:
  """One object, as the server keeps it."""

  data: bytes
  generation: int
  modified: float

  @functools.cached_property
  def etag(self) -> str:
    return f'"{hashlib.md5(self.data, usedforsecurity=False).hexdigest()}-{self.generation}"'


@dataclasses.dataclass(frozen=True)
class Fault:
  """What a request meets instead of its answer."""

  status: int | None = None  # this status, with an error's body
  code: str = "InternalError"
  hang: float = 0.0  # seconds before anything is answered
  cut: int | None = None  # the answer's body breaks off after so many bytes
  drop: bool = False  # the connection is closed, before the request counts
  lose_answer: bool = False  # the request counts, and the connection is closed in place of the answer


class Server:
  """Buckets that live as long as this object is entered.

  Args:
    buckets: their names.
    port: 0: any.
  """

  def __init__(self, *buckets: str, port: int = 0):
    self.objects: dict[str, dict[str, Object]] = {name: {} for name in buckets or ("bucket",)}
    self.requests: collections.Counter[str] = collections.Counter()  # by method and kind
    self.log: list[tuple[str, str]] = []
    self.fault: Callable[[str, str], Fault | None] = lambda method, path: None
    self.latency = 0.0  # seconds before every answer
    self.honors_conditions: set[str] = {"create", "replace"}
    self._uploads: dict[str, dict[int, bytes]] = {}
    self._generations = itertools.count(1)
    self._ids = itertools.count(1)
    self.lock = threading.RLock()
    self._http = _Listener(("127.0.0.1", port), _Handler)
    self._http.server = self
    self.address = f"http://127.0.0.1:{self._http.server_address[1]}"

  def environment(self) -> dict[str, str]:
    """Returns the variables that lead clients of both clouds here."""
    return {
      "STORAGE_EMULATOR_HOST": self.address,
      "AWS_ENDPOINT_URL": self.address,
      "AWS_ACCESS_KEY_ID": "someone",
      "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
      "AWS_REGION": "us-east-1",
    }

  def __enter__(self) -> "Server":
    self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    self._http.shutdown()
    self._http.server_close()

  def keys(self, bucket: str = "bucket", prefix: str = "") -> list[str]:
    """Returns the names of the objects there are, sorted."""
    with self.lock:
      return sorted(key for key in self.objects[bucket] if key.startswith(prefix))

  def data(self, key: str, bucket: str = "bucket") -> bytes:
    """Returns an object's bytes."""
    return self.objects[bucket][key].data

  def put(self, key: str, data: bytes, bucket: str = "bucket") -> None:
    """Writes an object, as another program would."""
    with self.lock:
      self.objects[bucket][key] = Object(data, next(self._generations), time.time())

  def down(self, seconds: float) -> None:
    """Loses every connection from now on for so long."""
    until = time.monotonic() + seconds
    self.fault = lambda method, path: Fault(drop=True) if time.monotonic() < until else None

  def begin_upload(self) -> str:
    name = f"upload-{next(self._ids)}"
    self._uploads[name] = {}
    return name

  def uploads(self) -> dict[str, dict[int, bytes]]:
    """Returns the uploads in parts that were neither completed nor given up."""
    return self._uploads


class _Listener(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 256
  server: Server

  def handle_error(self, request: object, client_address: object) -> None:
    """Says nothing of connections that clients close."""


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers one connection's requests."""

  protocol_version = "HTTP/1.1"
  wbufsize = 1 << 16
  disable_nagle_algorithm = True

  def do_GET(self) -> None:
    self._serve(self._list if not self._key and "list-type" in self._query else self._read)

  def do_HEAD(self) -> None:
    self._serve(self._read)

  def do_PUT(self) -> None:
    self._serve(self._put_part if "partNumber" in self._query else self._copy if self._source else self._put)

  def do_POST(self) -> None:
    deletes, begins = "delete" in self._query, "uploads" in self._query
    self._serve(self._delete_many if deletes else self._begin if begins else self._complete)

  def do_DELETE(self) -> None:
    self._serve(self._abort if "uploadId" in self._query else self._delete)

  @property
  def _server(self) -> Server:
    return self.server.server

  @property
  def _path(self) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")

  @property
  def _query(self) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query, keep_blank_values=True))

  @property
  def _bucket(self) -> str:
    return self._path.split("/", 1)[0]

  @property
  def _key(self) -> str:
    return self._path.partition("/")[2]

  @property
  def _source(self) -> str | None:
    return self.headers.get("x-amz-copy-source") or self.headers.get("x-goog-copy-source")

  def _serve(self, action: Callable[[], None]) -> None:
    self._body, self._fault = self._read_body(), Fault()
    if self._path == "-/requests":  # for who has started this as a program
      return self._answer(200, json.dumps(self._server.requests).encode())
    kind = action.__name__.lstrip("_") if self.command != "HEAD" else "head"
    with self._server.lock:
      self._server.requests[kind] += 1
      self._server.log.append((kind, self._path))
    self._fault = self._server.fault(self.command, self._path) or Fault()
    time.sleep(self._fault.hang + self._server.latency)
    if self._fault.drop:
      return self._break_off()
    if self._fault.status is not None:
      return self._error(self._fault.status, self._fault.code)
    with self._server.lock:
      self._objects = self._server.objects.get(self._bucket)
    if self._objects is None:
      return self._error(404, "NoSuchBucket")
    action()

  def _read_body(self) -> bytes:
    if "chunked" in self.headers.get("Transfer-Encoding", ""):
      parts = []
      while size := int(self.rfile.readline().split(b";")[0], 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b"".join(parts)
    return self.rfile.read(int(self.headers.get("Content-Length") or 0))

  def _break_off(self) -> None:
    self.close_connection = True
    self.connection.shutdown(2)

  def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int = 0) -> None:
    if self._fault.lose_answer:
      return self._break_off()
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    if status != 204:
      self.send_header("Content-Length", str(length if self.command == "HEAD" else len(body)))
    self.end_headers()
    if self.command == "HEAD":
      return None
    if self._fault.cut is not None and self._fault.cut < len(body):
      self.wfile.write(body[: self._fault.cut])
      self.wfile.flush()
      return self._break_off()
    self.wfile.write(body)
    self.wfile.flush()
    return None

  def _error(self, status: int, code: str) -> None:
    self._answer(status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

  def _headers_of(self, found: Object) -> dict[str, str]:
    return {
      "ETag": found.etag,
      "x-goog-generation": str(found.generation),
      "Last-Modified": email.utils.formatdate(found.modified, usegmt=True),
      "Content-Type": "application/octet-stream",
      "Accept-Ranges": "bytes",
    }

  def _read(self) -> None:
    with self._server.lock:
      found = self._objects.get(self._key)
    if found is None:
      return self._error(404, "NoSuchKey")
    headers, data, status = self._headers_of(found), found.data, 200
    if wanted := self.headers.get("Range"):
      first, _, last = wanted.removeprefix("bytes=").partition("-")
      start = int(first) if first else max(0, len(data) - int(last))
      stop = min(int(last) + 1, len(data)) if first and last else len(data)
      if start >= len(data):
        return self._error(416, "InvalidRange")
      headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
      data, status = data[start:stop], 206
    return self._answer(status, b"" if self.command == "HEAD" else data, headers, len(data))

  def _refused(self) -> bool:
    """Tells whether the request's conditions do not hold; under the server's lock."""
    found = self._objects.get(self._key)
    generation = self.headers.get("x-goog-if-generation-match")
    match = self.headers.get("If-Match")
    if generation == "0" or self.headers.get("If-None-Match") == "*":
      return "create" in self._server.honors_conditions and found is not None
    if generation is None and match is None:
      return False
    holds = found is not None and (found.etag == match if generation is None else found.generation == int(generation))
    return "replace" in self._server.honors_conditions and not holds

  def _store(self, data: bytes) -> None:
    with self._server.lock:
      refused = self._refused()
      if not refused:
        self._server.put(self._key, data, self._bucket)
        found = self._objects[self._key]
    if refused:
      return self._error(412, "PreconditionFailed")
    if "uploadId" in self._query or self._source:
      name = "CopyObjectResult" if self._source else "CompleteMultipartUploadResult"
      body = f"<?xml version='1.0'?><{name}><ETag>{saxutils.escape(found.etag)}</ETag></{name}>".encode()
      return self._answer(200, body, self._headers_of(found))
    return self._answer(200, b"", self._headers_of(found))

  def _put(self) -> None:
    self._store(self._body)

  def _copy(self) -> None:
    bucket, _, key = urllib.parse.unquote(self._source).lstrip("/").partition("/")
    with self._server.lock:
      found = self._server.objects.get(bucket, {}).get(key)
    if found is None:
      return self._error(404, "NoSuchKey")
    return self._store(found.data)

  def _begin(self) -> None:
    name = self._server.begin_upload()
    body = f"<?xml version='1.0'?><InitiateMultipartUploadResult><UploadId>{name}</UploadId>"
    self._answer(200, f"{body}</InitiateMultipartUploadResult>".encode())

  def _put_part(self) -> None:
    parts = self._server.uploads().get(self._query["uploadId"])
    if parts is None:
      return self._error(404, "NoSuchUpload")
    parts[int(self._query["partNumber"])] = self._body
    digest = hashlib.md5(self._body, usedforsecurity=False).hexdigest()
    return self._answer(200, b"", {"ETag": f'"{digest}"'})

  def _complete(self) -> None:
    with self._server.lock:
      parts = self._server.uploads().pop(self._query["uploadId"], None)
    if parts is None:
      return self._error(404, "NoSuchUpload")
    listed = [int(each.text) for each in ElementTree.fromstring(self._body).iter() if each.tag.endswith("PartNumber")]
    return self._store(b"".join(parts[number] for number in listed))

  def _abort(self) -> None:
    with self._server.lock:
      self._server.uploads().pop(self._query["uploadId"], None)
    self._answer(204)

  def _delete(self) -> None:
    with self._server.lock:
      refused = self._refused()
      there = None if refused else self._objects.pop(self._key, None)
    if refused:
      return self._error(412, "PreconditionFailed")
    if there is None and self.headers.get("x-amz-date") is None:  # Google says so, Amazon does not
      return self._error(404, "NoSuchKey")
    return self._answer(204)

  def _delete_many(self) -> None:
    keys = [each.text for each in ElementTree.fromstring(self._body).iter() if each.tag.endswith("Key")]
    with self._server.lock:
      for key in keys:
        self._objects.pop(key, None)
    deleted = "".join(f"<Deleted><Key>{saxutils.escape(key)}</Key></Deleted>" for key in keys)
    self._answer(200, f"<?xml version='1.0'?><DeleteResult>{deleted}</DeleteResult>".encode())

  def _list(self) -> None:
    query = self._query
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("continuation-token") or query.get("start-after") or ""
    entries: dict[str, Object | None] = {}
    with self._server.lock:
      for key in sorted(self._objects):
        if key.startswith(prefix):
          inside, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
          entries[f"{prefix}{inside}{delimiter}" if cut else key] = None if cut else self._objects[key]
    names = [name for name in entries if name > after]
    page = names[: min(PAGE, int(query.get("max-keys", PAGE)))]
    rows = []
    for name in page:
      if (found := entries[name]) is None:
        rows.append(f"<CommonPrefixes><Prefix>{saxutils.escape(name)}</Prefix></CommonPrefixes>")
      else:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(found.modified))
        rows.append(
          f"<Contents><Key>{saxutils.escape(name)}</Key><LastModified>{stamp}.000Z</LastModified>"
          f"<ETag>{saxutils.escape(found.etag)}</ETag><Generation>{found.generation}</Generation>"
          f"<Size>{len(found.data)}</Size></Contents>"
        )
    more = len(names) > len(page)
    token = f"<NextContinuationToken>{saxutils.escape(page[-1])}</NextContinuationToken>" if more else ""
    self._answer(
      200,
      f"<?xml version='1.0'?><ListBucketResult><Name>{self._bucket}</Name><Prefix>{saxutils.escape(prefix)}</Prefix>"
      f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(rows)}"
      "</ListBucketResult>".encode(),
    )

  def log_message(self, *message: object) -> None:
    """Says nothing."""


def main() -> None:
  """Serves until it is ended."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--bucket", action="append", default=[])
  parser.add_argument("--port", type=int, default=0)
  parser.add_argument("--latency", type=float, default=0.0, help="seconds before every answer")
  options = parser.parse_args()
  with Server(*options.bucket, port=options.port) as server:
    server.latency = options.latency
    print(server.address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
  main()
