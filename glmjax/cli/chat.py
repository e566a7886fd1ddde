"""The chat command: a conversation in the terminal, or one turn a line where standard input is no terminal."""

import codecs
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from glmjax import errors
from glmjax.cli import hosts, inference, process
from glmjax.io import folders, paths, printable, publish

if TYPE_CHECKING:
  from glmjax.infer import chat as chat_lib

HELP = """\
/clear      start a new conversation
/save FILE  write the conversation to FILE, as JSON
/adapter    list the adapters; /adapter NAME answers with that one from now on, /adapter none without any
/help       this
Ctrl-C stops an answer and keeps what is there of it; Ctrl-C or Ctrl-D at an empty prompt ends.
Every other line is said to the model; put a space before one that starts with /."""
LONGEST_LINE = 1 << 20  # bytes of a line of standard input; no model here reads as much
_QUESTION = "你好"  # a short one: programs for such are compiled before the first is asked


@dataclasses.dataclass(frozen=True)
class Drawing:
  """How the tokens of replies are drawn; None: as ChatGLM-6B's are (`SAMPLING` of `infer/chat.py`)."""

  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  no_repeat_ngram: int | None = None
  repetition_penalty: float | None = None
  seed: int = 0


def chat(
  checkpoint: paths.Named,
  max_length: int | None = None,
  answer_tokens: int | None = None,
  drawing: Drawing = Drawing(),
  drafting: inference.Drafting = inference.Drafting(),
  devices: inference.Devices = inference.Devices(),
) -> list[dict[str, str]]:
  """Talks until its input ends; returns the rounds since the last /clear.

  Prompt and answer take at most `max_length` tokens (None: as ChatGLM-6B's), or what the model has if less. The oldest
  rounds are left out where they would not leave `answer_tokens` of them (a quarter) to the answer.
  """
  checkpoint = inference.model_folder(checkpoint)
  # here, as this module is looked at before a command is in order
  from glmjax.infer import ahead, chat as chat_lib, scheduler

  given = {name: value for name, value in vars(drawing).items() if value is not None}
  seed = given.pop("seed")
  how = dataclasses.replace(chat_lib.SAMPLING, **given)
  hosts.check_same((drawing, max_length, answer_tokens), "how replies are drawn")
  max_length = chat_lib.MAX_LENGTH if max_length is None else max_length
  lanes = scheduler.Capacity(1 + drafting.count, drafts=drafting.count)
  model = devices.load(checkpoint, drafting, ahead.First([_QUESTION], max(1, max_length), how, lanes))
  session = chat_lib.Session(model, how, max_length, answer_tokens, seed)
  if not hosts.is_first():
    converse(session, _lines_of_first(None), contextlib.nullcontext)
  elif sys.stdin.isatty():
    _note(f"{checkpoint.name}: {session.max_length} tokens of conversation. /help shows the commands, Ctrl-D ends.")
    with process.keyboard():
      converse(session, _lines_of_first(_typed_lines()), _stoppable)
  else:
    converse(session, _lines_of_first(_piped_lines()), contextlib.nullcontext)
  return [{"query": round_.query, "reply": round_.reply} for round_ in session.rounds]


def converse(session: "chat_lib.Session", lines: Iterator[str], stoppable: Any) -> None:
  """Answers each line, or does what it commands. `stoppable()` is entered for each answer.

  Of several processes all come here with the same lines, and all but the first are silent.
  """
  saved: set[paths.Path] = set()
  for line in lines:
    try:
      if line.startswith("/"):
        _command(session, line, saved)
      elif line.strip():
        _answer(session, line, stoppable)
    except errors.NotFiniteError:  # no other question would fare better
      raise
    except errors.InputError as error:
      _note(str(error))


def _answer(session: "chat_lib.Session", query: str, stoppable: Any) -> None:
  """Prints the reply as it comes, and what there is to say about it."""
  left_out = session.first
  with stoppable() as stopped, contextlib.closing(session.ask(query)) as pieces:
    for piece in pieces:
      _show(printable.text(piece))
      if hosts.flag_of_first(bool(stopped)):
        break
  _show("\n")
  if session.finish_reason == "length":
    _note(f"cut off: the conversation's {session.max_length} tokens are full")
  if session.first > left_out:
    _note(f"rounds left out so far, as they no longer fit: the oldest {session.first}")


def _show(text: str) -> None:
  if hosts.is_first():
    print(text, end="", flush=True)


def _command(session: "chat_lib.Session", line: str, saved: set[paths.Path]) -> None:
  name, _, argument = line.partition(" ")
  if name == "/clear":
    session.clear()
    _note("a new conversation")
  elif name == "/adapter":
    _adapter(session, argument.strip())
  elif not hosts.is_first():
    return  # it tells, and saves
  elif name == "/save":
    if not argument.strip():
      raise errors.InputError("/save needs a file: /save talk.json")
    folders.claim_file(argument.strip(), "/save")
    path = paths.named(argument.strip(), "/save").absolute()
    if path not in saved and (path.is_symlink() or path.exists()):
      raise errors.InputError(f"{path} exists, and was not saved in this conversation: choose another name")
    _save(session, path)
    saved.add(path)
    _note(f"saved in {path}; rounds: {len(session.rounds)}")
  elif name == "/help":
    _note(HELP)
  else:
    raise errors.InputError(f"no command {name}; /help shows the commands")


def _adapter(session: "chat_lib.Session", name: str) -> None:
  """Has an adapter answer from now on; without a name, lists them."""
  from glmjax.infer import adapters  # here, as this module is looked at before a command is in order

  if name:
    session.use(None if name == adapters.NONE else name)
    _note(f"adapter: {name}")
  elif session.adapters:
    names = {adapters.NONE: None, **{each: each for each in session.adapters}}
    _note("adapters: " + ", ".join(each + " (now)" * (used == session.adapter) for each, used in names.items()))
  else:
    _note("no adapters by name: begin with --adapter=NAME=FOLDER, once for each")


def _save(session: "chat_lib.Session", path: paths.Path) -> None:
  """Saves {"history": [[query, reply], ...]}, as ChatGLM's interfaces have it; whole or not at all."""
  text = json.dumps({"history": [[r.query, r.reply] for r in session.rounds]}, ensure_ascii=False, indent=1)
  try:
    publish.write_text(path, text + "\n")
  except OSError as error:
    raise errors.InputError(f"cannot write {path}: {errors.reason(error)}") from error


def _lines_of_first(own: Iterator[str] | None) -> Iterator[str]:
  """Yields the lines of process 0, in every process; the others need none of their own."""
  while (line := hosts.from_first(lambda: next(own, None))) is not None:
    yield line


def _typed_lines() -> Iterator[str]:
  """Yields lines typed at a prompt, until Ctrl-D, or Ctrl-C where nothing is typed."""
  try:
    import readline  # gives input() editing and earlier lines
  except ImportError:
    readline = None
  typed = sys.stdout if sys.stdout.isatty() else sys.stderr  # a file of answers holds no prompts
  while True:
    if typed is sys.stderr:
      print("> ", end="", file=typed, flush=True)
    try:
      yield input("" if typed is sys.stderr else "> ")
    except EOFError:
      print(file=typed, flush=True)
      return
    except process.Stopped:
      raise
    except KeyboardInterrupt:
      print(file=typed, flush=True)
      if readline is None or not readline.get_line_buffer():
        return


def _piped_lines() -> Iterator[str]:
  """Yields lines of standard input, as they come. A conversation outlives one that is no text, or too long."""
  stream, number, skips = sys.stdin.buffer, 0, False
  while part := stream.readline(LONGEST_LINE):
    ends = part.endswith(b"\n")
    if not skips:
      number += 1
      if ends or len(part) < LONGEST_LINE:
        yield _text(part, number)
      else:
        _note(f"line {number} has more than {LONGEST_LINE:,} bytes: not answered")
    skips = not ends


def _text(line: bytes, number: int) -> str:
  """Returns the line's text, the end of line apart."""
  line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
  text = line.decode("utf-8", errors="replace").rstrip("\r\n")
  try:
    line.decode("utf-8")
  except UnicodeDecodeError as error:
    _note(f"line {number} is not UTF-8 at byte {error.start}: read with \ufffd there")
  return text


def _stoppable() -> contextlib.AbstractContextManager[list[int]]:
  """Returns the scope of a list that stays empty until Ctrl-C is pressed; nothing is interrupted half-way."""
  return process.noting(signal.SIGINT)


def _note(text: str) -> None:
  if not hosts.is_first():
    return
  print(f"({text})" if "\n" not in text else text, file=sys.stderr, flush=True)
