"""Buckets of a server that others wrote, moto's S3: what bucket_server.py does is what one of them does."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import boto3
import pytest

from glmjax import errors
from glmjax.io import bucket
from glmjax.io import lease
from glmjax.io import lock
from glmjax.io import paths

pytestmark = pytest.mark.slow


@pytest.fixture
def moto(monkeypatch):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{free.getsockname()[1]}"
  command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", address.rsplit(":", 1)[1]]
  with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1"}.items():
      monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    for _ in range(300):
      try:
        urllib.request.urlopen(f"{address}/moto-api/").close()
        break
      except OSError:
        time.sleep(0.2)
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket="bucket")
    bucket.named.cache_clear()
    yield
    bucket.named.cache_clear()
    server.terminate()


def test_a_server_of_others_does_as_ours(moto):
  there, big = bucket.named("s3", "bucket"), os.urandom(2 * bucket.PART + 1)
  version = there.create("a/x", b"1")
  assert version and there.create("a/x", b"2") is None
  assert there.replace("a/x", b"3", version) and there.replace("a/x", b"4", version) is None
  there.put("big", big)
  with there.upload("up") as stream:
    stream.write(big)
    stream.write(b"end")
  assert there.get("big") == big and there.get("up", len(big)) == b"end" and there.get("big", 9 * len(big)) == b""
  there.copy("up", "copied")
  assert [found.key for found in there.below("")] == ["a/x", "big", "copied", "up"]
  assert there.children("")[0] == ["a"] and there.find("up").size == len(big) + 3 and there.find("none") is None
  there.delete(["up", "copied", "none"])
  assert [found.key for found in there.below("")] == ["a/x", "big"]
  with pytest.raises(errors.InputError, match="there is no bucket s3://elsewhere"):
    bucket.named("s3", "elsewhere").children("")


def test_a_lock_there_is_held_once(moto, monkeypatch):
  monkeypatch.setattr(lease, "_RENEW", 0.2)
  path = paths.named("s3://bucket/run/.lock")
  with lock.held(path, "it is in use"), monkeypatch.context() as patch:
    patch.setattr(lease, "_held", set())  # as another process sees it
    with pytest.raises(errors.InputError, match="it is in use"):
      with lock.held(path, "it is in use"):
        pass
