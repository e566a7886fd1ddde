"""The tokenizer against its layout, its inverse, and the original's own procedure."""

import io
import json
import os
import pickle
import random
import re
import tracemalloc

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax import tokens
from glmjax.tokenizer import encoding
from glmjax.tokenizer import training

TEXTS = [
  "The quick brown fox jumps over the lazy dog, 12 times in 1998.\n\nThen it sleeps.",
  "春天来了，小河边的柳树发芽了。孩子们在田野里放风筝，１２只风筝飞得很高！",
  "sop eop ENC eod [MASK] [gMASK] are words too.\tA tab, and    four blanks.",
  "今天我们去图书馆读书。图书馆里有很多书，也有很多读书的人。",
]
HARD = [
  "",
  " ",
  "\n",
  "\t",
  "\x00",
  "\r\n",
  " leading",
  "trailing ",
  "\n x",
  "a\u2581b",
  "\u2581",
  "\u2581 a",
  " \u2581",
  "[MASK]",
  "[gMASK] and [sMASK]",
  "<n>",
  "<|blank_2|>",
  "<|tab|>",
  "</s>",
  "<unk><pad><s>",
  "<0x41>",
  "<sop>",
  "\U0010ff00",
  "\U0010ff01\U0010ff80",
  "\ufffe\uffff\ufdd0",
  "👩‍👩‍👧‍👦 é é ｆｕｌｌ",
  "\u200b\ufeff\u3000x\u00a0y",
  "1\t\t2",
  "\n\n\n",
  "a  b   c",
]


def train_model(texts, **options) -> bytes:
  """A SentencePiece model with icetk's first pieces."""
  writer = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_writer=writer,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=3,
    user_defined_symbols=["<n>"],
    minloglevel=2,
    character_coverage=1.0,
    **options,
  )
  return writer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("trained") / "tokenizer"
  tokenizer_lib.train(TEXTS * 5, path, vocab_size=500)
  return path


@pytest.fixture(scope="module")
def tokenizer(folder):
  return tokenizer_lib.Tokenizer.load(folder)


@pytest.fixture(scope="module")
def ice_model():
  """Like ice_text.model: unigram, folding, a space before every text, no byte pieces."""
  return train_model(
    TEXTS * 5, model_type="unigram", vocab_size=150, hard_vocab_limit=False, normalization_rule_name="nmt_nfkc"
  )


def random_text(rng: random.Random) -> str:
  def character() -> str:
    kind = rng.randrange(9)
    if kind == 0:
      return " " * rng.randint(1, 200)
    if kind == 1:
      return rng.choice(HARD)
    if kind == 2:
      return chr(rng.randrange(0x20))
    if kind == 3:
      return chr(rng.randrange(0x4E00, 0x9FFF))
    if kind == 4:
      return rng.choice("\u2581\n\t ▅\U0010ff00")
    if kind == 5:
      code = rng.randrange(0x110000 - 0x800)
      return chr(code if code < 0xD800 else code + 0x800)
    return rng.choice(TEXTS)[rng.randrange(20) :][: rng.randint(1, 12)]

  return "".join(character() for _ in range(rng.randint(0, 30)))


def test_layout(tokenizer):
  assert tokenizer.vocab_size == 500
  text = 500 - 8 - 1 - 79
  assert tokenizer.specials == tokens.icetk(0, text)
  assert tokenizer.encode("\n") == [4]
  assert tokenizer.encode("\t") == [text + 8]
  assert [tokenizer.encode(" " * k) for k in (2, 3, 80)] == [[text + 9], [text + 10], [text + 87]]
  assert tokenizer.encode(" " * 165) == [text + 87] * 2 + [text + 12]  # the longest first


def test_bytes_come_last_where_the_model_has_none(ice_model):
  ours = tokenizer_lib.Tokenizer(ice_model, 20_000)
  count = len(sentencepiece_model_pb2.ModelProto.FromString(ice_model).pieces)
  assert ours.specials == tokens.icetk(20_000, count)
  assert ours.vocab_size == 20_000 + count + 8 + 1 + 79 + 256
  first_byte = ours.vocab_size - 256
  assert ours.encode("ß", dummy_prefix=False) == [first_byte + b for b in "ß".encode()]
  assert ours.decode([first_byte + b for b in "é".encode()]) == "é"


def test_every_text_comes_back(tokenizer):
  rng = random.Random(1)
  texts = HARD + TEXTS + [" " * k for k in range(1, 201)] + [random_text(rng) for _ in range(500)]
  specials = {*range(4), *range(tokenizer.specials.mask, tokenizer.specials.dblock + 1)}
  for text, ids in zip(texts, tokenizer.encode_arrays(texts)):
    ids = ids.tolist()
    assert tokenizer.decode(ids) == text
    assert not specials & set(ids)
    assert ids == tokenizer.encode(text)
    cut = rng.randint(0, len(ids))
    assert tokenizer.decode_bytes(ids[:cut]) + tokenizer.decode_bytes(ids[cut:]) == text.encode()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_models_that_put_a_space_first_are_lossless_too(model_type):
  ours = tokenizer_lib.Tokenizer(
    train_model(
      TEXTS * 5,
      model_type=model_type,
      vocab_size=420,
      hard_vocab_limit=False,
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
    )
  )
  rng = random.Random(2)
  for text in HARD + TEXTS + [random_text(rng) for _ in range(300)]:
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode(ours.encode(text, dummy_prefix=False), dummy_prefix=False) == text
  text = "one [MASK] two[gMASK]three"
  assert ours.decode(ours.encode(text, allow_special=True), show_special=True) == text


def test_specials_only_when_allowed(tokenizer):
  text = "It is [MASK], [gMASK]<sop>"
  specials = tokenizer.specials
  ids = tokenizer.encode(text, allow_special=True)
  found = [i for i in ids if specials.mask <= i <= specials.dblock]
  assert found == [specials.mask, specials.gmask, specials.sop]
  assert tokenizer.decode(ids, show_special=True) == text
  assert tokenizer.decode(ids) == "It is , "
  assert tokenizer.decode([specials.eos, 10**6, -1]) == ""


def original_ids(model: bytes, text: str) -> list[int]:
  """The procedure of the original tokenizer: named symbols in the model and in the text."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  piece = sentencepiece_model_pb2.ModelProto.SentencePiece
  names = [f"<|blank_{k}|>" for k in range(2, 81)]
  for special in tokens.ICETK_SPECIALS:
    proto.pieces.append(piece(piece=f"<<{special}>>", score=0.0, type=3))
  for name in ["<|tab|>"] + names:
    proto.pieces.append(piece(piece=name, score=0.0, type=4))
  proto.trainer_spec.byte_fallback = True
  for i in range(256):
    proto.pieces.append(piece(piece=f"<0x{i:02X}>", score=0.0, type=6))
  processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
  text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
  for k in range(80, 1, -1):
    text = text.replace(" " * k, names[k - 2])
  return [i + 20_000 for i in processor.encode(text)]


def test_ids_are_the_originals(ice_model):
  ours = tokenizer_lib.Tokenizer(ice_model, 20_000)
  spaced = ["  two", " one", "x \n y", "\n\n", "1\t 2 ", " " * 99, "a" + " " * 81 + "b"]
  for text in TEXTS + ["你好！Hello!"] + spaced:
    assert ours.encode(text) == original_ids(ice_model, text)
    assert ours.encode(text, dummy_prefix=False) == original_ids(ice_model, "\n" + text)[2:]
  assert ours.encode("！") == ours.encode("!")  # the original folds; so do we


def bake(proto: sentencepiece_model_pb2.ModelProto) -> None:
  """Adds what ice_text.model has had behind its text pieces since April 2023."""
  piece = sentencepiece_model_pb2.ModelProto.SentencePiece
  names = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>", "<|tab|>"]
  for name in names + [f"<|blank_{k}|>" for k in range(2, 81)]:
    proto.pieces.append(piece(piece=name, score=0.0, type=4))
  for i in range(256):
    proto.pieces.append(piece(piece=f"<0x{i:02X}>", score=0.0, type=6))
  proto.trainer_spec.byte_fallback = True


def test_a_model_that_already_holds_the_specials(ice_model):
  proto = sentencepiece_model_pb2.ModelProto.FromString(ice_model)
  bake(proto)
  baked = tokenizer_lib.Tokenizer(proto.SerializeToString())
  plain = tokenizer_lib.Tokenizer(ice_model)
  assert baked.specials == plain.specials and baked.vocab_size == plain.vocab_size
  for text in TEXTS + ["[MASK] <sop>", "a  b\t"]:
    assert baked.encode(text) == plain.encode(text)


ICE = os.environ.get("GLMJAX_ICE_TEXT_MODEL")
GENERATIONS = pytest.mark.parametrize("images, total", [(20_000, 150_344), (0, 130_344)])


def check_layout(ours: tokenizer_lib.Tokenizer, images: int, total: int) -> None:
  """Every id that GLM-130B (150528 rows) and ChatGLM-6B since April 2023 (130528) have in common but for 20000."""
  specials = ours.specials
  assert (specials.unk, specials.eos, specials.pad) == (images, images + 2, images + 3)
  assert [
    specials.mask,
    specials.gmask,
    specials.smask,
    specials.eod,
    specials.sop,
    specials.eop,
    specials.enc,
    specials.dblock,
  ] == list(range(images + 130_000, images + 130_008))
  assert ours.encode("\n", dummy_prefix=False) == [images + 4]
  assert ours.encode("\t", dummy_prefix=False) == [images + 130_008]
  for blanks in (2, 3, 79, 80):
    assert ours.encode(" " * blanks, dummy_prefix=False) == [images + 130_007 + blanks]
  assert ours.decode([images + 130_088 + byte for byte in "é".encode()]) == "é"
  for text in TEXTS:
    assert ours.encode(ours.decode(ours.encode(text))) == ours.encode(text)
  assert ours.vocab_size == total
  ours.check_fits({150_344: 150_528, 130_344: 130_528}[total])
  ours.check_fits(total)
  with pytest.raises(errors.InputError, match="of another date"):
    ours.check_fits({150_344: 130_528, 130_344: 150_528}[total])


@GENERATIONS
@pytest.mark.skipif(not ICE, reason="GLMJAX_ICE_TEXT_MODEL does not name the user's own ice_text.model")
def test_the_users_ice_text_model(images, total):
  """Against the vectors that icetk and GLM-130B publish."""
  ours = tokenizer_lib.Tokenizer.load(ICE, images)
  check_layout(ours, images, total)

  def shifted(ids):
    return [i - 20_000 + images for i in ids]

  assert ours.encode("Hello World! I am icetk.") == shifted([39316, 20932, 20035, 20115, 20344, 22881, 35955, 20007])
  assert ours.encode("你好世界！这里是 icetk。") == shifted([20005, 94874, 84097, 20035, 94947, 22881, 35955, 83823])
  pieces = {20005: " ", 20006: ",", 20007: ".", 20012: ":"}
  assert ours.decode(shifted(pieces), dummy_prefix=False) == "".join(pieces.values())


@pytest.fixture(scope="module")
def full_size(ice_model) -> sentencepiece_model_pb2.ModelProto:
  """As many text pieces as ice_text.model has, most of which occur nowhere."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(ice_model)
  for i in range(130_000 - len(proto.pieces)):
    proto.pieces.add(piece=f"\ue000{i}", score=-30.0)
  return proto


@GENERATIONS
@pytest.mark.parametrize("baked", [False, True], ids=["before April 2023", "since"])
def test_layout_of_both_generations(full_size, images, total, baked):
  proto = sentencepiece_model_pb2.ModelProto.FromString(full_size.SerializeToString())
  check = original_ids(proto.SerializeToString(), TEXTS[2])
  if baked:
    bake(proto)
  ours = tokenizer_lib.Tokenizer(proto.SerializeToString(), images)
  check_layout(ours, images, total)
  assert ours.encode(TEXTS[2]) == [i - 20_000 + images for i in check]


def test_long_text_is_cut_where_it_does_not_matter(tokenizer, ice_model, monkeypatch):
  text = "\n".join(TEXTS) * 3 + "\n\n  x"
  rng = random.Random(3)
  without_newlines = [re.sub(r"\s+", " ", random_text(rng)) + TEXTS[0][:60] * 2 for _ in range(100)] + [TEXTS[1] * 9]
  for ours, texts in ((tokenizer, [text, *without_newlines]), (tokenizer_lib.Tokenizer(ice_model), [text])):
    whole = ours.encode_arrays(texts)
    for chunk, longest, together in ((40, 400, 50), (7, 200, 1), (1, 200, 10_000)):
      monkeypatch.setattr(encoding, "_CHUNK", chunk)
      monkeypatch.setattr(encoding, "_LONGEST_CHUNK", longest)
      monkeypatch.setattr(encoding, "_TOGETHER", together)
      for ids, expected in zip(ours.encode_arrays(texts), whole, strict=True):
        assert ids.tolist() == expected.tolist()
    monkeypatch.undo()


def test_no_chunk_is_longer_than_the_limit(tokenizer, monkeypatch):
  monkeypatch.setattr(encoding, "_CHUNK", 4)
  monkeypatch.setattr(encoding, "_LONGEST_CHUNK", 16)
  given = []
  encode = tokenizer._encode_marked
  monkeypatch.setattr(tokenizer, "_encode_marked", lambda marked: given.extend(marked) or encode(marked))
  for text in ("a" * 100, TEXTS[1] * 5, "fox " * 50, "x" * 40 + "\n" * 30):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert max(map(len, given)) <= 16


def test_training_repeats_and_saves_whole(tmp_path, folder, tokenizer):
  again = tokenizer_lib.train(iter(TEXTS * 5), tmp_path / "again", vocab_size=500)
  assert again == tokenizer and again.fingerprint == tokenizer.fingerprint
  assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["tokenizer.json", "tokenizer.model"]
  assert [p.name for p in tmp_path.iterdir()] == ["again"]
  tokenizer_lib.train(TEXTS * 5, folder, vocab_size=500)  # the same: nothing to do
  again.save(tmp_path / "new" / "copy")
  assert tokenizer_lib.Tokenizer.load(tmp_path / "new" / "copy") == tokenizer
  other = tokenizer_lib.train(TEXTS * 5, tmp_path / "other", vocab_size=490)
  assert other != tokenizer
  with pytest.raises(errors.InputError, match="another tokenizer"):
    other.save(tmp_path / "again")
  assert tokenizer_lib.Tokenizer.load(tmp_path / "again") == tokenizer


def test_pickle_and_image_ids(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy == tokenizer and copy.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
  shifted = tokenizer_lib.Tokenizer(tokenizer.model, 20_000)
  assert shifted != tokenizer and shifted.encode("a b") == [i + 20_000 for i in tokenizer.encode("a b")]
  assert shifted.decode(shifted.encode("a b") + [5]) == "a b"


def test_mistakes(tmp_path, folder, tokenizer):
  def fails(match, call, *arguments, **options):
    with pytest.raises(errors.InputError, match=match) as caught:
      call(*arguments, **options)
    assert "\n" not in str(caught.value)

  load = tokenizer_lib.Tokenizer.load
  fails("cannot read .*nowhere", load, tmp_path / "nowhere")
  (tmp_path / "text.model").write_text("not a model")
  fails("text.model is not a SentencePiece model", load, tmp_path / "text.model")
  (tmp_path / "empty.model").write_bytes(b"")
  fails("piece 0 is 'nothing'", load, tmp_path / "empty.model")
  (tmp_path / "half").mkdir()
  (tmp_path / "half" / "tokenizer.model").write_bytes(tokenizer.model)
  fails("tokenizer.json: no such file", load, tmp_path / "half")
  (tmp_path / "half" / "tokenizer.json").write_text("{")
  fails("tokenizer.json: not JSON .*make the tokenizer folder again", load, tmp_path / "half")
  (tmp_path / "half" / "tokenizer.json").write_text("{}")
  fails("not a tokenizer layout", load, tmp_path / "half")
  layout = json.loads((folder / "tokenizer.json").read_text())
  (tmp_path / "half" / "tokenizer.json").write_text(json.dumps(layout | {"model_sha256": "0"}))
  fails("does not match the hash", load, tmp_path / "half")
  fails("0 image ids, not 20000", load, folder, num_image_tokens=20_000)
  for vocab_size in (-5, 0, 2**31, 10**30, 500.0, True, "500"):
    fails("tokenizer.train.vocab_size is", tokenizer_lib.train, TEXTS, tmp_path / "none", vocab_size)
  fails("num_threads is 0", tokenizer_lib.train, TEXTS, tmp_path / "none", 500, num_threads=0)
  fails("character_coverage is 0.9", tokenizer_lib.train, TEXTS, tmp_path / "none", 500, character_coverage=0.9)
  fails("holds a tokenizer of 500 ids, not 490", tokenizer_lib.train, TEXTS, folder, 490)
  fails("holds another tokenizer", tokenizer_lib.train, TEXTS[:3] * 5, folder, 500)
  fails("holds other things .* and is not a tokenizer", tokenizer_lib.train, TEXTS, tmp_path, 500)
  fails("model_type is 'word'", tokenizer_lib.train, TEXTS, tmp_path / "word", 500, "word")
  fails("not valid Unicode", tokenizer.encode, "half \ud800")
  assert not any((tmp_path / name).exists() for name in ("big", "small", "none", "word"))


CORPORA = {
  "fox": ["The quick brown fox jumps over the lazy dog."] * 9,
  "zh": ["小城的河边"] * 3,
  "one": ["x"],
  "many characters": ["".join(map(chr, range(0x4E00, 0x4E00 + 2000)))],
  "blanks": [" \n\t"],
  "mix": ["abc abd abe xyz " * 20, "hello world " * 30],
}


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("name", CORPORA)
def test_who_follows_the_advice_succeeds(tmp_path, name, model_type):
  for wrong in (1, 88, 93, 291, 100_000):
    with pytest.raises(errors.InputError, match=f"^no tokenizer of {wrong} ids can be trained") as caught:
      tokenizer_lib.train(CORPORA[name], tmp_path / "wrong", wrong, model_type)
    (advised,) = re.findall(r"set vocab_size to (\d+)(?:,| or more)", str(caught.value))
    assert "\n" not in str(caught.value) and "option" not in str(caught.value)
    folder = tmp_path / f"{wrong}"
    assert tokenizer_lib.train(CORPORA[name], folder, int(advised), model_type).vocab_size == int(advised)
  assert not (tmp_path / "wrong").exists()


def test_lower_coverage_as_advised(tmp_path):
  texts = ["a b c " * 500 + "".join(map(chr, range(0x4E00, 0x4E00 + 20)))]
  with pytest.raises(errors.InputError, match="tokenizer.train.character_coverage below 1"):
    tokenizer_lib.train(texts, tmp_path / "t", 355, character_coverage=1.0)
  assert tokenizer_lib.train(texts, tmp_path / "t", 355, character_coverage=0.98).vocab_size == 355


@pytest.mark.parametrize("documents", [[], [""], ["", ""]])
@pytest.mark.parametrize("vocab_size", [50, 500])
def test_empty_text_is_called_empty(tmp_path, documents, vocab_size):
  with pytest.raises(errors.InputError, match="there is no text: give some"):
    tokenizer_lib.train(documents, tmp_path / "t", vocab_size)
  assert not (tmp_path / "t").exists()


def lines(count):
  """Documents of a thousand lines, and the last one long and without line ends."""
  for i in range(0, count, 1000):
    yield "\n".join(f"line {k} of a long text" for k in range(i, min(i + 1000, count)))
  yield "w " * 200_000


def test_a_large_text_is_sampled_evenly_within_the_budget():
  every = list(training._sample(lines(5_000), 1 << 30))
  assert [line.decode() for line in every[:5_000]] == [f"line {k} of a long text" for k in range(5_000)]
  assert max(map(len, every)) <= training._LONGEST
  budget = 300_000
  tracemalloc.start()
  sampled = list(training._sample(lines(100_000), budget))
  assert tracemalloc.get_traced_memory()[1] < 8 * budget
  tracemalloc.stop()
  assert budget / 4 < sum(len(line) + training._OVERHEAD for line in sampled) <= budget
  numbers = [int(line.split()[1]) for line in sampled if line.startswith(b"line")]
  assert numbers == sorted(numbers)
  assert all(len(numbers) / 8 < sum(k // 20_000 == fifth for k in numbers) < len(numbers) / 3 for fifth in range(5))
  assert sampled == list(training._sample(lines(100_000), budget))


def test_training_gives_sentencepiece_no_more_than_the_budget(tmp_path, monkeypatch):
  given = []
  train = sentencepiece.SentencePieceTrainer.train

  def counting(sentence_iterator, **options):
    given.extend(sentence_iterator)
    return train(sentence_iterator=iter(given), **options)

  monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", counting)
  made = tokenizer_lib.train((text for _ in range(20_000) for text in TEXTS), tmp_path / "t", 440, sample_bytes=1 << 20)
  assert 1 << 17 < sum(map(len, given)) < 1 << 20 and made.decode(made.encode(TEXTS[0])) == TEXTS[0]


def test_a_mistake_in_the_text_is_told_as_it_is(tmp_path):
  def documents():
    yield "fine"
    raise errors.InputError("en.jsonl:2: not JSON")

  with pytest.raises(errors.InputError, match="^en.jsonl:2: not JSON$"):
    tokenizer_lib.train(documents(), tmp_path / "t", 400)


def test_sentence_ends_of_a_tokenizer(tmp_path):
  folder = tmp_path / "tokenizer"
  tokenizer_lib.train(["Is it? Yes; it is. " * 20, "这是什么？这是一本书。" * 20], folder, 390)
  loaded = tokenizer_lib.Tokenizer.load(folder)
  ends = set(tokenizer_lib.sentence_ends(folder))
  assert {loaded.encode(text)[-1] for text in ("Yes.", "it?", "书。", "么？", "a\n")} <= ends
  assert ends.isdisjoint(loaded.encode("Yes it is")) and ends.isdisjoint(loaded.encode("这是一本书"))
