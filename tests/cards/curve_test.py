"""The curve of a run continued: known answers found within their intervals, decay not taken for progress, refusals."""

import json
import math

import numpy as np
import pytest

from glmjax import errors
from glmjax.cards import curve
from glmjax.cards import groups as groups_lib
from glmjax.cards import law as law_lib
from glmjax.cards import published
from glmjax.cards import steps as steps_lib

E, A, ALPHA, C, LAG = 2.0, 0.6, 0.4, 0.3, 100
WARMUP = 50


def rates(count, schedule):
  """A peak of 1: constant, or a cosine to a tenth."""
  step = np.arange(1, count + 1)
  done = np.clip((step - WARMUP) / max(count - WARMUP, 1), 0, 1)
  decay = 1.0 if schedule == "constant" else 0.55 + 0.45 * np.cos(np.pi * done)
  return decay * np.minimum(1, step / WARMUP)


def area_of_annealing(rate, lag):
  """(1 - lambda) S2 after every step, as Tissue et al. define S2: momentum of the rate's fall, summed up."""
  kept, momentum, area, found = math.exp(-1 / lag), 0.0, 0.0, []
  peak = int(np.argmax(rate >= rate.max()))
  for step in range(len(rate)):
    momentum = kept * momentum + (rate[step - 1] - rate[step] if step > peak else 0)
    area += momentum
    found.append((1 - kept) * area)
  return np.array(found)


def run(count=1500, schedule="constant", noise=0.03, seed=0, fall=A, tokens=None, annealing=C, exponent=ALPHA):
  """Records of a run on the law, and its true loss, slope and gain at the end."""
  rate = rates(count, schedule)
  tokens = np.arange(1, count + 1) * 1000 if tokens is None else tokens
  area = np.cumsum(rate * np.diff(tokens, prepend=0))
  loss = E + fall * (area / area[-1]) ** -exponent - annealing * area_of_annealing(rate, LAG)
  longer = E + fall * 2**-exponent - annealing * area_of_annealing(np.repeat(rate, 2), LAG)[-1]
  truth = {"loss": loss[-1], "slope": math.log(2) * exponent * fall, "gain": loss[-1] - longer}
  loss = loss * (1 + noise * np.random.default_rng(seed).standard_normal(count))
  return [
    {"step": i + 1, "tokens_seen": int(tokens[i]), "loss": float(loss[i]), "learning_rate": 0.001 * float(rate[i])}
    for i in range(count)
  ], truth


def write(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
  return path


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_true_slope_and_gain_lie_in_their_intervals(schedule):
  hits = dict.fromkeys(("loss", "slope", "gain"), 0)
  for seed in range(10):
    records, truth = run(schedule=schedule, seed=seed)
    found = curve.fit(records).found
    for name in hits:
      estimate = getattr(found, name)
      hits[name] += estimate.low <= truth[name] <= estimate.high
      assert abs(estimate.value - truth[name]) < (0.02 if schedule == "constant" else 0.05)
  assert min(hits.values()) >= 8, hits


def test_the_drop_of_a_decaying_rate_is_not_continued():
  records, truth = run(3000, "cosine", noise=0.01, annealing=1.0)
  found = curve.fit(records).found
  last_doubling = np.mean([line["loss"] for line in records[1450:1550]]) - found.loss.value
  assert found.gain.low <= truth["gain"] <= found.gain.high
  assert last_doubling > 2.5 * truth["gain"] and found.gain.high < 0.6 * last_doubling


def test_tokens_count_and_not_steps_where_the_batch_grows():
  tokens = np.cumsum(np.linspace(100, 2000, 3000)).astype(int)
  records, truth = run(3000, tokens=tokens, noise=0.01)
  found = curve.fit(records).found
  assert found.slope.low <= truth["slope"] <= found.slope.high
  assert found.slope.high - found.slope.low < 0.05


def test_the_first_half_foretells_the_end():
  found = curve.fit(run(3000, noise=0.01)[0]).found
  assert found.from_half.low <= found.loss.value <= found.from_half.high
  assert found.from_half.high - found.from_half.low < 0.1


def test_an_asymptote_is_told_only_where_it_is_known():
  known = curve.fit(run(3000, noise=0.01, exponent=1.2, fall=0.2)[0]).found
  assert known.is_asymptote_determined and known.asymptote.low <= E <= known.asymptote.high
  unknown = curve.fit(run(600, noise=0.1)[0])
  assert not unknown.found.is_asymptote_determined
  assert any("not determined" in sentence for sentence in unknown.sentences())


def test_area_of_annealing_is_the_decay_seen_with_a_lag():
  rate = rates(800, "cosine")
  steps = steps_lib.Steps(np.arange(1.0, 801), np.ones(800), rate)
  groups = groups_lib.of(steps)
  lagged_LG = law_lib.lagged_LG(groups.drop_G, 1)
  np.testing.assert_allclose(lagged_LG[1], area_of_annealing(rate, 100), atol=1e-3)  # the peak's end is rounded


def test_a_long_run_in_groups_gives_what_its_steps_give():
  records, truth = run(30_000, "cosine", noise=0.02)
  steps = steps_lib.read(records)
  groups = groups_lib.of(steps)
  assert len(groups.tokens_G) <= 4096 and groups.count_G.sum() == 30_000
  assert groups.noise() == pytest.approx(0.02, rel=0.1)
  found = curve.fit(records).found
  assert found.gain.low <= truth["gain"] <= found.gain.high


def test_the_same_run_gives_the_same_curve():
  records, _ = run(600)
  assert curve.fit(records).to_dict() == curve.fit(records).to_dict()


def without_losses(records):
  return records[:-80] + [record | {"loss": None} for record in records[-80:]]


def rising(records):
  return records[:-300] + [record | {"loss": record["loss"] + 0.5} for record in records[-300:]]


@pytest.mark.parametrize(
  "records, reason",
  [
    (run(150)[0], "too few"),
    (run(WARMUP)[0], "warm-up"),
    (run(1200, fall=0.0)[0], "did not fall"),
    (without_losses(run(1200)[0]), "diverged"),
    (rising(run(1200)[0]), "risen"),
    ([record | {"tokens_seen": 10 if record["step"] < 1000 else 10**6} for record in run(1200)[0]], "do not grow"),
    ([record | {"learning_rate": 0.0} for record in run(1200)[0]], "rate is 0"),
    ([record | {"learning_rate": 1e-9 * record["step"]} for record in run(1200)[0]], "warm-up"),
  ],
)
def test_what_cannot_be_told_is_said(records, reason):
  found = curve.fit(records, parameters=10_000)
  assert found.found is None and reason in found.refusal
  assert any(reason in sentence for sentence in found.sentences()) and "GLM-130B" in found.sentences()[-1]
  json.dumps(found.to_dict(), allow_nan=False)
  with pytest.raises(errors.InputError, match="no curve to draw"):
    curve.drawn(found)


def test_a_constant_rate_says_nothing_of_its_decay():
  assert any("what its decay would bring" in sentence for sentence in curve.fit(run()[0]).sentences())
  assert not any("what its decay would bring" in s for s in curve.fit(run(schedule="cosine")[0]).sentences())


def test_steps_done_again_count_once_and_damaged_lines_not_at_all(tmp_path):
  records, _ = run(600)
  plain = curve.fit(write(tmp_path / "plain.jsonl", records)).to_dict()
  worse = [record | {"loss": 9.0} for record in records[300:400]]
  path = write(tmp_path / "resumed.jsonl", [*records[:300], *worse, *records[300:]])
  assert curve.fit(path).to_dict() == plain
  odd = ["", "null", "[1]", "{", '{"step": 1e400}', "[" * 5000, "\0", '{"step": true, "tokens_seen": 1, "loss": 1}']
  odd += [json.dumps(records[0] | {"tokens_seen": 10**400}), json.dumps(records[0] | {"x": "a" * 10_000_000})]
  with path.open("a", encoding="utf-8") as file:
    file.write("\n".join(odd) + '\n{"step": 601, "tok')
  assert curve.fit(path).to_dict() == plain


def test_a_few_steps_without_a_finite_loss_are_passed_over(tmp_path):
  records, truth = run(1500)
  for index, loss in ((200, None), (700, math.nan), (900, math.inf), (1000, -1.0)):
    records[index]["loss"] = loss
  found = curve.fit(write(tmp_path / "metrics.jsonl", records)).found
  assert found.slope.low <= truth["slope"] <= found.slope.high


def test_what_is_no_metrics_file_is_an_error(tmp_path):
  with pytest.raises(errors.InputError, match="no step with a loss"):
    curve.fit(write(tmp_path / "text.jsonl", [{"text": "a"}]))
  with pytest.raises(errors.InputError, match="does not exist"):
    curve.fit(tmp_path / "missing.jsonl")
  with pytest.raises(errors.InputError, match="no step with a loss"):
    curve.fit([])


def test_the_picture_is_a_png(tmp_path):
  curve.picture(curve.fit(run(600, "cosine")[0]), tmp_path / "curve.png")
  assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_per_parameter_stand_beside_published_ones():
  made = curve.fit(run(600)[0], parameters=20_000)
  assert made.tokens_per_parameter == 30 and made.to_dict()["tokens_per_parameter"] == 30
  assert published.sentence(400_000, 20_000).startswith(
    "It saw 20 tokens for each of its 20,000 parameters; GLM-130B 3.1"
  )
