"""Models to serve, and the chat page, opened in Chromium from a server without one."""

import contextlib
import pathlib

import pytest
from serve import fake_server
import untrained_run

from glmjax.infer import engine


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> pathlib.Path:
  """A run of an untrained model of 256 places."""
  return untrained_run.write(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture(scope="session")
def untrained(folder) -> engine.Engine:
  """The same model in this process."""
  return engine.Engine.load(folder)


@pytest.fixture
def fake():
  with fake_server.Server() as fake:
    yield fake


@pytest.fixture
def opened(chromium, fake):
  """Opens the page in a browser of its own; at the end it had no error and spoke to its server alone."""
  with contextlib.ExitStack() as stack:
    wrong = []

    def noticed(message):
      if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
        wrong.append(message.text)

    def requested(request):
      if not request.url.startswith((fake.address, "data:")):
        wrong.append(request.url)

    def open_page(**options):
      context = chromium.new_context(**{"locale": "en-US", "viewport": {"width": 1100, "height": 800}, **options})
      stack.callback(context.close)
      context.set_default_timeout(20_000)
      context.on("request", requested)
      page = context.new_page()
      page.on("console", noticed)
      page.on("pageerror", lambda error: wrong.append(str(error)))
      page.goto(fake.address)
      return page

    yield open_page
    assert not wrong
