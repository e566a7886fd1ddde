"""What a command sets for its process, and that the library sets nothing: signals, streams, messages."""

import errno
import io
import json
import logging
import os
import pathlib
import platform
import pty
import resource
import signal
import subprocess
import sys
import textwrap
import time

import import_rules_test as import_rules
import pytest

from glmjax import cli
from glmjax.cli import process, run

FAKE = """
import logging, os, sys, time
log = logging.getLogger("glmjax")


def native():  # minutes in a compiler, which no exception ends
  import ctypes
  ctypes.CDLL(None).pause.restype = None
  ready()
  for _ in range(60):
    ctypes.CDLL(None).sleep(10)


def ready():
  print("ready", file=sys.stderr, flush=True)


def train(workdir, mode="sleep"):
  if mode == "native":
    native()
  elif mode == "swallow":
    ready()
    for _ in range(600):
      try:
        time.sleep(0.1)
      except BaseException:
        pass
  elif mode == "callback":  # whose exceptions are printed and dropped, as those of callbacks of native code
    class Left:
      def __del__(self):
        ready()
        time.sleep(60)
    Left()
  elif mode == "another error":  # native code may make one of what a callback raises
    try:
      ready()
      time.sleep(60)
    except BaseException as error:
      raise ValueError("not equal") from error
  elif mode == "finally":
    try:
      ready()
      time.sleep(60)
    finally:
      open("cleaned", "w").close()
  elif mode == "slow finally":
    try:
      ready()
      time.sleep(60)
    finally:
      print("cleaning", file=sys.stderr)
      time.sleep(60)
  elif mode == "children":
    import multiprocessing
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    print(child.pid, file=sys.stderr)
    ready()
    time.sleep(60)
  elif mode == "child ends by a signal":
    import multiprocessing, signal
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join()
    assert child.exitcode == -signal.SIGTERM
    time.sleep(3)
  elif mode == "messages":
    log.info("news")
    log.warning("a\\x1b[31mwarning")
  elif mode == "chinese":
    print("\\u4e2d\\udcff")
  return {"text": "\\u4e2d\\U0001f600"}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "fakeprocess.py").write_text(FAKE)
  return tmp_path


def command(mode: str, *, before: str = "", seconds: float = 1) -> list[str]:
  """`glmjax train` of the fake module, in a process of its own; what is left after `seconds` ends as it is."""
  return [
    sys.executable,
    "-c",
    textwrap.dedent(f"""
      import signal, sys
      sys.path.insert(0, ".")
      {before}
      from glmjax import cli
      from glmjax.cli import commands as c, process
      process.SECONDS_TO_END = {seconds}
      c.COMMANDS = {{'train': c.Command('train', 'fakeprocess.train', 't', 'e', (c.Flag('--workdir', 'w'),))}}
      sys.exit(cli.main(['train', '--workdir=here', '--gin.fakeprocess.train.mode="{mode}"', *sys.argv[1:]]))"""),
  ]


SIGNALS = pytest.mark.parametrize(
  "number, words", [(signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "interrupted")]
)


@SIGNALS
@pytest.mark.parametrize("mode", ["finally", "native", "swallow", "callback", "another error"])
def test_a_signal_ends_the_process_with_one_line(fake, mode, number, words):
  """Also in native code and where what it raises is swallowed; what is open is put in order where that is possible."""
  with subprocess.Popen(command(mode), stderr=subprocess.PIPE, text=True) as started:
    assert started.stderr.readline() == "ready\n"
    started.send_signal(number)
    assert started.wait(60) == 128 + number
    assert started.stderr.read() == f"glmjax: {words}\n"
  assert (fake / "cleaned").exists() == (mode == "finally")


@SIGNALS
def test_a_second_signal_does_not_wait_for_the_order(fake, number, words):
  with subprocess.Popen(command("slow finally", seconds=60), stderr=subprocess.PIPE, text=True) as started:
    for line in ("ready\n", "cleaning\n"):
      assert started.stderr.readline() == line
      started.send_signal(number)
    assert started.wait(30) == 128 + number
    assert started.stderr.read() == f"glmjax: {words}\n"


@SIGNALS
def test_a_signal_during_the_imports(fake, number, words):
  slow = f"import os; os.kill(os.getpid(), {int(number)}); import time; time.sleep(60)"
  (fake / "fakeprocess.py").write_text(f"{slow}\n{FAKE}")
  done = subprocess.run(command("sleep"), capture_output=True, text=True, check=False, timeout=60)
  assert (done.returncode, done.stderr) == (128 + number, f"glmjax: {words}\n")


def test_a_signal_while_a_native_module_is_made(fake):
  """Which is no place for an exception: the process would abort, as a crash that launch scripts restart."""
  (fake / "fakeprocess.py").write_text(
    textwrap.dedent("""
      import enum, os, signal
      make = enum.EnumType.__call__

      def call(cls, *arguments, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return make(cls, *arguments, **settings)

      enum.EnumType.__call__ = call
      import jaxlib._jax
      """)
    + FAKE
  )
  done = subprocess.run(command("quiet"), capture_output=True, text=True, check=False, timeout=60)
  assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "glmjax: stopped by SIGTERM\n")


def test_children_end_with_it(fake):
  with subprocess.Popen(command("children"), stderr=subprocess.PIPE, text=True) as started:
    child = int(started.stderr.readline())
    assert started.stderr.readline() == "ready\n"
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == 128 + signal.SIGTERM
  for _ in range(200):
    status = pathlib.Path(f"/proc/{child}/stat")
    if not status.exists() or status.read_text().split()[2] == "Z":  # dead, and reaped by whoever took it over
      return
    time.sleep(0.05)
  os.kill(child, signal.SIGKILL)
  raise AssertionError("the child lives")


def test_a_signal_to_a_child_is_the_childs(fake):
  done = subprocess.run(command("child ends by a signal"), capture_output=True, text=True, check=False, timeout=60)
  assert done.returncode == 0 and not done.stderr


def test_several_wait_for_the_others():
  """A process that is told to stop before it has met the others goes on until it can tell them."""
  process.begin(["train", "--coordinator=localhost:1"])
  os.kill(os.getpid(), signal.SIGTERM)  # interrupts nothing
  with pytest.raises(process.Stopped) as caught:
    process.met()
  assert caught.value.number == signal.SIGTERM
  process.begin()
  with pytest.raises(process.Stopped):
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_is_for_the_command_that_it_came_to():
  """One that was interrupted, in a program that goes on, does not end the next."""
  code = """
    import os, signal, time
    from glmjax.cli import process
    process.SECONDS_TO_END = 0.5
    process.begin()
    try:
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(60)
    except process.Stopped:
      pass
    if {again}:
      process.begin()
    time.sleep(2)
  """
  for again, status in ((True, 0), (False, 130)):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code.format(again=again))], check=False)
    assert done.returncode == status


@pytest.mark.parametrize(
  "arguments, environment, waits",
  [
    (["train", "--workdir=a"], {}, False),
    (["train", "--coordinator=h:1"], {}, True),
    (["train"], {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}, True),
    (["chat", "--checkpoint=a"], {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}, False),
    ([], {}, False),
  ],
)
def test_only_processes_of_several_wait(monkeypatch, arguments, environment, waits):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert process._is_of_several(arguments) == waits


def test_noting_interrupts_nothing():
  process.begin()
  with process.noting(signal.SIGINT) as received:
    os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGINT]
  assert signal.getsignal(signal.SIGINT) is process._handle


# Streams


def streams(code: str, **options) -> subprocess.CompletedProcess:
  """Runs the code after process.begin()."""
  begin = "import os, sys\nfrom glmjax.cli import process, streams\nprocess.begin()\n"
  return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, check=False, **options)


def test_what_libraries_print_is_no_output():
  """As Gloo does, from C++, in the middle of the answers of several processes."""
  done = streams("print('one'); streams.keep_output(); os.write(1, b'[Gloo] 1\\n'); print('two')")
  assert done.stdout == b"one\ntwo\n" and done.stderr == b"[Gloo] 1\n"


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
  "environment, expected",
  [
    ({}, "中😀\n".encode()),
    (ASCII, "中😀\n".encode()),
    ({"PYTHONIOENCODING": "gbk"}, "中".encode("gbk") + b"?\n"),
    ({"PYTHONIOENCODING": "ascii"}, b"??\n"),
    ({"PYTHONIOENCODING": ":strict"}, "中😀\n".encode()),
  ],
)
def test_pipes_get_utf8_unless_the_user_says_otherwise(environment, expected):
  done = streams(r"print('\u4e2d\U0001f600')", env=os.environ | environment)
  assert (done.returncode, done.stdout, done.stderr) == (0, expected, b"")


@pytest.mark.parametrize("stream, expected", [("stdout", b"? a"), ("stderr", rb"\u4e2d a")])
def test_a_terminal_gets_what_it_can_show(stream, expected):
  main, terminal = pty.openpty()
  code = f"import sys\nfrom glmjax.cli import process\nprocess.begin()\nprint('\\u4e2d a', file=sys.{stream})"
  done = subprocess.run(
    [sys.executable, "-c", code], check=False, env=os.environ | ASCII, stdin=terminal, stdout=terminal, stderr=terminal
  )
  os.close(terminal)
  assert done.returncode == 0 and os.read(main, 1000).startswith(expected)
  os.close(main)


def test_names_that_are_no_text_can_be_printed():
  done = streams("print('a\\udcffb'); print('a\\udcffb', file=sys.stderr)")
  assert (done.returncode, done.stdout, done.stderr) == (0, b"a?b\n", b"a\\udcffb\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_dev_null(fake, closed):
  """Nothing of one stream gets into another, nor into a file that took its number."""
  (fake / "run.py").write_text(
    "import os, sys\nfrom glmjax.cli import process\nprocess.begin()\nprint('out')\nprint('err', file=sys.stderr)\n"
    "process.logging.getLogger('glmjax').warning('warn')\nassert sys.stdin.read() == ''\n"
    "assert os.open('file', os.O_WRONLY | os.O_CREAT) > 2\n"
  )
  done = subprocess.run(
    ["sh", "-c", f"exec {sys.executable} run.py {closed}"], stdin=subprocess.DEVNULL, check=False, capture_output=True
  )
  assert done.returncode == 0, done
  assert done.stdout == (b"" if closed[0] == ">" or " >" in closed else b"out\n")
  assert done.stderr == (b"" if "2>" in closed else b"err\nglmjax: warn\n")
  assert os.path.getsize("file") == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("arguments, status", [("--help", 0), ("train --help", 0), ("trian", 2)])
def test_commands_with_closed_streams(closed, arguments, status):
  done = subprocess.run(
    ["sh", "-c", f"exec {sys.executable} -m glmjax {arguments} {closed}"], check=False, capture_output=True
  )
  assert done.returncode == status and b"Traceback" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("option", ["--version", "--json"])
def test_a_full_disk_under_the_output(fake, option, unbuffered):
  environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
  start = [sys.executable, "-m", "glmjax", "--version"] if option == "--version" else [*command("quiet"), option]
  with open("/dev/full", "w") as full:
    done = subprocess.run(start, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
  assert done.returncode == 2 and done.stderr.startswith("glmjax: standard output: the disk is full"), done.stderr
  assert done.stderr.count("\n") == 1


def test_a_full_disk_under_the_messages_ends_nothing():
  with open("/dev/full", "w") as full:
    code = (
      "from glmjax.cli import process; import sys; process.begin()\n"
      "for i in range(10_000): print('message', file=sys.stderr)\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert subprocess.run([sys.executable, "-m", "glmjax", "trian"], stderr=full, check=False).returncode == 2


def test_a_reader_that_leaves(fake):
  with subprocess.Popen(command("messages") + ["--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
    started.stdout.close()
    assert started.stderr.read() == b"news\nglmjax: a\\x1b[31mwarning\n"
    assert started.wait(60) == 128 + signal.SIGPIPE


def test_another_broken_pipe_is_no_reader_that_left(monkeypatch, capsys):
  def fails(arguments):
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")

  monkeypatch.setattr(run, "run", fails)
  assert cli.main(["inspect"]) == 1
  assert capsys.readouterr().err.startswith("glmjax: Broken pipe")


def test_results_on_a_stream_without_chinese(fake):
  """JSON spells what the stream lacks; nothing else fails."""
  for flags in (["--json"], []):
    done = subprocess.run(
      command("chinese") + flags, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "latin-1"}
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("latin-1")
    assert json.loads(text[text.index("{") :]) == {"text": "中😀"}


def test_other_programs_streams_stay(monkeypatch):
  mine = io.StringIO()
  monkeypatch.setattr(sys, "stderr", mine)
  process.begin()
  logging.getLogger("glmjax").warning("hello")
  assert sys.stderr is mine and mine.getvalue() == "glmjax: hello\n"


# The library


def test_the_library_changes_nothing_in_its_host():
  """Importing every module but the command line's."""
  names = [
    name
    for name in import_rules.MODULES
    if import_rules.part_of(name) not in ("cli", "tasks", None)
    and name not in (*import_rules.SEQIO_HALF, import_rules.LM_EVAL)
  ]
  code = textwrap.dedent(f"""
      import absl.logging, importlib, logging, os, signal, sys, threading, warnings
      import jax, flax.linen, optax, orbax.checkpoint, numpy, scipy.special, sentencepiece  # whose doings are not ours

      def settings():
        loggers = ("", "absl", "glmjax", "jax", "orbax")
        return {{
          "environ": dict(os.environ), "unraisable": sys.unraisablehook, "excepthook": sys.excepthook,
          "filters": list(warnings.filters), "streams": (sys.stdin, sys.stdout, sys.stderr),
          "encodings": [(s.encoding, s.errors) for s in (sys.stdin, sys.stdout, sys.stderr)],
          "signals": [signal.getsignal(n) for n in range(1, 32)], "threads": threading.active_count(),
          "loggers": [(n, l.level, l.propagate, list(l.handlers), list(l.filters)) for n in loggers
                      for l in [logging.getLogger(n)]],
          "config": dict(jax.config.values), "limit": sys.getrecursionlimit()}}

      before = settings()
      for name in {names!r}:
        importlib.import_module(name)
      after = settings()
      changed = [name for name in before if before[name] != after[name]]
      sys.exit(f"changed: {{changed}}" if changed else 0)
  """)
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]


def test_begin_twice_is_as_once():
  process.begin()
  process.quieten()
  filters, handlers = len(logging.getLogger("absl").filters), len(logging.getLogger("glmjax").handlers)
  process.begin()
  process.quieten()
  assert (filters, handlers) == (len(logging.getLogger("absl").filters), len(logging.getLogger("glmjax").handlers))


def test_few_files_are_called_by_their_name(fake):
  """Not a full disk, and no restart helps."""
  (fake / "fakeprocess.py").write_text(
    "import resource\n\n\ndef train(workdir, mode='x'):\n  resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))\n"
    "  files = [open('/dev/null') for _ in range(100)]\n"
  )
  assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 8
  done = subprocess.run(command("sleep"), capture_output=True, text=True, check=False)
  assert done.returncode == 2 and "raise the limit with ulimit -n" in done.stderr and done.stderr.count("\n") == 1


KEEPS = """
import ctypes, resource, threading
from glmjax.cli import process

process.begin(["train"])
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def step():
  block = libc.malloc(100 << 20)
  libc.memset(block, 1, 100 << 20)
  libc.free(block)


def steps():
  step()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


faults = []
for _ in range(4):  # each thread takes the next heap, where there are several
  thread = threading.Thread(target=steps)
  thread.start()
  thread.join()
print(max(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_a_step_of_training_finds_the_memory_of_the_last_one_in_any_thread():
  environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
  done = subprocess.run([sys.executable, "-c", KEEPS], env=environment, capture_output=True, text=True, check=True)
  assert int(done.stdout) < 1000, "25,600 of 4 KiB are a step's"
