"""Eight virtual CPU devices, exact matmuls and no more threads than processors for every test; tables at the end."""

import gc
import itertools
import logging
import os
import shutil
import signal
import sys

import bucket_server
import pytest
import xla_flags

from glmjax.io import bucket

# To look for cycles among Python's objects after each 700 new ones takes 6 % of the tests' time.
gc.set_threshold(50_000)

# XLA ends a process, all its threads dumped, where one of eight devices makes the others wait for 40 seconds, which
# happens on two processors with much else to do.
os.environ.setdefault("XLA_FLAGS", f"{xla_flags.on(8)} --xla_cpu_collective_call_terminate_timeout_seconds=300")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GLMJAX_PROGRAMS", "off")  # nothing of a test is in the user's folder
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes run side by side
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


_tests = itertools.count(1)


def pytest_collection_modifyitems(items) -> None:
  """Gives slow tests an hour; on a GPU, JAX says at each lowering of a Pallas Triton kernel that it will be removed
  (docs/kernels.md)."""
  for item in items:
    if item.get_closest_marker("slow"):
      item.add_marker(pytest.mark.timeout(3600))
    if item.get_closest_marker("gpu"):
      item.add_marker(pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem) -> bool | None:
  """Runs a test of bits that XLA's emitters of fusions keep in a process that has them."""
  if pyfuncitem.get_closest_marker("emitters"):
    return xla_flags.run_as_users_do(pyfuncitem.nodeid) or None
  return None


@pytest.fixture(scope="module")
def chromium():
  """The browser that pages are tried in."""
  sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
  path = shutil.which("chromium")
  if path is None:
    pytest.skip("no chromium here (as root: apt-get install chromium)")
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture(autouse=True)
def _own_settings():
  """What main(), called in a test, sets for its process does not reach the next test."""
  logger, absl = logging.getLogger("glmjax"), logging.getLogger("absl")
  handlers, level, propagate, filters = list(logger.handlers), logger.level, logger.propagate, list(absl.filters)
  signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  hook, threshold = sys.unraisablehook, gc.get_threshold()
  yield
  gc.set_threshold(*threshold)
  for number, handler in signals.items():
    signal.signal(number, handler)
  logger.handlers, logger.propagate, absl.filters, sys.unraisablehook = handlers, propagate, filters, hook
  logger.setLevel(level)


@pytest.fixture(autouse=True)
def _few_mappings():
  """Drops the programs that past tests compiled before their memory mappings, three each, reach Linux's 65,530.

  Compiling then ends the process: it happened after 5,000 tests, and within one file of many meshes. Counting takes
  some 10 ms, so that not every test does.
  """
  yield
  if next(_tests) % 20 == 0 and "jax" in sys.modules and os.path.exists("/proc/self/maps"):
    with open("/proc/self/maps", "rb") as maps:
      if sum(1 for _ in maps) > 25_000:
        sys.modules["jax"].clear_caches()


def pytest_terminal_summary(terminalreporter) -> None:
  """Prints what tests have recorded as their "table"; with xdist as without."""
  for outcome in ("passed", "failed"):
    for report in terminalreporter.getreports(outcome):
      for name, text in report.user_properties:
        if name == "table":
          terminalreporter.write_line(f"\n{text}")


@pytest.fixture
def server(monkeypatch):
  """A server of one bucket called "bucket", to which both clouds' addresses lead, in subprocesses too."""
  with bucket_server.Server("bucket") as server:
    for name, value in server.environment().items():
      monkeypatch.setenv(name, value)
    monkeypatch.setenv(bucket.PATIENCE, "3")
    bucket.named.cache_clear()
    yield server
    bucket.named.cache_clear()
