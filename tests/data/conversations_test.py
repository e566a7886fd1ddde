"""Conversations as pairs: what the server would read before each answer, what is refused, what a long one costs."""

import copy
import json
import random

import pytest

from glmjax import errors
from glmjax import rounds
from glmjax.data import conversations
from glmjax.data import instructions
from glmjax.data import splits
from glmjax.serve import prompts
from glmjax.serve import wire


def message(role, content, **more):
  return {"role": role, "content": content, **more}


def read(path, *records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return list(instructions.file_instructions(path, 0))


@pytest.fixture
def path(tmp_path):
  return tmp_path / "chats.jsonl"


def fails(match, path, messages, **more):
  with pytest.raises(errors.InputError, match=match) as caught:
    read(path, {"prompt": "a", "response": "b"}, {"messages": messages, **more})
  assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)
  assert len(str(caught.value)) < 400


def drawn(r):
  """A conversation that is none of the refused ones."""
  messages = [message(r.choice(("system", "developer")), "be kind")] * r.randrange(2)
  for i in range(r.randrange(1, 6)):
    messages += [message("user", f"q{i}\n{'问' * r.randrange(40)}")] * r.randrange(1, 3)
    messages.append(message("assistant", f"a{i} {'答' * r.randrange(40)}", weight=r.choice((1, 1, 1, 0))))
  messages[-1]["weight"] = 1
  return messages


def test_each_answer_is_learned_behind_what_the_server_would_read(path):
  r = random.Random(0)
  for _ in range(50):
    messages = drawn(r)
    wanted = []
    for i, each in enumerate(messages):
      if each["role"] == "assistant" and each["weight"]:
        before = [wire.Message(role=m["role"], content=m["content"]) for m in messages[:i]]
        wanted.append((prompts.conversation(before), each["content"]))
    assert [pair for _, pair in read(path, {"messages": messages, "id": 5})] == wanted


def test_one_conversation(path):
  messages = [message("system", "be kind"), message("user", "hi"), message("assistant", "ho")]
  messages += [message("user", [{"type": "text", "text": "and "}, {"type": "text", "text": "now"}], name="Ada")]
  messages += [message("assistant", "no", tool_calls=None)]
  assert read(path, {"messages": messages}) == [
    ("train", ("be kind\nhi", "ho")),
    ("train", ("[Round 0]\n问：be kind\nhi\n答：ho\n[Round 1]\n问：and now\n答：", "no")),
  ]
  messages[2]["weight"] = 0
  assert [targets for _, (_, targets) in read(path, {"messages": messages})] == ["no"]
  both = {"messages": messages, "prompt": "a", "response": "b"}
  with pytest.raises(errors.InputError, match="the field 'messages' is not read"):
    read(path, both)


def test_pairs_of_a_conversation_are_in_one_split(path):
  chats = [{"messages": [message("user", f"{i}"), message("assistant", "a")] * 3} for i in range(120)]
  found = read(path, *chats)
  assert len(found) == 360 and [split for split, _ in found].count("validation") == 6
  for i in range(120):
    assert {split for split, _ in found[3 * i : 3 * i + 3]} == {splits.split_of(i)}


USER, ANSWER = message("user", "a"), message("assistant", "b")


@pytest.mark.parametrize(
  "messages,match",
  [
    ([], "not a list of messages"),
    ({"role": "user"}, "not a list of messages"),
    ("a", "not a list of messages"),
    (None, "not a list of messages"),
    (["a"], 'message 1 is "a", not'),
    ([USER, ANSWER, {"content": "a"}], "message 3 has the role null, none of system, developer, user, assistant"),
    ([USER, message("tool", "5"), ANSWER], 'message 2 has the role "tool"'),
    ([message("User", "a"), ANSWER], 'message 1 has the role "User"'),
    ([message(["user"], "a"), ANSWER], "message 1 has the role"),
    ([message("user", ""), ANSWER], "message 1, the user's, is empty"),
    ([USER, message("assistant", " \n")], "message 2, the assistant's, is empty"),
    ([{"role": "user"}, ANSWER], "message 1, the user's, is empty"),
    ([message("user", []), ANSWER], "message 1, the user's, is empty"),
    ([message("user", None), ANSWER], "message 1: the field 'content' is null, not a string"),
    ([message("user", 5), ANSWER], "message 1: the field 'content' is 5, not a string"),
    ([message("user", "\ud800"), ANSWER], "message 1: the field 'content' holds half a surrogate"),
    ([message("user", [{"type": "image_url"}]), ANSWER], "message 1 has a part that is no text"),
    ([message("user", [{"type": "text"}]), ANSWER], "message 1: no field 'text'"),
    ([message("user", ["a"]), ANSWER], "message 1 has a part that is no text"),
    ([USER, message("assistant", "b", tool_calls=[{"id": 1}])], "message 2: 'tool_calls' is not read"),
    ([USER, message("assistant", "b", weight=0.5)], "message 2 has the weight 0.5"),
    ([USER, message("assistant", "b", weight=[])], "message 2 has the weight"),
    ([USER, message("assistant", "b", weight=0)], "no answer is learned"),
    ([ANSWER], "messages: the assistant's answer follows no question"),
    ([USER, ANSWER, ANSWER], "messages: the assistant's answer follows no question"),
    ([USER], "the last message is the user's, with no answer to learn"),
    ([USER, ANSWER, USER], "the last message is the user's"),
    ([USER, ANSWER, message("system", "x")], "the last message is the system's"),
  ],
)
def test_what_is_no_conversation_is_refused(path, messages, match):
  fails(match, path, messages)


def test_other_fields_of_a_conversation(path):
  fails("the field 'tools' is not read, and might belong", path, [USER, ANSWER], tools=[{"name": "search"}])
  assert read(path, {"messages": [USER, ANSWER], "tools": [], "source": "x"}) == [("train", ("a", "b"))]


def test_spoiled_conversations_are_read_or_named(path):
  r = random.Random(1)
  odd = (None, 5, -1.5, True, "", "a", [], {}, ["a"], {"a": 1}, "\ud800", [[["a"]]], "x" * 1000)
  refused = 0
  for _ in range(500):
    record = {"messages": json.loads(json.dumps(drawn(r)))}
    for _ in range(r.randrange(1, 4)):
      place = r.choice([record, record["messages"], *record["messages"]] if record.get("messages") else [record])
      if isinstance(place, list):
        place[r.randrange(len(place))] = copy.deepcopy(r.choice(odd))
      else:
        place[r.choice([*place, "more"])] = copy.deepcopy(r.choice(odd))
      if not isinstance(record.get("messages"), list) or not all(isinstance(m, dict) for m in record["messages"]):
        break
    try:
      found = read(path, record)
      assert found and all(isinstance(said, str) for _, pair in found for said in pair)
    except errors.InputError as error:
      refused += 1
      assert str(error).startswith(f"{path}:1: ") and "\n" not in str(error)
  assert 250 < refused < 500


def test_a_long_conversation_costs_a_multiple_of_its_length(path):
  turns = [(f"question {i} {'x' * 90}", f"answer {i} {'y' * 90}") for i in range(5_000)]
  messages = [message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn)]
  found = [pair for _, pair in read(path, {"messages": messages})]
  assert [targets for _, targets in found] == [answer for _, answer in turns]
  assert max(len(inputs) for inputs, _ in found) < 1.2 * conversations.HISTORY_CHARACTERS
  kept = next(k for k in range(100) if found[-1][0] == rounds.prompt(turns[-1 - k : -1], turns[-1][0]))
  assert kept == conversations.HISTORY_CHARACTERS // sum(map(len, turns[-1]))


def test_a_message_of_ten_megabytes(path):
  long = "很长" * 1_700_000
  found = read(path, {"messages": [message("user", long), message("assistant", "b"), USER, message("assistant", long)]})
  assert [pair for _, pair in found] == [(long, "b"), ("a", long)]
