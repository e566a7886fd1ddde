"""ChatGLM's conversation: prompt, clean-up and streaming, the budget of its history."""

import itertools
import random
import re

import pytest

from glmjax import errors
from glmjax.infer import chat
from glmjax.infer import engine
from glmjax.infer import sampling

ROUNDS = [chat.Round("你好", "你好！"), chat.Round("Who are you?", "A model.")]


class Bytes:
  """A byte a token; ids from 256 on mean nothing."""

  def decode_bytes(self, ids: list[int]) -> bytes:
    return bytes(i for i in ids if i < 256)


class Parrot:
  """An engine whose tokens are the prompt's bytes, and whose answers are given."""

  tokenizer = Bytes()

  def __init__(self, *answers: bytes, max_length: int = 200):
    self.config = type("Config", (), {"max_length": max_length, "vocab_size": 257})
    self.prompts: list[str] = []
    self.seeds: list[int] = []
    self._answers = itertools.cycle(answers)

  def encode(self, text: str, literal: bool = False) -> list[int]:
    assert literal
    return [*text.encode(), 256]

  room = engine.Engine.room

  def stream(self, row, max_tokens, how, seed, adapter):
    assert adapter is None
    assert len(row) + 1 + max_tokens <= self.config.max_length
    self.prompts.append(bytes(row[:-1]).decode())
    self.seeds.append(seed)
    answer = next(self._answers)
    yield from answer[:max_tokens]
    return "stop" if len(answer) <= max_tokens else "length"


def test_prompt_is_chatglms():
  assert chat.prompt([], "你好") == "你好"
  assert chat.prompt(ROUNDS, "再见") == (
    "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：Who are you?\n答：A model.\n[Round 2]\n问：再见\n答："
  )
  assert chat.SAMPLING == sampling.Sampling(temperature=0.95, top_k=50, top_p=0.7) and chat.MAX_LENGTH == 2048


def original_clean(text: str) -> str:
  """As the original goes about it: one pass for each mark and side."""
  text = text.strip().replace("[[训练时间]]", "2023年")
  for half, full in zip(",!:;?", "，！：；？"):
    text = re.sub(r"([\u4e00-\u9fff])" + re.escape(half), r"\1" + full, text)
    text = re.sub(re.escape(half) + r"([\u4e00-\u9fff])", full + r"\1", text)
  return text


def random_reply(rng: random.Random) -> str:
  parts = [*",!:;?,", *"中文a1 \n\u3000[]训👩。\x1f", "[[训练时间]]", "[[训练时"]
  return "".join(rng.choice(parts) for _ in range(rng.randrange(12)))


def test_clean_is_the_originals():
  assert chat.clean(" 你好,我是[[训练时间]]的模型!Yes, ok?好:不 ") == "你好，我是2023年的模型！Yes, ok？好：不"
  rng = random.Random(0)
  for _ in range(5000):
    text = random_reply(rng)
    assert chat.clean(text) == original_clean(text)


def test_stream_adds_up_and_never_takes_back():
  """Byte by byte, broken characters among them; what is shown is always a start of the clean whole."""
  rng = random.Random(1)
  for _ in range(3000):
    data = random_reply(rng).encode()
    if rng.random() < 0.2:
      data = data[: rng.randrange(len(data) + 1)] + rng.choice([b"", b"\xff", b"\xe4", b"\xe4\xb8"])
    whole = chat.clean(data.decode(errors="replace"))
    stream = chat.CleanStream()
    parts = [stream.add(bytes([byte])) for byte in data]
    for i, part in enumerate(parts):
      assert "\ufffd" not in part or "\ufffd" in whole
      assert whole.startswith("".join(parts[: i + 1]))
    assert "".join(parts) + stream.end() == whole == stream.shown


def test_text_is_shown_as_soon_as_it_is_settled():
  stream = chat.CleanStream()
  steps = [
    ("中".encode()[:2], ""),
    ("中".encode()[2:], "中"),
    (b",", "，"),
    (b"a", "a"),
    (b",", ""),
    (b" ", ","),
    (b"b", " b"),
    ("[[训练".encode(), ""),
    ("时间]]".encode(), "2023年"),
    (b"[[", ""),
    (b"x", "[[x"),
  ]
  for data, shown in steps:
    assert stream.add(data) == shown


@pytest.mark.parametrize("unit", [" ", "\n", "a", "中", ",", "[", "\u3000", "[[训练时间]"])
def test_a_reply_costs_what_it_is_long(monkeypatch, unit):
  """Long runs of anything: no token has the whole reply looked at again."""
  seen = [0]
  clean_part, undecided = chat._in_full_width, chat._UNDECIDED

  class Counting:
    def search(self, text: str):
      seen[0] += len(text)
      return undecided.search(text)

  def count(text: str) -> str:
    seen[0] += len(text)
    return clean_part(text)

  monkeypatch.setattr(chat, "_in_full_width", count)
  monkeypatch.setattr(chat, "_UNDECIDED", Counting())
  stream = chat.CleanStream()
  parts = [stream.add(b"a")] + [stream.add(unit.encode()) for _ in range(20_000)] + [stream.add(b"b"), stream.end()]
  assert seen[0] < 50 * 20_000 * len(unit)
  monkeypatch.undo()
  assert "".join(parts) == chat.clean("a" + unit * 20_000 + "b") == stream.shown


def test_tokens_are_decoded_once():
  """Not all of them again with each."""
  decoded = [0]

  class Counting(Bytes):
    def decode_bytes(self, ids: list[int]) -> bytes:
      decoded[0] += len(ids)
      return super().decode_bytes(ids)

  model = Parrot("好a ".encode() * 500, max_length=4000)
  model.tokenizer = Counting()
  assert "".join(chat.Session(model, max_length=4000).ask("q")) == ("好a " * 500).strip()
  assert decoded[0] < 4 * 2500


def test_conversation_grows_and_is_cleaned():
  model = Parrot(" 好的,ok ".encode(), max_length=2000)
  session = chat.Session(model)
  assert session.max_length == 2000 and session.answer_tokens == 500
  for query in ("一", "二"):
    assert "".join(session.ask(query)) == "好的，ok"
  assert model.prompts == ["一", "[Round 0]\n问：一\n答：好的，ok\n[Round 1]\n问：二\n答："]
  assert model.seeds == [0, 1]
  session.clear()
  assert "".join(session.ask("三")) and model.prompts[-1] == "三" and model.seeds[-1] == 2


def test_oldest_rounds_are_left_out_whole():
  model = Parrot(b"yes", max_length=200)
  session = chat.Session(model, max_length=100, answer_tokens=20)
  for i in range(8):
    assert "".join(session.ask(f"question {i}")) == "yes"
    kept = session.rounds[session.first : -1]
    assert model.prompts[-1] == chat.prompt(kept, f"question {i}")
    assert len(model.prompts[-1].encode()) + 2 + 20 <= 100
  assert session.first > 0 and len(session.rounds) == 8
  # As many as fit: one more would not have.
  more = chat.prompt(session.rounds[session.first - 1 : -1], "question 7")
  assert len(more.encode()) + 2 + 20 > 100


def test_questions_that_do_not_fit_leave_all_as_it_was():
  session = chat.Session(Parrot(b"yes" * 50), max_length=100, answer_tokens=20)
  with pytest.raises(errors.InputError, match="takes 102 tokens, and there are 100"):
    "".join(session.ask("q" * 100))
  with pytest.raises(errors.InputError, match="takes 502 tokens, and the model has 200"):
    "".join(session.ask("q" * 500))
  assert session.rounds == [] and session.first == 0
  assert len("".join(session.ask("q" * 90))) == 8  # all the room there is, less than an answer should have
  assert session.finish_reason == "length"


def test_an_answer_that_is_stopped_keeps_what_was_shown():
  session = chat.Session(Parrot("好的,行".encode(), b""))
  answer = session.ask("一")
  shown = "".join(next(answer) for _ in range(4))
  answer.close()
  assert shown == "好" and session.rounds == [chat.Round("一", "好")] and session.finish_reason == "interrupted"
  answer = session.ask("二")
  next(answer)
  answer.close()  # an empty answer has ended by itself: it is one
  assert len(session.rounds) == 1
  session = chat.Session(Parrot(b""))
  assert "".join(session.ask("一")) == "" and session.rounds == [chat.Round("一", "")]


def test_settings_out_of_range():
  for settings in (dict(max_length=3), dict(answer_tokens=0), dict(answer_tokens=200)):
    with pytest.raises(errors.InputError, match="give"):
      chat.Session(Parrot(b""), **settings)
