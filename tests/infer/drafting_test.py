"""Speculative decoding: texts stay as they are, bit for bit, and come in fewer passes where they repeat themselves."""

import os
import pathlib
import subprocess
import sys

import engine_models
import numpy as np
import pytest
from infer import scheduler_test

from glmjax import errors
from glmjax.infer import draft_model
from glmjax.infer import drafting
from glmjax.infer import drafts
from glmjax.infer import engine
from glmjax.infer import lanes
from glmjax.infer import placement
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import runner
from glmjax.infer import sampling
from glmjax.infer import scheduler

LANES = scheduler_test.LANES


def drafts_by_reading(text: list[int], most: int) -> list[int]:
  """What stands behind the last place where the longest of the text's ends has stood before."""
  for size in (3, 2, 1):
    for at in range(len(text) - 1, size - 1, -1):
      if size <= len(text) and text[at - size : at] == text[len(text) - size :]:
        return (text[at:] * most)[:most]
  return []


def test_a_text_drafts_what_came_before():
  r = np.random.default_rng(0)
  drafted = 0
  for _ in range(200):
    text = r.integers(0, r.integers(1, 9), size=r.integers(1, 30)).tolist()
    cut = int(r.integers(0, len(text)))
    reader = drafting.NGrams(text[:cut])
    reader.add(text[cut:])
    assert reader.draft(5) == drafts_by_reading(text, 5)
    drafted += len(reader.draft(5))
  assert drafted > 100
  assert drafting.NGrams([]).draft(5) == []


def test_free_lanes_are_dealt_out_evenly():
  """Each reads for one request, never one that is held; who leaves or comes changes no other's place."""
  r = np.random.default_rng(1)
  dealing, held = drafting.Drafting(drafting.Texts(), 8, 7, drafting.Count()), set()
  with_copies = set()
  for _ in range(500):
    if held and r.random() < 0.4:
      dealing.end(lane := int(r.choice(list(held))))
      held.remove(lane)
      with_copies = {(owner, other) for owner, other in with_copies if owner != lane}
    elif len(held) < 8:
      lane = int(r.choice(list(set(range(8)) - held)))
      prompt = prompt_lib.Prompt(r.integers(0, 3, size=5).tolist(), np.zeros((2, 5), np.int32), 0, (0, 0))
      dealing.begin(lane, lanes.Request(prompt, 9, logprobs=1 if r.random() < 0.2 else None))
      held.add(lane)
      with_copies = {(owner, other) for owner, other in with_copies if other != lane}
    for lane in held:
      dealing.add(lane, r.integers(0, 3, size=2).tolist())
    drafted = dealing.draft(None)
    copied = dealing.deal(drafted)
    made = dealing.drafts(drafted, pad=99)
    assert dealing.reads == bool(made.ahead_B.any())
    reads = {(dealing.owner(lane), lane) for lane in range(8) if dealing.owner(lane) != lane}
    with_copies = (with_copies | set(copied)) & reads
    assert with_copies == reads  # none reads without the cache
    assert all(owner in held and lane not in held for owner, lane in reads)
    counts = [sum(owner == lane for owner, _ in reads) for lane in held]
    assert max(counts, default=0) <= max(1, (8 - len(held)))
    for lane in range(8):
      group = made.lanes_BJ[lane][made.lanes_BJ[lane] < 8].tolist()
      assert made.owner_B[group].tolist() == [made.owner_B[lane]] * len(group)
      assert made.ahead_B[group].tolist() == list(range(len(group))) and lane in group


def finish(rows: scheduler.Scheduler, request: lanes.Request) -> tuple[list[int], int]:
  """Returns the tokens, and after how many passes they were there."""
  answer, passes = rows.submit(request), 0
  rows.advance(fill=True)
  while not answer.ended:
    rows.advance()
    passes += 1
  return answer.tokens, passes


def test_a_text_that_repeats_itself_takes_few_passes():
  request = scheduler_test.make_requests(1, 0)[0]._replace(limit=20, sampling=sampling.Sampling(), logprobs=None)
  ask = scheduler_test.model(LANES - 1)
  rows = ask.scheduler(LANES)
  tokens, passes = finish(rows, request._replace(sampling=sampling.Sampling(logit_bias=((15, 100.0),))))
  assert tokens == [15] * 20 and passes <= 8
  assert 20 - passes - 1 == rows.drafted.right <= rows.drafted.read
  tells, told_passes = finish(ask.scheduler(LANES), request._replace(logprobs=2))
  assert told_passes == len(tells) - 1  # one at a time, as each is told how likely it was


def test_drafts_that_are_hardly_ever_right_are_given_up():
  ask, plain = scheduler_test.model(LANES - 1), scheduler_test.model()
  how = sampling.Sampling(temperature=9.0, min_tokens=20)
  request = scheduler_test.make_requests(1, 0)[0]._replace(limit=20, sampling=how, logprobs=None)
  rows = ask.scheduler(LANES)
  assert finish(rows, request) == finish(plain.scheduler(LANES), request)
  assert 0 < rows.drafted.read < 12 * LANES


def test_programs_with_drafts_are_compiled_once():
  for seed in range(3):
    scheduler_test.run_schedule(seed, LANES - 1)
  before = drafts.verify._cache_size(), drafts.copy._cache_size()
  assert min(before) > 0
  for seed in range(3):
    scheduler_test.run_schedule(seed, LANES - 1)
  assert (drafts.verify._cache_size(), drafts.copy._cache_size()) == before


@pytest.mark.slow
def test_500_schedules_with_drafts():
  for seed in range(1000, 1500):
    scheduler_test.run_schedule(seed, LANES - 1)


def test_up_to_the_end_of_the_model():
  """The cache has room behind the last token, for drafts that come to nothing."""
  ask, plain = scheduler_test.model(LANES - 1), engine_models.make("rotary_2d", max_batch=LANES)
  row = ask.encode("abab")
  how = sampling.Sampling(min_tokens=ask.room(row))
  texts = [list(each.stream(row, ask.room(row), how)) for each in (ask, plain)]
  assert len(texts[0]) == ask.room(row) and texts[0] == texts[1]


def test_an_engine_with_drafts():
  ask, plain = scheduler_test.model(LANES - 1), engine_models.make("rotary_2d")
  prompts = ["abcabcabc", "a[MASK]b[MASK]", "hello"]
  assert ask.generate(prompts, 12) == plain.generate(prompts, 12)
  how = sampling.Sampling(temperature=1.0)
  assert ask.generate(prompts, 12, how, seed=5) == plain.generate(prompts, 12, how, seed=5)
  for drafted in (-1, drafts.MOST + 1):
    with pytest.raises(errors.InputError, match="drafts is"):
      engine.Engine(ask.runner, ask.tokenizer, drafts=drafted)


def test_a_mesh_with_drafts():
  """Rows over two devices read the same."""
  config, params = engine_models.model("rotary_2d")
  on = [
    engine.Engine(
      runner.Runner(config, params, placement.on_mesh("data=2,tensor=2")), engine_models.Letters(), drafts=n
    )
    for n in (0, 3)
  ]
  prompts = ["abcabcabc", "a[MASK]b[MASK]", "hello", "abab"]
  for settings in (sampling.Sampling(), sampling.Sampling(temperature=1.0), sampling.Sampling(repetition_penalty=1.2)):
    assert on[0].generate(prompts, 12, settings, seed=5) == on[1].generate(prompts, 12, settings, seed=5)


@pytest.mark.parametrize("other", ["rotary_2d", "rotary"])
def test_a_draft_model_changes_no_text(other: str):
  """Whether it agrees always or hardly ever; requests join, leave, and take all lanes for a while."""
  own = engine_models.make("rotary_2d", drafts=LANES - 1, draft_model=engine_models.make(other))
  requests, texts = scheduler_test.expected()
  rows, r = own.scheduler(LANES), np.random.default_rng(0)
  answers: list[scheduler.Answer] = []
  while len(answers) < len(requests) or rows.busy:
    if len(answers) < len(requests) and r.random() < 0.3:
      answers.append(rows.submit(requests[len(answers)]))
    rows.advance()
  assert [answer.tokens for answer in answers] == texts


def test_a_model_that_is_its_own_draft_is_always_right():
  ask = engine_models.make("rotary_2d", drafts=LANES - 1, draft_model=engine_models.make("rotary_2d"))
  for request in scheduler_test.make_requests(7, 3):
    tokens, passes = finish(ask.scheduler(LANES), request._replace(limit=20, logprobs=None))
    assert passes <= -(-len(tokens) // LANES) + 1


def test_a_draft_model_reads_what_it_missed_and_drafts_for_none_that_has_no_lane(monkeypatch):
  """While others have more than half of the lanes nobody's draft is read; then what was said meanwhile must be."""
  rows = engine_models.make("rotary_2d", drafts=LANES - 1, draft_model=engine_models.make("rotary")).scheduler(LANES)
  first, *others = [
    each._replace(limit=limit, logprobs=None, sampling=sampling.Sampling(min_tokens=limit))
    for each, limit in zip(scheduler_test.make_requests(LANES, 3), [24] + [4] * (LANES - 1))
  ]
  kinds = "_catch_up", "draft"
  done: dict[str, list] = {kind: [] for kind in kinds}
  for kind in kinds:
    plain = getattr(draft_model.DraftModel, kind)
    monkeypatch.setattr(
      draft_model.DraftModel,
      kind,
      lambda self, *given, plain=plain, kind=kind: (done[kind].append(found := plain(self, *given)), found)[1],
    )
  long = rows.submit(first)
  rows.advance(fill=True)
  rows.advance()
  assert done["draft"][-1] and len(done["_catch_up"]) == 1  # its prompt
  short = [rows.submit(each) for each in others[: LANES // 2]]
  rows.advance(fill=True)
  while not all(each.ended for each in short):
    rows.advance()
    assert not long.ended
  assert not any(done["draft"][-2:]) and len(done["_catch_up"]) == 1 + len(short)
  rows.advance()
  assert done["draft"][-1] and len(done["_catch_up"]) == 2 + len(short)


def test_a_draft_model_that_does_not_fit():
  small, other = (
    engine_models.make("rotary_2d"),
    engine.Engine(runner.Runner(*engine_models.model("rotary_2d", 128)), engine_models.Letters()),
  )

  class OtherLetters(engine_models.Letters):
    """Letters in another order, say."""

  for ask, tokenizer, drafted, words in (
    (small, small.tokenizer, 0, "drafts=0"),
    (other, other.tokenizer, 3, "the draft model's vocab_size is 64 and the model's 128"),
    (small, OtherLetters(), 3, "the draft model's tokenizer is another one"),
  ):
    with pytest.raises(errors.InputError, match=words):
      engine.Engine(ask.runner, tokenizer, drafts=drafted, draft_model=small)


def as_users_do(code: str) -> None:
  """Runs code in a process whose programs are compiled as XLA optimizes for users."""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  environment["PYTHONPATH"] = str(pathlib.Path(engine_models.__file__).parent)
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_programs_that_add_tokens_give_the_same_logits(dtype: str):
  """With drafts and without, with constraints and without: bit for bit, as requests change between them."""
  as_users_do(f"""
import dataclasses
import engine_models, jax, numpy as np
from glmjax.infer import constraints, decode, drafting, drafts, prompt, runner, sampling
from glmjax.models import glm

config, letters, size = engine_models.model("rotary")[0], engine_models.Letters(), 8
config = dataclasses.replace(config, embed_dim=64, num_heads=4, mlp_dim=176, dtype={dtype!r})
model, r = runner.Runner(config, glm.init_params(config, jax.random.key(1))), np.random.default_rng(0)
how = [sampling.Sampling(1.0)] * size
for _ in range(20):
  rows = [[*r.integers(10, 40, int(r.integers(3, 30))).tolist(), letters.specials.gmask] for _ in range(size)]
  prompts = [prompt.fill(row, letters.specials, config.position_kind) for row in rows]
  batch, known = decode.make_rows(prompts, [20] * size, letters.specials.pad, size, 32)
  draws, none = sampling.draws(how, range(size), any_kind=True), np.zeros(config.vocab_size, bool)
  some = [*how[1:], sampling.Sampling(1.0, repetition_penalty=1.3)]
  constrained = None, constraints.make(prompts, some, size, config.vocab_size)
  reads = drafting.Drafting(drafting.Texts(), size, 3, drafting.Count()).drafts({{}}, letters.specials.pad)

  def begun():
    state = model.run(decode.prefill, batch, known, new_tokens=32, all_slots=64)
    return model.run(decode.decode, known, state, draws, none, none, np.int32(3))

  found = [model.run(decode.decode, known, begun(), draws, none, none, np.int32(1), each) for each in constrained]
  found += [model.run(drafts.verify, known, begun(), draws, none, none, reads, each) for each in constrained]
  for each in found[1:]:
    np.testing.assert_array_equal(each.logits_BV, found[0].logits_BV)
""")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_as_xla_optimizes_for_users(dtype: str):
  """Other tests have programs compiled with less effort, which might hide that the two ways are fused otherwise."""
  as_users_do(f"""
import dataclasses, jax
import engine_models
from glmjax.infer import engine, runner, sampling
from glmjax.models import glm

config, _ = engine_models.model("rotary_2d")
config = dataclasses.replace(config, embed_dim=64, num_heads=4, mlp_dim=128, dtype={dtype!r}, init_std=0.3)
model = runner.Runner(config, glm.init_params(config, jax.random.key(1)))
prompts = ["abcabcabcabc", "aaaa", "a[MASK]bab[MASK]", "hello hello"]
for how in (sampling.Sampling(min_tokens=20), sampling.Sampling(0.05, min_tokens=20)):
  plain, drafted = (engine.Engine(model, engine_models.Letters(), drafts=n) for n in (0, 7))
  rows = [each.scheduler(8) for each in (plain, drafted)]
  answers = []
  for each, scheduler in zip((plain, drafted), rows):
    each.scheduler = lambda lanes, scheduler=scheduler: scheduler
    answers.append(each.generate(prompts, 24, how, seed=3))
  assert answers[0] == answers[1] and rows[1].drafted.right > 0
""")
