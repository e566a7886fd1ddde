"""Models to serve, and the chat page, opened in Chromium from a server without one."""

import contextlib
import pathlib
import shutil

import jax
import jax.numpy as jnp
import pytest
from serve import fake_server

from glmjax import tokenizer as tokenizer_lib
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager
from glmjax.infer import engine
from glmjax.io import tokenizer_folder
from glmjax.models import config as config_lib
from glmjax.models import glm

_CONFIG = config_lib.GLMConfig(
  vocab_size=440, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=256, init_std=0.3
)
_TEXT = [f"On day {i} the quick brown fox jumps over {i} lazy dogs. 第{i}天，小河边的柳树发芽了。" for i in range(60)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> pathlib.Path:
  """A run of an untrained model of 256 places."""
  run, tokenizer = tmp_path_factory.mktemp("model") / "run", tmp_path_factory.mktemp("tokenizer") / "tokenizer"
  tokenizer_lib.train(_TEXT, tokenizer, vocab_size=_CONFIG.vocab_size)
  described = tokenizer_folder.copy(tokenizer, run / folder_lib.TOKENIZER)
  folder_lib.write_config(run, folder_lib.FolderConfig(_CONFIG, {}, described))
  saver = manager.Manager(run / "checkpoints")
  saver.save(1, {"params": glm.init_params(_CONFIG, jax.random.key(1)), "step": jnp.int32(1)}, {"samples_seen": 1})
  saver.close()
  return run


@pytest.fixture(scope="session")
def untrained(folder) -> engine.Engine:
  """The same model in this process."""
  return engine.Engine.load(folder)


@pytest.fixture(scope="module")
def chromium():
  sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
  path = shutil.which("chromium")
  if path is None:
    pytest.skip("no chromium here (as root: apt-get install chromium)")
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    yield browser
    browser.close()


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
