"""Several adapters beside one model: each row has its own, and is bit for bit what it is without the others."""

import dataclasses
import functools
import pathlib

import engine_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained_adapters

from glmjax import errors
from glmjax.checkpoint import export
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager
from glmjax.infer import adapters as adapters_lib
from glmjax.infer import beam
from glmjax.infer import decode
from glmjax.infer import engine
from glmjax.infer import lanes
from glmjax.infer import placement as placement_lib
from glmjax.infer import prefill
from glmjax.infer import runner as runner_lib
from glmjax.infer import sampling
from glmjax.infer import scheduler

LANES = 4
NAMES = (None, *untrained_adapters.LORA)
PROMPTS = ("abcdef", "the end is [MASK] or", "gh", "abcdef")
HOT = sampling.Sampling(temperature=1.2)


class Letters(engine_models.Letters):
  def decode_bytes(self, ids, show_special=False, dummy_prefix=True):
    return self.decode(ids).encode()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
  """A model as float, INT8 and INT4, and adapters beside the first."""
  root = tmp_path_factory.mktemp("several")
  config, params = engine_models.model("rotary_2d")
  run = root / "float"
  run.mkdir()
  folder_lib.write_config(run, folder_lib.FolderConfig(config))
  saver = manager.Manager(run / "checkpoints")
  saver.save(1, {"params": params, "step": jnp.int32(1)}, {"samples_seen": 1})
  saver.close()
  for bits in (8, 4):
    export.export(run, root / f"int{bits}", bits=bits)
  return {name: root / name for name in ("float", "int8", "int4")} | untrained_adapters.write(run, root / "adapters")


def load(base: pathlib.Path, adapter: adapters_lib.Adapters, mesh: str | None = None, **options) -> engine.Engine:
  placement = placement_lib.on_mesh(mesh)
  dtype = options.pop("dtype", None)
  loaded = runner_lib.read(base, placement, placement_lib.Precision(dtype), adapter=adapter)
  names = adapters_lib.names(adapter)
  runner = runner_lib.Runner(loaded.config, loaded.params, placement, given_away=True, adapters=names)
  return engine.Engine(runner, Letters(), **options)


@pytest.fixture(scope="module")
def make(folders):
  """Loads a base with all adapters by name, one of them always on, or none; each once."""

  @functools.cache
  def found(base: str = "float", which: str | None = "all", mesh: str | None = None, drafts: int = 0) -> engine.Engine:
    named = {name: folders[name] for name in untrained_adapters.LORA}
    adapter = named if which == "all" else None if which is None else named[which]
    dtype = {"bfloat16": "bfloat16"}.get(base)
    return load(folders.get(base, folders["float"]), adapter, mesh, dtype=dtype, drafts=drafts)

  return found


BASES = [("float", None), ("int8", None), ("int4", "data=2,tensor=2")]
MORE = [("bfloat16", None), ("int4", None), ("float", "data=2,tensor=2"), ("int8", "tensor=2")]
MORE = [pytest.param(*each, marks=pytest.mark.slow) for each in MORE]
MORE += [pytest.param("float", "fsdp=2", marks=[pytest.mark.slow, pytest.mark.emitters])]


@pytest.mark.parametrize("base, mesh", BASES + MORE)
def test_each_is_what_it_is_alone(make, base, mesh):
  """Without an adapter to the bit; with one to rounding, as programs differ: factors are padded, and scaled before."""
  several, alone = make(base, mesh=mesh), make(base, None, mesh)
  assert several.score(PROMPTS[:1])[0].log_probs.tolist() == alone.score(PROMPTS[:1])[0].log_probs.tolist()
  assert several.generate(PROMPTS, 8, HOT, seed=3) == alone.generate(PROMPTS, 8, HOT, seed=3)
  name = "mlp" if base == "float" else "wide"
  bare = make(base, name, mesh)
  for ask in (lambda model, **named: model.score(PROMPTS[:1], **named), _choices):
    ours, theirs, without = (np.concatenate([each.log_probs for each in scores]) for scores in (
      ask(several, adapter=name), ask(bare), ask(alone)
    ))  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=0.15 if base == "bfloat16" else 2e-3)
    assert np.abs(ours - without).max() > 0.1, "the adapter changes nothing"


def _choices(model: engine.Engine, **named) -> list:
  """Scores choices, whose context is read once."""
  [found] = model.score_choices(["a long context of letters [MASK]"], [["abc", "de"]], **named)
  return found.scores


@pytest.mark.parametrize("name", ["narrow", *(pytest.param(each, marks=pytest.mark.slow) for each in ("wide", "mlp"))])
def test_generates_what_the_bare_one_does(make, name):
  several, bare = make(), make(which=name)
  for how in (sampling.Sampling(), HOT, beam.BeamSearch(3)):
    assert several.generate(PROMPTS, 8, how, adapter=name) == bare.generate(PROMPTS, 8, how)
  row = several.encode(PROMPTS[0])
  assert list(several.stream(row, 8, HOT, 1, name)) == list(bare.stream(row, 8, HOT, 1))


def test_one_for_each_prompt(make):
  several = make()
  mixed = several.generate(PROMPTS, 8, HOT, adapter=NAMES)
  for i, name in enumerate(NAMES):
    assert several.generate(PROMPTS, 8, HOT, adapter=name)[i] == mixed[i]
  assert mixed[0] != several.generate(PROMPTS[:1], 8, HOT, adapter="wide")[0]
  beams = several.generate(PROMPTS, 6, beam.BeamSearch(2), adapter=NAMES)
  assert [several.generate(PROMPTS, 6, beam.BeamSearch(2), adapter=name)[i] for i, name in enumerate(NAMES)] == beams


def requests_of(model: engine.Engine, count: int) -> list[lanes.Request]:
  """Prompts of all lengths, half of them of two texts, each with some adapter."""
  r = np.random.default_rng(0)
  found = []
  for i in range(count):
    letters = "".join(r.choice(list("abcdefgh "), size=r.integers(1, 30)))
    row = model.encode(["abc", "abcd[MASK]e"][i % 2] if i % 4 < 2 else letters)
    blank = model.filling(row, int(r.integers(1, 16)), NAMES[int(r.integers(len(NAMES)))]).blank()
    found.append(lanes.Request(*blank, [HOT, sampling.Sampling()][i % 2], i, None if r.random() < 0.7 else 2))
  return found


def finish(model: engine.Engine, requests: list[lanes.Request], rows: scheduler.Scheduler | None = None) -> list:
  rows = rows or model.scheduler(LANES)
  answers = [rows.submit(request) for request in requests]
  while rows.busy:
    rows.advance(16)
  return [answer.tokens for answer in answers]


@pytest.mark.parametrize(
  "base, mesh, drafts",
  [
    ("float", None, 0),
    ("float", None, LANES - 1),
    pytest.param("int4", None, 0, marks=pytest.mark.slow),
    pytest.param("int4", "data=2,tensor=2", LANES - 1, marks=pytest.mark.slow),
    pytest.param("bfloat16", None, 0, marks=pytest.mark.slow),
    pytest.param("float", "tensor=2", 0, marks=pytest.mark.slow),
  ],
)
def test_who_else_is_there_changes_no_text(make, base, mesh, drafts):
  """Random schedules of requests with adapters mixed; without one a text is the model's own."""
  model, plain, alone = make(base, mesh=mesh, drafts=drafts), make(base, mesh=mesh), make(base, None, mesh)
  requests = requests_of(model, 24)
  texts = [finish(plain, [request])[0] for request in requests]
  for request, text in zip(requests, texts):
    if not request.prompt.adapter:
      assert finish(alone, [request])[0] == text
  for seed in range(8):
    r = np.random.default_rng(seed)
    rows = model.scheduler(
      LANES, most=LANES * int(r.integers(1, 3)), few_programs=True, context_bytes=[0, 1 << 20][seed % 2]
    )
    waiting, answers = list(r.permutation(len(requests))), []
    while waiting or rows.busy:
      while waiting and r.random() < 0.5:
        answers.append((waiting[-1], rows.submit(requests[waiting.pop()])))
      rows.advance(int(r.choice([1, 2, 5])), fill=r.random() < 0.3)
    for which, answer in answers:
      assert answer.tokens == texts[which], (seed, which)


def test_a_context_serves_its_own_adapter_alone(make, monkeypatch):
  model, reads, read = make(), [], prefill.Prefill.__init__
  monkeypatch.setattr(prefill.Prefill, "__init__", lambda self, *given: reads.append(given) or read(self, *given))
  requests = [lanes.Request(*model.filling(model.encode("abcde"), 8, name).blank(), HOT) for name in NAMES] * 2
  texts = [finish(model, [request])[0] for request in requests]
  reads.clear()
  rows = model.scheduler(LANES)
  assert finish(model, requests, rows) == texts and finish(model, requests, rows) == texts
  assert len(reads) == len(NAMES)
  assert len({tuple(text) for text in texts}) == len(NAMES)


def test_one_program_for_any_mix(make):
  model = make()
  model.generate(PROMPTS, 8, HOT, adapter=NAMES)
  before = [each._cache_size() for each in (decode.decode, prefill.through)]
  for names in (NAMES[::-1], None, "wide", ("mlp", None, None, "mlp")):
    model.generate(PROMPTS, 8, HOT, adapter=names)
  assert [each._cache_size() for each in (decode.decode, prefill.through)] == before


def test_drafts_of_a_model_change_no_text(make, folders):
  small = make(which="all")
  named = {name: folders[name] for name in untrained_adapters.LORA}
  drafted = load(folders["float"], named, drafts=LANES - 1, draft_model=small)
  assert drafted.generate(PROMPTS, 12, HOT, adapter=NAMES) == small.generate(PROMPTS, 12, HOT, adapter=NAMES)


def test_a_conversation_changes_its_adapter(make):
  model = make()
  session, other = (model.chat(sampling=HOT, answer_tokens=8, seed=1, adapter=name) for name in (None, "narrow"))
  assert session.adapters == tuple(untrained_adapters.LORA)
  first = "".join(session.ask("abc"))
  assert first == "".join(make(which=None).chat(sampling=HOT, answer_tokens=8, seed=1).ask("abc"))
  with pytest.raises(errors.InputError, match="no adapter 'missing': there are wide, narrow, mlp"):
    session.use("missing")
  session.clear()
  session.use("narrow")
  session._seed = 1
  assert "".join(session.ask("abc")) == "".join(other.ask("abc")) != first


def test_mistakes(make, folders, tmp_path):
  with pytest.raises(errors.InputError, match="no adapter 'x': there are wide, narrow, mlp"):
    make().generate(PROMPTS, 2, adapter="x")
  for ask in (
    lambda model: model.score(["abc"], adapter="wide"),
    lambda model: model.generate(["a"], 2, adapter="wide"),
  ):
    with pytest.raises(errors.InputError, match="no adapter 'wide': the model was loaded with none by name"):
      ask(make(which="wide"))
  with pytest.raises(errors.InputError, match="1 names for 4 prompts"):
    make().generate(PROMPTS, 2, adapter=["wide"])
  for name in ("none", "", " a"):
    with pytest.raises(errors.InputError, match="is no name for one"):
      adapters_lib.read({name: folders["wide"]})
  prefix = untrained_adapters.write_one(folders["float"], tmp_path / "prefix", 9, {"prefix_length": 3})
  with pytest.raises(errors.InputError, match=r"prefix holds a prefix \(P-Tuning\).*load it alone"):
    adapters_lib.read({"lora": folders["wide"], "prefix": prefix})
  assert load(folders["float"], prefix).config.prefix_length == 3
  with pytest.raises(errors.InputError, match="holds a model, not an adapter"):
    adapters_lib.read({"base": folders["float"]})
  assert load(folders["float"], {}).adapters == ()
  with pytest.raises(errors.InputError, match="was trained beside another model"):
    other = dataclasses.replace(folder_lib.read_config(folders["wide"]).model, mlp_dim=50)
    found = dataclasses.replace(adapters_lib.read(folders["wide"]), config=other)
    placement = placement_lib.one_device()
    adapters_lib.beside({"a": found}, runner_lib.read(folders["float"], placement), folders["float"], placement)


def test_factors_are_padded_with_zeros(make):
  model = make()
  leaf = lambda x: hasattr(x, "number_B")  # noqa: E731
  stacks = [x for x in jax.tree.leaves(model.runner.params, is_leaf=leaf) if leaf(x)]
  assert len(stacks) == 2 * 2 * 4 and all(len(x.array) == 4 and not np.asarray(x.array[0]).any() for x in stacks)
  assert model.config.lora_rank == 6 and model.config.lora_scale == 1
