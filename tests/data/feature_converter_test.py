"""GLM features from seqio tasks, and batches from an uncached mixture."""

import pathlib

import numpy as np
import pytest
import seqio
import tensorflow as tf

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import feature_converter
from glmjax.data import rows
from glmjax.data import sampler
from glmjax.data import text
from glmjax.tasks import pretrain

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
FILES = {"en": str(FIXTURES / "en.txt"), "zh": str(FIXTURES / "zh.jsonl")}
PAIRS = {"small": str(FIXTURES / "instructions.jsonl")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
  documents = [document for files in FILES.values() for document in text.documents(files)]
  trained = tokenizer_lib.train(documents * 3, folder, vocab_size=560)
  pretrain.register(FILES, folder, {"en": 1, "zh": 1, "small": 2}, PAIRS)
  return trained


def infilling(tokenizer, **options):
  return rows.BlankInfilling(
    **{"seq_length": 96, "specials": tokenizer.specials, "packing": "greedy", "samples_per_sequence": 2} | options
  )


def task_rows(name, maker, seed=3):
  converter = feature_converter.GLMFeatureConverter(maker, seed)
  ds = seqio.get_dataset(name, converter.task_feature_lengths, converter, shuffle=False)
  return list(ds.as_numpy_iterator())


def assert_same(first, second):
  assert first.keys() == second.keys()
  for name in first:
    assert first[name].dtype == second[name].dtype
    np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d"])
def test_a_window_is_a_row(tokenizer, positions):
  maker = infilling(tokenizer, positions=positions)
  task = seqio.TaskRegistry.get("pretrain_en")
  windows = list(task.get_dataset({"text": maker.window_length}, shuffle=False).as_numpy_iterator())
  found = task_rows("pretrain_en", maker)
  assert len(found) == len(windows) > 2
  for i, (row, window) in enumerate(zip(found, windows)):
    assert_same(row, maker.text_row(window["text"], 3, i))


@pytest.mark.parametrize("packing", ["greedy", "fixed"])
def test_pairs_are_packed_and_none_is_lost(tokenizer, packing):
  maker = infilling(tokenizer, packing=packing)
  found = task_rows("instruct_small", maker)
  task = seqio.TaskRegistry.get("instruct_small")
  pairs = [(e["inputs"], e["targets"]) for e in task.get_dataset(shuffle=False).as_numpy_iterator()]
  assert 1 < len(found) < len(pairs)
  assert sum(int((row["tokens"] == tokenizer.specials.sop).sum()) for row in found) == len(pairs)
  assert sum(int(row["loss_weights"].sum()) for row in found) == sum(len(targets) + 1 for _, targets in pairs)
  in_first = int((found[0]["tokens"] == tokenizer.specials.sop).sum())
  assert_same(found[0], maker.instruction_row(pairs[:in_first]))


def test_zeros_survive(tokenizer):
  """seqio's packer would drop position 0, weight 0 and start 0, and shift what follows."""
  row = task_rows("pretrain_zh", infilling(tokenizer, gmask_rate=1.0))[0]
  assert row["positions"].tolist() == list(range(int(row["attend_end"].max()))) + [0] * int(
    96 - row["attend_end"].max()
  )
  assert 0 in row["loss_weights"] and 1 in row["loss_weights"]


def test_seqio_mixes_text_and_pairs(tokenizer):
  maker = infilling(tokenizer)
  converter = feature_converter.GLMFeatureConverter(maker)
  ds = seqio.get_dataset(
    "pretrain_bilingual", converter.task_feature_lengths, converter, num_epochs=None, seed=5, batch_size=4
  )
  batches = list(ds.take(8).as_numpy_iterator())
  assert {name: a.shape for name, a in batches[0].items()} == dict.fromkeys(maker_features(), (4, 96))
  assert {int(o) for b in batches for o in b["objective"][:, 0]} >= {0, 1, 2}


def maker_features():
  return ("tokens", "targets", "loss_weights", "positions", "attend_start", "attend_end", "objective")


def source(tokenizer, **options):
  options = {"shuffle_buffer_size": 8} | options
  return feature_converter.SeqioMixture("pretrain_bilingual", infilling(tokenizer), **options)


def test_uncached_batches_do_not_depend_on_plan_or_hosts(tokenizer):
  whole = list(source(tokenizer).batches(iter([(0, 4), (4, 4), (8, 4)])))
  resumed = list(source(tokenizer).batches(iter([(8, 4), (4, 4)])))
  assert_same(whole[2], resumed[0])
  assert_same(whole[1], resumed[1])
  second_host = source(tokenizer).batches(iter([(0, 4), (4, 4), (8, 4)]), 1, 2)
  for batch, half in zip(whole, second_host, strict=True):
    assert_same({name: array[2:] for name, array in batch.items()}, half)
  objectives = np.concatenate([batch["objective"][:, 0] for batch in whole])
  assert (objectives == 2).sum() == 6  # rate 2 of 4
  with pytest.raises(errors.InputError, match="4 rows does not divide over 3 hosts"):
    next(source(tokenizer).batches(iter([(0, 4)]), 0, 3))


def test_rates_change_by_samples(tokenizer):
  """From 6 on no pairs; between 2 and 6 along a line. Tasks stay where they are in their own order."""
  ends = sampler.RateChange(2, {"pretrain_*": 1.0}, ramp_samples=4)
  steady, changed = source(tokenizer), source(tokenizer, rate_changes=(ends,))
  plan = [(first, 4) for first in range(0, 16, 4)]
  batches = list(changed.batches(iter(plan)))
  is_pair = np.concatenate([batch["objective"][:, 0] == 2 for batch in batches])
  assert is_pair[:6].any() and not is_pair[6:].any()
  first = next(steady.batches(iter(plan)))
  assert_same(
    {name: array[:2] for name, array in first.items()}, {name: array[:2] for name, array in batches[0].items()}
  )
  assert_same(next(source(tokenizer, rate_changes=(ends,)).batches(iter(plan[2:]))), batches[2])
  assert changed.describe() == steady.describe() | {
    "changes": [{"first_sample": 2, "ramp_samples": 4, "weights": {"pretrain_en": 1, "pretrain_zh": 1}}]
  }
  with pytest.raises(errors.InputError, match="'pretrain_fr', which the mixture pretrain_bilingual does not hold"):
    source(tokenizer, rate_changes=[sampler.RateChange(9, {"pretrain_fr": 1.0})]).describe()


def test_describe(tokenizer):
  described = source(tokenizer).describe()
  assert described["tokenizer"] == tokenizer.fingerprint and described["infilling"]["seq_length"] == 96
  assert described["weights"] == {"pretrain_en": 1, "pretrain_zh": 1, "instruct_small": 2}
  assert described == source(tokenizer).describe() != source(tokenizer, seed=1).describe()
  made = feature_converter.SeqioMixture("pretrain_en", lambda specials: rows.BlankInfilling(64, specials))
  assert made.seq_length == 64 and made.describe()["weights"] == {"pretrain_en": 1}


def test_mistakes_come_out_in_one_line(tokenizer, tmp_path):
  with pytest.raises(errors.InputError, match="no seqio mixture or task 'pretrain_bi' is registered; "):
    feature_converter.SeqioMixture("pretrain_bi", infilling(tokenizer)).describe()
  folder = tmp_path / "tokenizer"
  tokenizer.save(folder)
  (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' * 50 + '{"text": \n')
  pretrain.register({"bad": str(tmp_path / "bad.jsonl")}, folder, mixture="bad")
  bad = feature_converter.SeqioMixture("bad", infilling(tokenizer))
  with pytest.raises(errors.InputError, match="bad.jsonl:51: not JSON") as caught:
    next(bad.batches(iter([(0, 2)])))
  assert "\n" not in str(caught.value)
  (tmp_path / "one.txt").write_text("x")  # a letter cannot be cut in two
  pretrain.register({"one": str(tmp_path / "one.txt")}, folder, mixture="one")
  empty = feature_converter.SeqioMixture("one", infilling(tokenizer), split="validation")
  with pytest.raises(errors.InputError, match="task pretrain_one has too little text in the split 'validation'"):
    next(empty.batches(iter([(0, 2)])))
  with pytest.raises(errors.InputError, match="task pretrain_one has too little text"):
    empty.check()
  assert feature_converter.input_error(tf.errors.UnknownError(None, None, "other")) is None
