"""The tasks that come with glmjax: each is found by its name, and asks what its data set's own files hold."""

from collections.abc import Sequence
import dataclasses
import pathlib
import re

import engine_models
import evaluation_data as data
import pytest
import untrained_run
import yaml

from glmjax import errors
from glmjax import tokens as tokens_lib
from glmjax.cli import evaluation
from glmjax.harness import asking
from glmjax.harness import items as items_lib
from glmjax.harness import layouts
from glmjax.harness import results
from glmjax.harness import task as task_lib

NAMES = list(task_lib.shipped())
FIRST = 10  # the id of the character 0


class Characters:
  """A character a token, in the icetk layout with image ids before them."""

  num_image_tokens = 6
  specials = tokens_lib.icetk(6, 1 << 16)
  vocab_size = specials.dblock + 1

  def encode(self, text: str, allow_special: bool = False) -> list[int]:
    del allow_special
    return [FIRST + ord(character) for character in text]

  def decode(self, ids: Sequence[int]) -> str:
    return "".join("_" if i in (self.specials.mask, self.specials.gmask) else chr(i - FIRST) for i in ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("data")
  data.write(path)
  return path


def read(name: str, folder: pathlib.Path) -> list[items_lib.Item]:
  [task] = task_lib.find([name])
  found = task.files(folder)
  paths = [path for own in found.values() for path in own]
  return [item for path in paths for item in items_lib.read(task, path, folder / task.path, Characters())]


def question(name: str, folder: pathlib.Path) -> tuple[str, list[str], int]:
  """The first question of a task, with _ for its blank where that is not at the end."""
  item = read(name, folder)[0]
  assert isinstance(item, items_lib.Question)
  tokenizer = Characters()
  return tokenizer.decode(item.context), [tokenizer.decode(choice) for choice in item.choices], item.label


@pytest.mark.parametrize("name", NAMES)
def test_every_task_asks(name: str, folder: pathlib.Path) -> None:
  [task] = task_lib.find([name])
  assert task.name == name and task.version
  items = read(name, folder)
  assert items
  specials = Characters.specials
  config, _ = engine_models.model()
  layout = layouts.Layout(task, dataclasses.replace(config, vocab_size=1 << 17, max_length=2048), specials)
  asked = asking.placed("all", "file", items, layout)
  for each in asked:
    if isinstance(each.item, items_lib.Question):
      rows = layout.question(each.item)
      assert len(rows) == len(each.item.choices) and 0 <= each.item.label < len(rows)
      assert sum(token in (specials.mask, specials.gmask) for token in rows[0].prompt.tokens) == 1
    elif isinstance(each.item, items_lib.Blank):
      assert each.item.targets and all(each.item.targets)
      assert layout.mask in layout.blank(each.item).tokens
    else:
      assert layout.window(each.item).targets


@pytest.mark.parametrize("name", NAMES)
def test_a_task_says_where_its_data_come_from(name: str) -> None:
  text = task_lib.shipped()[name].read_text(encoding="utf-8")
  assert text.startswith("# ") and all(len(line) <= 120 for line in text.splitlines())
  keys = yaml.safe_load(text)
  assert {*keys} <= {field for field in task_lib.Task.__dataclass_fields__}
  chinese = "_zh_" in name or name in ("ceval", "packages_sentiment")
  assert chinese or not re.search("[\u4e00-\u9fff]", text)


def test_names_and_groups() -> None:
  names = [task.name for task in task_lib.find(["fewclue_en", "mmlu"])]
  assert names == [f"fewclue_en_{each}" for each in ("bustm", "chid", "cluewsc", "eprstmt", "ocnli")] + ["mmlu"]
  assert len(task_lib.find(["clue"])) == 14 and len(task_lib.find(["bigbench"])) == 2
  assert [task.name for task in task_lib.find(["lambada"])] == ["lambada"]
  assert sum(len(task.patterns) for task in task_lib.find(["bigbench"])) == 24


def test_what_does_not_fit() -> None:
  """A blank within stays, each choice is given room by itself, and what is too long is named."""
  [task] = task_lib.find(["fewclue_zh_chid"])
  config, _ = engine_models.model()
  specials = Characters.specials
  task = dataclasses.replace(task, max_seq_length=20)
  layout = layouts.Layout(task, dataclasses.replace(config, vocab_size=1 << 17), specials)
  text = Characters().encode("abcdefghijklmnop")
  for place in range(len(text) + 1):
    context = [*text[:place], specials.mask, *text[place:]]
    rows = layout.question(items_lib.Question(context, [[11] * 10, [12]], 0, {}))
    kept = rows[0].prompt.tokens[: -len(rows[0].targets)]
    assert specials.mask in kept and len(rows[0].prompt.tokens) <= 20
    start = context.index(kept[0])
    assert kept == context[start : start + len(kept)]
  with pytest.raises(errors.InputError, match="^task fewclue_zh_chid, a.json, item 1: "):
    items = [items_lib.Question(text, [[11] * size], 0, {}) for size in (3, 30)]
    asking.placed("all", "a.json", items, layout)


def test_put_to_a_model(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """By their names, with the blank within, behind examples, at the end; choices, pairs of sentences, answers."""
  named = ["fewclue_zh_chid", "stereoset", "crows_pairs", "packages_lambada_zh", "ethos_one"]
  run = untrained_run.write(tmp_path / "run")
  found = evaluation.evaluate(run, named, folder, tmp_path / "out")["tasks"]
  assert found.keys() == {*named[:1], "stereoset_inter", "stereoset_intra", *named[2:]}
  _, records = results.read(tmp_path / "out")
  assert len(records) == 2 + 1 + 1 + 4 + 1 + 12
  for record in records:
    assert ("prediction_text" in record) == (record["task"] == "packages_lambada_zh")
    if record["task"] == "ethos_one":
      [shot] = record["shots"]
      assert shot.startswith("Ethos_Dataset_Binary.csv, line ")


def test_names_that_there_are_not() -> None:
  with pytest.raises(errors.InputError, match="no task, file or folder lambda; of tasks there are lambada,"):
    task_lib.find(["lambda"])
  with pytest.raises(errors.InputError, match="no task, file or folder xyz; .*bigbench, .*clue, .*mmlu"):
    task_lib.find(["xyz"])


def test_a_folder_with_tasks_goes_before_a_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  (tmp_path / "clue").mkdir()
  assert len(task_lib.find(["clue"])) == 14
  (tmp_path / "clue" / "own.yaml").write_text("name: own\ntype: mul\npath: own\n")
  assert [task.name for task in task_lib.find(["clue"])] == ["own"]


def test_mmlu_as_it_is_asked(folder: pathlib.Path) -> None:
  context, choices, label = question("mmlu", folder)
  examples = re.findall(r"Sum (\d)\?\n\(A\) 1\n\(B\) 2\n\(C\) 3\n\(D\) 4\nAnswer: \(B\n\n", context)
  assert sorted(examples) == list("01234")
  assert context.startswith("The following are multiple choice questions about abstract algebra.\n\nSum ")
  assert context.endswith("\n\nWhat leaves at nine?\n(A) ferry\n(B) train\n(C) bird\n(D) moon\nAnswer: (")
  assert (choices, label) == (["A", "B", "C", "D"], 0)


def test_blanks_within(folder: pathlib.Path) -> None:
  assert question("fewclue_zh_chid", folder) == ("大家_，把船修好。", ["同心协力", "画蛇添足"], 0)
  assert question("stereoset_intra", folder)[:2] == ("The sailor is _ today.", ["calm", "wild", "green moss"])


def test_texts_are_no_masks(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """[MASK] in a data set's own text is text."""
  path = tmp_path / "boolq" / "dev.jsonl"
  path.parent.mkdir()
  path.write_text('{"question": "is [MASK] here", "title": "", "answer": false, "passage": "P."}\n')
  assert question("boolq", tmp_path) == ("P.\nQuestion: is [MASK] here?\nAnswer:", ["No", "Yes"], 0)


def test_prompts_of_two_languages(folder: pathlib.Path) -> None:
  english, chinese = question("clue_en_cmnli", folder), question("clue_zh_cmnli", folder)
  assert english == (
    "船九点开。\nQuestion: 船开了。 True, False, or Neither?\nAnswer:",
    ["True", "False", "Neither"],
    2,
  )
  assert chinese == ("船九点开。\n问题：“船开了。”对，错，还是不一定？\n答案：", ["对", "错", "不一定"], 2)
