"""Commands in processes of their own, without the seconds of their imports: a server that has imported, and forks.

The server never starts JAX's threads, so that what it forks is as good as a process just started.
`python tests/forked.py MODULE ...` is the server; `Server` is used by tests. A call is a "module:function" with
arguments that JSON can hold; what it returns is the process's exit status.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import resource
import select
import signal
import subprocess
import sys
import time
from typing import Any

import xla_flags

TESTS = pathlib.Path(__file__).parent
COMMANDS = (
  "glmjax.cli.commands",
  "glmjax.cli.inference",
  "glmjax.data.token_cache",
  "glmjax.train.loop",
  "glmjax.infer.engine",
  "glmjax.thudm.load",
  "glmjax.thudm.inspection",
  "glmjax.thudm.write",
  "glmjax.evaluate.heldout",
)


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process ended, and what it said."""

  status: int  # negative: the signal that ended it
  out: str
  err: str
  seconds: float
  hung: bool = False  # it was ended because it took too long

  @property
  def line(self) -> str:
    """The last line that it said to people."""
    return (self.err.splitlines() or [""])[-1]


def compiled_once(folder: pathlib.Path) -> dict[str, str]:
  """The environment in which processes keep their programs in a folder, so that equal ones are compiled once.

  JAX writes them in place: processes that compile at the same time have a folder each.
  """
  return {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


class Running:
  """A process under way."""

  def __init__(self, server: "Server", pid: int, folder: pathlib.Path):
    self._server, self.pid, self._folder, self._began = server, pid, folder, time.monotonic()

  def signal(self, number: int, group: bool = False) -> None:
    """Sends a signal, to the processes that it has started as well if `group`; unless it has ended."""
    try:
      (os.killpg if group else os.kill)(self.pid, number)
    except ProcessLookupError:
      pass

  def wait(self, seconds: float) -> bool:
    """Whether it ends within so many seconds."""
    return self._server.readable(seconds)

  def end(self, limit: float) -> Ended:
    """Waits for its end, which comes by SIGKILL after `limit` seconds."""
    hung = not self.wait(limit)
    if hung:
      self.signal(signal.SIGKILL)
    status = self._server.read()["status"]
    out, err = ((self._folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return Ended(status, out, err, time.monotonic() - self._began, hung)


class Server:
  """Forks processes, one at a time; a context manager."""

  def __init__(self, scratch: pathlib.Path, modules: tuple[str, ...] = COMMANDS, **environment: str):
    self._scratch = scratch
    settings = {
      "XLA_FLAGS": xla_flags.CHEAP,
      "JAX_PLATFORMS": "cpu",
      "TF_CPP_MIN_LOG_LEVEL": "3",
      "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
      "OMP_NUM_THREADS": "1",
    }
    with open(scratch / "server", "wb") as chatter:
      self._process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=chatter,
        text=True,
        env={**os.environ, **settings, **environment},
      )

  def __enter__(self) -> "Server":
    self.read()
    return self

  def __exit__(self, *unused: object) -> None:
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()

  def start(
    self, call: str, arguments: dict[str, Any], cwd: pathlib.Path, stdin: str = os.devnull, memory: int | None = None
  ) -> Running:
    """Starts `call(**arguments)` in the folder `cwd`, with at most `memory` bytes beyond what the server has."""
    self._process.stdin.write(
      json.dumps(
        {
          "call": call,
          "arguments": arguments,
          "cwd": str(cwd),
          "scratch": str(self._scratch),
          "stdin": stdin,
          "memory": memory,
        }
      )
      + "\n"
    )
    self._process.stdin.flush()
    return Running(self, self.read()["pid"], self._scratch)

  def command(self, *argv: str, cwd: pathlib.Path, limit: float = 300) -> Ended:
    """Runs `glmjax ...` to its end."""
    return self.start("forked:command", {"argv": argv}, cwd).end(limit)

  def readable(self, seconds: float) -> bool:
    """Whether the server says something within so many seconds."""
    return bool(select.select([self._process.stdout], [], [], seconds)[0])

  def read(self) -> dict[str, Any]:
    """What the server says next; always one line at a time, so that none waits in a buffer."""
    return json.loads(self._process.stdout.readline())


def command(argv: list[str]) -> int:
  """The glmjax command, in a forked process."""
  from glmjax import cli

  return cli.main(argv)


def _serve(modules: list[str]) -> int:
  """Forks for each line of standard input; returns, in the new process, what is to be its exit status."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  for name in modules:
    importlib.import_module(name)
  signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
  _say(answers, {})
  while line := sys.stdin.readline():
    request = json.loads(line)
    pid = os.fork()
    if not pid:
      answers.close()
      return _call(request)
    os.setpgid(pid, pid)  # as the new process does itself: whoever comes first
    _say(answers, {"pid": pid})
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    _say(answers, {"status": status})
  return 0


def _say(answers: Any, content: dict[str, Any]) -> None:
  answers.write(json.dumps(content) + "\n")
  answers.flush()


def _call(request: dict[str, Any]) -> int:
  os.setpgid(0, 0)
  os.chdir(request["cwd"])
  opened = [
    os.open(request["stdin"], os.O_RDONLY),
    *(
      os.open(os.path.join(request["scratch"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
      for name in ("stdout", "stderr")
    ),
  ]
  for number, descriptor in enumerate(opened):
    os.dup2(descriptor, number)
    os.close(descriptor)
  sys.stdin = open(0, encoding="utf-8", closefd=False)
  if request["memory"] is not None:
    limit = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + request["memory"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  module, _, name = request["call"].partition(":")
  return getattr(importlib.import_module(module), name)(**request["arguments"])


if __name__ == "__main__":
  sys.exit(_serve(sys.argv[1:]))
