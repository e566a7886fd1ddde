"""The report on text: what is counted, what is never told, what is refused, and that memory is bounded."""

import json
import random
import re
import tracemalloc

import pytest

from glmjax import cli, errors
from glmjax.corpus import measures, overlap, survey
from glmjax.data import text, word_list
from glmjax.tokenizer import training

PRIVATE = ("zhang.wei@mailbox.cn", "13812345678", "11010519491231002X", "4111 1111 1111 1111")


def sentence(rng: random.Random, size: int = 30) -> str:
  return " ".join(f"word{rng.randrange(2000)}" for _ in range(size))


def write(path, documents):
  path.write_text("".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in documents), "utf-8")
  return path


@pytest.fixture
def corpus(tmp_path):
  """English, and Chinese with all that should be found."""
  rng = random.Random(0)
  plain = [sentence(rng) for _ in range(20)]
  near = " ".join([*plain[3].split(), "again"])
  en = [f"{each}\nRead more on our page." for each in plain[:6]]
  write(tmp_path / "en.jsonl", [*plain, plain[5].upper(), near, *en, "A line that is longer. " * 50])
  zh = [
    "中国政府发展经济，人民生活提高。" * 3,
    "这家酒店的服务不错，离机场很近。",
    *(f"联系：{each}。谢谢" for each in PRIVATE),
  ]
  write(tmp_path / "zh.jsonl", [*zh, "Привет, мир"])
  return tmp_path


def test_what_is_counted(corpus):
  (corpus / "words.txt").write_text("经济\nagain\n\nnever there\n", "utf-8")
  report = survey.survey(
    {"en": corpus / "en.jsonl", "zh": corpus / "zh.jsonl"}, corpus / "out", words=corpus / "words.txt"
  )
  texts = [list(text.documents(corpus / name)) for name in ("en.jsonl", "zh.jsonl")]
  for found, own in (
    (report["corpora"]["en"], texts[0]),
    (report["corpora"]["zh"], texts[1]),
    (report, sum(texts, [])),
  ):
    assert found["documents"] == len(own) and found["characters"] == sum(map(len, own))
    assert found["bytes"] == sum(len(each.encode()) for each in own)
  languages = report["corpora"]["zh"]["languages"]
  assert [languages[name]["documents"] for name in ("en", "zh", "other")] == [1, 5, 1]  # an address of e-mail is a to z
  exact, near = report["duplicates"]["exact"], report["duplicates"]["near"]
  assert exact["documents"] == 1 and near["documents"] >= 1 and near["compared"] == report["documents"]
  assert exact["examples"][0]["document"].endswith("en.jsonl, document 21")
  assert exact["examples"][0]["of"].endswith("en.jsonl, document 6")
  assert any(each["of"].endswith("document 4") for each in near["examples"])
  assert report["lines"]["repeated"] == [{"documents": 6, "line": "Read more on our page."}]
  assert report["lines"]["longest"][0]["characters"] == 23 * 50
  assert {kind for kind, own in report["personal"].items() if own["documents"] == 1} == {
    *("email", "phone_cn", "id_cn", "card")
  }
  assert report["words"]["documents"] == 2
  lengths = report["lengths"]["characters"]
  assert sum(map(sum, lengths["histogram"].values())) == report["documents"] and lengths["most"] == 23 * 50
  assert json.loads((corpus / "out" / "report.json").read_text("utf-8")) == json.loads(json.dumps(report))


def test_personal_data_is_never_told(corpus):
  """Neither in lines that are repeated or long, nor in samples, wherever a text is cut."""
  both = "。联系 ".join(PRIVATE)
  own = [f"{'长' * cut}{both}\n本报讯 {both} 的记者\n{index}" for index, cut in enumerate(range(0, 90, 3))]
  write(corpus / "zh.jsonl", [f"{own[0]}很长的一段中文文本，为了成为样本，需要四十个字符以上。", *own])
  tokenizer = training.train(list(text.documents([corpus / "en.jsonl", corpus / "zh.jsonl"])), corpus / "tok", 512)
  report = survey.survey([corpus / "zh.jsonl", corpus / "en.jsonl"], corpus / "out", corpus / "tok")
  assert report["tokenizer"] == tokenizer.fingerprint and report["lengths"]["tokens"]["most"] > 10
  assert report["lines"]["repeated"][0]["line"].startswith("本报讯 <email>。联系 <phone_cn>")
  for name in ("report.json", "report.md"):
    written = (corpus / "out" / name).read_text("utf-8")
    assert not [each[i : i + 5] for each in PRIVATE for i in range(len(each) - 4) if each[i : i + 5] in written], name
  page = (corpus / "out" / "report.md").read_text("utf-8")
  assert "[MASK]" in page and "[gMASK]" in page and "`***********`" in page
  for picture in re.findall(r"\]\((\w+\.png)\)", page):
    assert (corpus / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_overlap_is_what_was_planted(tmp_path):
  """Whatever case, punctuation and lines; in Chinese by characters; one unit less is not enough."""
  rng = random.Random(1)
  items = [sentence(rng, 20) for _ in range(8)]
  chinese = [chr(0x4E00 + i) for i in range(200)]
  rng.shuffle(chinese)
  planted = [
    f"{sentence(rng)} {' '.join(items[2].split()[3:16]).upper()}, {sentence(rng)}",  # 13 words
    f"{sentence(rng)} {' '.join(items[4].split()[3:15])} {sentence(rng)}",  # 12
    f"{sentence(rng)}.\n{items[6].replace(' ', ', ')}!",
    "".join(chinese[50:63]) + "完",
  ]
  write(tmp_path / "train.jsonl", [*(sentence(rng) for _ in range(30)), *planted])
  folder = tmp_path / "sets"
  (folder / "deep").mkdir(parents=True)
  lines = [{"inputs_pretokenized": each, "choices": ["a", {"b": "c d"}], "label": 1} for each in items]
  (folder / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
  lines = [{"q": {"text": "".join(chinese[i : i + 40])}} for i in (0, 40, 100)] + [{"q": "短", "n": 3, "no": None}]
  (folder / "deep" / "b.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
  (folder / "c.txt").write_text("Nothing of it.\n\nOr\n")
  found = survey.survey([tmp_path / "train.jsonl"], tmp_path / "out", against=[folder])["overlap"]
  assert found["n"] == 13
  figures = {name.rpartition("/")[2]: own for name, own in found["files"].items()}
  assert figures["a.jsonl"] == {
    **{"items": 8, "compared": 8, "overlapping": 2, "share": 0.25},
    "examples": [f"{folder / 'a.jsonl'}:3", f"{folder / 'a.jsonl'}:7"],
  }
  assert (figures["b.jsonl"]["items"], figures["b.jsonl"]["compared"]) == (4, 3)
  assert figures["b.jsonl"]["examples"] == [f"{folder / 'deep' / 'b.jsonl'}:2"]  # its characters 40 to 79
  assert figures["c.txt"] == {"items": 2, "compared": 0, "overlapping": 0, "share": None, "examples": []}
  assert "| 8 | 8 | 2 | 25.00% |" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_overlap_across_blocks_of_a_long_document(tmp_path, monkeypatch):
  rng = random.Random(2)
  item = sentence(rng, 13)
  monkeypatch.setattr("glmjax.data.units.BLOCK", 300)
  for place in range(0, 60, 7):
    evaluation = overlap.Evaluation([write(tmp_path / "items.jsonl", [item])])
    for block in survey.units.blocks(f"{sentence(rng, place)} {item} {sentence(rng, 80)}", 12):
      evaluation.meet(block.grams(13))
    (own,) = evaluation.figures()["files"].values()
    assert own["overlapping"] == 1, place


def test_words_are_whole_in_english_and_anywhere_in_chinese(tmp_path):
  (tmp_path / "words.txt").write_text("Ass\n坏人\ntwo words\n", "utf-8")
  listed = word_list.Words(tmp_path / "words.txt")
  for document, there in (
    ("You ASS!", True),
    ("A classic assessment.", False),
    ("他是个坏人吗", True),
    ("坏的人", False),
    ("Two\nwords", True),
    ("two other words", False),
  ):
    assert any(listed.are_in(block) for block in survey.units.blocks(document, listed.overlap)) == there, document
  for content, said in (("", "holds no words"), ("!?\n", "words.txt:1: an entry of 0"), ("a " * 14, "an entry of 14")):
    (tmp_path / "words.txt").write_text(content)
    with pytest.raises(errors.InputError, match=said):
      word_list.Words(tmp_path / "words.txt")


def test_rare_lines_are_forgotten_and_frequent_ones_are_not(monkeypatch):
  monkeypatch.setattr(measures, "_WIDTH", 50)
  lines = measures.Lines()
  for i in range(500):
    lines.add(
      f"a line of one document {i}\nanother of this document {i}\n{'the line of every tenth' if i % 10 == 0 else ''}",
      "",
    )
  assert len(lines._counts) < 150
  (found,) = lines.figures()["repeated"]
  assert found["line"] == "the line of every tenth" and 50 - 1050 / 50 <= found["documents"] <= 50


def test_of_a_line_no_more_is_kept_than_is_shown():
  """What is cut is masked before: no number is kept by half."""
  lines = measures.Lines()
  long = ["中" * 70 + PRIVATE[1] + "文" * 3000, "中" * 3000]
  for _ in range(5):
    lines.add("\n".join(long), "")
  assert max(len(own[2]) for own in lines._counts.values()) <= measures._SHOWN + 3
  shown = [each["line"] for each in lines.figures()["repeated"]]
  assert sorted(shown) == sorted(map(measures.shown, long)) and not any(PRIVATE[1][:5] in each for each in shown)


def test_memory_is_bounded(tmp_path):
  """A line of 3 MB, and many documents: little more than the line several times, and 500 bytes a document."""
  rng = random.Random(3)
  some = sentence(rng, 2000)
  write(tmp_path / "long.jsonl", [(some * 200)[:3_000_000]])
  write(tmp_path / "many.jsonl", [f"{i} {some[i : i + 30]}" for i in range(1000)])
  write(tmp_path / "few.jsonl", [some])
  survey.survey([tmp_path / "few.jsonl"], tmp_path / "out")  # what is imported first is no memory of a text's
  tracemalloc.start()
  try:
    for name, most in (("many.jsonl", 1000 * 1500 + 20e6), ("long.jsonl", 50e6)):
      tracemalloc.reset_peak()
      survey.survey([tmp_path / name], tmp_path / "out")
      assert tracemalloc.get_traced_memory()[1] < most, name
  finally:
    tracemalloc.stop()


def test_what_is_refused(corpus, tmp_path):
  def fails(match, *arguments, **settings):
    with pytest.raises(errors.InputError, match=match) as caught:
      survey.survey(*arguments, **settings)
    assert "\n" not in str(caught.value)

  out = tmp_path / "out"
  fails("does not exist", [tmp_path / "none.jsonl"], out)
  fails("no text files are named", [], out)
  fails("corpora are '3'", 3, out)
  (corpus / "bad.jsonl").write_text('{"text": "x"}\nbroken\n')
  fails("bad.jsonl:2: not JSON", [corpus / "en.jsonl", corpus / "bad.jsonl"], out)
  fails("bad.jsonl:2: not JSON", [corpus / "en.jsonl"], out, against=[corpus / "bad.jsonl"])
  fails("near_documents", [corpus / "en.jsonl"], out, near_documents=-1)
  assert not out.exists()
  out.mkdir()
  (out / "report.md").write_text("mine")
  fails("is not of glmjax data", [corpus / "en.jsonl"], out)
  (out / "report.json").write_text("{}")
  fails("is not of glmjax data", [corpus / "en.jsonl"], out)
  assert (out / "report.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["languages.png", "lengths.png", "sample_zh_gmask.png"])
def test_pictures_of_others_are_not_overwritten(corpus, tmp_path, name):
  """And those of a report before are, also of one that was killed behind its figures."""
  out = tmp_path / "out"
  out.mkdir()
  (out / name).write_text("mine")
  with pytest.raises(errors.InputError, match=f"{name} is not of glmjax data"):
    survey.survey([corpus / "en.jsonl"], out)
  assert [each.name for each in out.iterdir()] == [name] and (out / name).read_text() == "mine"
  (out / "report.json").write_text('{"report": "text"}')
  survey._check_out(out)


def test_the_command(corpus, capsys, monkeypatch):
  monkeypatch.chdir(corpus)
  assert cli.main(["data", "en.jsonl", "zh.jsonl", "--out=report", "--against=en.jsonl"]) == 0
  shown = capsys.readouterr().out
  assert shown.startswith("36 documents, ") and "repeat one before them: 1 exactly" in shown
  assert "en.jsonl: 29 of 29 items overlap" in shown
  assert cli.main(["data", "--out=again", "--gin_file=runs/quickstart.gin", '--gin.TEXT_FILES={"en": "en.jsonl"}']) == 0
  assert json.loads((corpus / "again" / "report.json").read_text())["corpora"].keys() == {"en"}
  assert cli.main(["data", "--out=again"]) == 2
  assert "corpora" in capsys.readouterr().err
