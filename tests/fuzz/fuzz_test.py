"""Bad input of every kind: a clear line, the right status, nothing left behind, bounded time and memory.

GLMJAX_FUZZ_INPUTS=20000 GLMJAX_FUZZ_SEED=7 pytest tests/fuzz -m slow        # more of it
python tests/fuzz KIND SEED NUMBER                                           # one input again
"""

import os
import pathlib
from collections.abc import Iterator

import forked
import pytest
import tiny_world

from fuzz import cases
from fuzz import runner

SHARES = {
  "gin_values": 200,
  "gin_files": 100,
  "prompts": 150,
  "instructions": 100,
  "texts": 100,
  "configs": 150,
  "safetensors": 100,
  "pickles": 100,
}  # of a thousand


@pytest.fixture(name="world", scope="session")
def _world(tmp_path_factory) -> pathlib.Path:
  """Made once for all processes of a test run."""
  with tiny_world.shared(tmp_path_factory, "fuzz") as folder:
    return runner.make_world(folder)


@pytest.fixture(name="server", scope="module")
def _server(tmp_path_factory) -> Iterator[forked.Server]:
  """Forks processes for all kinds of inputs."""
  with forked.Server(tmp_path_factory.mktemp("server")) as server:
    yield server


def check(kind: str, seed: int, count: int, world: pathlib.Path, scratch: pathlib.Path, server: forked.Server) -> None:
  results = runner.run(kind, seed, range(count), world, scratch, server)
  assert len(results) == count
  wrong = [runner.told(kind, seed, result) for result in results if result["problem"]]
  report = f"{len(wrong)} of {count} inputs:\n" + "\n".join(wrong)
  assert not wrong, report.encode("utf-8", "backslashreplace").decode()  # pytest-xdist sends UTF-8 alone


@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_thousand_inputs(kind, world, tmp_path, server):
  check(kind, 0, SHARES[kind], world, tmp_path, server)


@pytest.mark.slow
@pytest.mark.parametrize("kind", cases.KINDS)
def test_many_inputs(kind, world, tmp_path, server):
  count, seed = int(os.environ.get("GLMJAX_FUZZ_INPUTS", "5000")), int(os.environ.get("GLMJAX_FUZZ_SEED", "1"))
  check(kind, seed, count * SHARES[kind] // 1000, world, tmp_path, server)


def test_the_shares_are_of_a_thousand():
  assert SHARES.keys() == cases.KINDS.keys() and sum(SHARES.values()) == 1000
