"""The conversation in the terminal: commands, files, Ctrl-C, and standard input that is none."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import pty
import re
import select
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator

import pytest

from glmjax import cli, errors
from glmjax.cli import chat, inference
from glmjax.infer import chat as chat_lib


class Model:
  """Repeats what it reads; or says "ok 好" without end."""

  config = types.SimpleNamespace(max_length=2000, vocab_size=1 << 30)
  tokenizer = types.SimpleNamespace(decode_bytes=bytes)

  def __init__(self, ends: bool, *adapters: str):
    self.ends, self.adapters, self.runner = ends, adapters, self

  def encode(self, text: str, literal: bool) -> list[int]:
    return list(text.encode())

  def room(self, row: list[int]) -> int:
    return 1000

  def adapter_number(self, name: str) -> int:
    if name not in self.adapters:
      raise errors.InputError(f"no adapter {name!r}")
    return 1

  def stream(self, row: list[int], max_tokens: int, how: object, seed: int, adapter: str | None) -> Iterator[int]:
    if adapter is not None:
      yield from f"{adapter}: ".encode()
    if self.ends:
      yield from row
      return "stop"
    for _ in range(max_tokens // 7):
      yield from "ok 好 ".encode()
      time.sleep(0.002)
    return "length"


def session(ends: bool = True) -> chat_lib.Session:
  return chat_lib.Session(Model(ends))


def converse(conversation: chat_lib.Session, *lines: str, stoppable=contextlib.nullcontext) -> None:
  chat.converse(conversation, iter(lines), stoppable)


def test_replies_alone_are_on_standard_output(capsys):
  conversation = session()
  converse(conversation, "你好,世界", "", "  ", "/help", "/clear", " /help", "/clear", "two", "/nope")
  captured = capsys.readouterr()
  assert captured.out == "你好，世界\n/help\ntwo\n"
  assert "/save FILE" in captured.err and "a new conversation" in captured.err
  assert "(no command /nope; /help shows the commands)" in captured.err
  assert conversation.rounds == [chat_lib.Round("two", "two")]


def test_saving(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("mine.txt").write_text("precious")
  conversation = session()
  converse(conversation, "你好", "/save talk 1.json", "/save mine.txt", "/save", "/save no/such/talk.json")
  history = {"history": [["你好", "你好"]]}
  assert json.loads(pathlib.Path("talk 1.json").read_text(encoding="utf-8")) == history
  assert pathlib.Path("mine.txt").read_text() == "precious"
  errors_ = capsys.readouterr().err
  assert "talk 1.json; rounds: 1" in errors_ and "mine.txt exists" in errors_
  assert "/save needs a file" in errors_ and re.search("cannot write .*no/such/talk.json: no such file", errors_)
  assert sorted(os.listdir()) == ["mine.txt", "talk 1.json"]

  def full(*arguments):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", full)
    with pytest.raises(errors.InputError, match="the disk is full"):
      chat._save(conversation, pathlib.Path("talk 1.json"))
  assert json.loads(pathlib.Path("talk 1.json").read_text(encoding="utf-8")) == history
  assert sorted(os.listdir()) == ["mine.txt", "talk 1.json"]
  converse(conversation, "/save again.json", "more", "/save again.json")
  assert len(json.loads(pathlib.Path("again.json").read_text(encoding="utf-8"))["history"]) == 2


def test_saving_into_a_folder_of_a_model(tmp_path, monkeypatch, capsys):
  """Its files appear one after another, and none of them may be taken."""
  monkeypatch.chdir(tmp_path)
  pathlib.Path("config.json").write_text('{"model_type": "chatglm"}')
  converse(session(), "a", "/save model.safetensors")
  assert "belongs to model weights of another program; choose another file" in capsys.readouterr().err
  assert os.listdir() == ["config.json"]


def test_control_characters_do_not_reach_the_terminal(capsys):
  converse(session(), "\x1b[2J\x07a\tb\u3000好👩\x9b")
  assert capsys.readouterr().out == "\\x1b[2J\\x07a\tb\u3000好👩\\x9b\n"


def test_adapters(capsys):
  conversation = chat_lib.Session(Model(True, "polite", "rude"))
  lines = (
    "one",
    "/adapter",
    "/adapter rude",
    "two",
    "/adapter",
    "/adapter x",
    "/clear",
    "three",
    "/adapter none",
    "four",
  )
  converse(conversation, *lines)
  captured = capsys.readouterr()
  assert captured.out.startswith("one\nrude: ") and "\nrude: three\n" in captured.out
  assert captured.err.splitlines() == [
    "(adapters: none (now), polite, rude)",
    "(adapter: rude)",
    "(adapters: none, polite, rude (now))",
    "(no adapter 'x')",
    "(a new conversation)",
    "(adapter: none)",
  ]
  assert [each.query for each in conversation.rounds] == ["three", "four"]
  converse(session(), "/adapter", "/adapter x")
  assert "(no adapters by name: begin with --adapter=NAME=FOLDER, once for each)" in capsys.readouterr().err


def test_what_is_left_out_or_cut_off_is_told(capsys):
  conversation = session()
  conversation.max_length, conversation.answer_tokens = 60, 20
  converse(conversation, "a" * 20, "b" * 30)
  captured = capsys.readouterr()
  assert captured.out == "a" * 20 + "\n" + "b" * 30 + "\n"
  assert "(rounds left out so far, as they no longer fit: the oldest 1)" in captured.err
  conversation = chat_lib.Session(Model(ends=False), max_length=40)
  converse(conversation, "go")
  assert "(cut off: the conversation's 40 tokens are full)" in capsys.readouterr().err


def test_a_question_that_does_not_fit_is_told_and_the_rest_answered(capsys):
  conversation = session()
  conversation.max_length = 40
  converse(conversation, "q" * 100, "short")
  captured = capsys.readouterr()
  assert captured.out == "short\n" and "takes 101 tokens, and there are 40" in captured.err


def test_interrupt_keeps_the_session(capsys, monkeypatch):
  conversation = session(ends=False)
  printed = []

  def write(text="", **options):
    printed.append(text)
    if text.endswith("好") and "".join(printed).count("好") == 3:
      os.kill(os.getpid(), signal.SIGINT)

  before = signal.getsignal(signal.SIGINT)
  monkeypatch.setattr(chat, "print", write, raising=False)
  chat._answer(conversation, "go", chat._stoppable)
  monkeypatch.undo()
  assert signal.getsignal(signal.SIGINT) is before
  assert conversation.rounds == [chat_lib.Round("go", "ok 好 ok 好 ok 好")]


def test_lines_of_standard_input(monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\r\n好\n\nlast".encode())))
  assert list(chat._piped_lines()) == ["a", "好", "", "last"]


def test_a_conversation_outlives_lines_that_are_no_text(monkeypatch, capsys):
  """Broken bytes, NULs, a byte order mark, and a line without end."""
  monkeypatch.setattr(chat, "LONGEST_LINE", 10)
  lines = b"\xef\xbb\xbfa\n\xffb\n\xe4\xb8\nc\0\n0123456789\n" + b"x" * 95 + b"\nlast"
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
  conversation = session()
  chat.converse(conversation, chat._piped_lines(), contextlib.nullcontext)
  assert [round_.query for round_ in conversation.rounds] == ["a", "\ufffdb", "\ufffd", "c\0", "last"]
  assert capsys.readouterr().err.splitlines() == [
    "(line 2 is not UTF-8 at byte 0: read with \ufffd there)",
    "(line 3 is not UTF-8 at byte 0: read with \ufffd there)",
    "(line 5 has more than 10 bytes: not answered)",
    "(line 6 has more than 10 bytes: not answered)",
  ]


def test_terminal(tmp_path):
  """Typing at a real terminal: Ctrl-C in an answer, on a typed line and on an empty one."""
  code = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
    "import chat_test as t\n"
    "session = t.session(ends=False)\n"
    "t.chat.converse(session, t.chat._typed_lines(), t.chat._stoppable)\n"
    "print('ended', [r.query for r in session.rounds])\n"
  )
  environment = os.environ | {"TERM": "dumb", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(pathlib.Path(__file__).parent)}
  main, terminal = pty.openpty()
  with subprocess.Popen(
    [sys.executable, "-c", code], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
  ) as process:
    os.close(terminal)
    seen = b""

    def wait_for(text: bytes) -> None:
      nonlocal seen
      end = time.monotonic() + 60
      while text not in seen:
        if time.monotonic() > end:
          process.kill()
        assert process.poll() is None, seen
        if select.select([main], [], [], 0.1)[0]:
          seen += os.read(main, 1000)
      seen = seen[seen.index(text) + len(text) :]

    wait_for(b"> ")
    os.write(main, "你好\n".encode())
    wait_for("ok 好".encode())
    process.send_signal(signal.SIGINT)
    wait_for(b"\n> ")
    os.write(main, b"typed")
    wait_for(b"typed")
    time.sleep(0.5)  # a signal between two keys that input() reads would wait for the next key
    process.send_signal(signal.SIGINT)
    wait_for(b"> ")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    wait_for("ended ['你好']".encode())
    assert process.wait(timeout=60) == 0
  os.close(main)


def test_prompts_are_no_answers(tmp_path):
  """At a keyboard, with the answers in a file."""
  code = (
    "import chat_test as t\nfrom glmjax.cli import process\nprocess.begin()\n"
    "with process.keyboard():\n  t.chat.converse(t.session(), t.chat._typed_lines(), t.chat._stoppable)\n"
  )
  environment = os.environ | {"TERM": "dumb", "PYTHONPATH": str(pathlib.Path(__file__).parent)}
  main, terminal = pty.openpty()
  os.write(main, b"hello\n\x04")
  with open(tmp_path / "answers", "wb") as answers:
    done = subprocess.run(
      [sys.executable, "-c", code],
      stdin=terminal,
      stdout=answers,
      stderr=terminal,
      check=False,
      env=environment,
      timeout=60,
    )
  os.close(terminal)
  assert done.returncode == 0 and (tmp_path / "answers").read_bytes() == b"hello\n"
  assert os.read(main, 1000).count(b"> ") == 2
  os.close(main)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_the_prompt(number):
  """Ctrl-C where nothing is typed ends the conversation; SIGTERM the process."""
  code = (
    "import chat_test as t\nfrom glmjax.cli import process\nprocess.begin()\n"
    "try:\n  with process.keyboard():\n"
    "    t.chat.converse(t.session(), t.chat._typed_lines(), t.chat._stoppable)\n"
    "except process.Stopped as stopped:\n  process.end(stopped.number)\n"
  )
  environment = os.environ | {"TERM": "dumb", "PYTHONPATH": str(pathlib.Path(__file__).parent)}
  main, terminal = pty.openpty()
  with subprocess.Popen(
    [sys.executable, "-c", code], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
  ) as started:
    os.close(terminal)
    seen = b""
    while b"> " not in seen:
      seen += os.read(main, 1000)
    time.sleep(0.5)
    started.send_signal(number)
    assert started.wait(60) == (0 if number == signal.SIGINT else 128 + number)
  os.close(main)


def test_mistakes_come_before_the_model(capsys):
  assert cli.main(["chat", "--checkpoint=nowhere", "--top_p=2"]) == 2
  assert "--top_p is 2.0: give a number above 0, up to 1" in capsys.readouterr().err
  assert cli.main(["chat", "--checkpoint=nowhere"]) == 2
  assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
  "flags, how, length",
  [
    ([], chat_lib.SAMPLING, chat_lib.MAX_LENGTH),
    (["--top_k=3", "--max_length=99"], dataclasses.replace(chat_lib.SAMPLING, top_k=3), 99),
    (["--temperature=0"], dataclasses.replace(chat_lib.SAMPLING, temperature=0.0), chat_lib.MAX_LENGTH),
  ],
)
def test_what_no_flag_says_is_the_originals(flags, how, length, monkeypatch):
  made = []
  monkeypatch.setattr(chat_lib, "Session", lambda *given: made.append(given) or types.SimpleNamespace(rounds=[]))
  monkeypatch.setattr(inference, "model_folder", pathlib.Path)
  monkeypatch.setattr(inference.Devices, "load", lambda devices, folder, *options: "model")
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
  assert cli.main(["chat", "--checkpoint=c", *flags]) == 0
  assert made == [("model", how, length, None, 0)]
