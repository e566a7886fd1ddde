"""The runs in gin/ against what was published of the originals, parsed as `glmjax train` would.

Sources: P, the GLM-130B paper (arXiv 2210.02414) by section or table; LOG, GLM-130B's training log; LS, the
code it was trained with; GLM, THUDM/GLM's config/; CG6, THUDM/ChatGLM-6B's ptuning/.
"""

import dataclasses
import itertools
from typing import Any

import jax
import pytest

from glmjax import tokens
from glmjax.cli import commands
from glmjax.config import gin_files
from glmjax.data import sampler
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import pipeline
from glmjax.train import schedules

gin = pytest.importorskip("gin")

TRAIN = "glmjax.train.loop.train"
SPECIALS = tokens.icetk(20_000, 130_000)


@pytest.fixture(autouse=True)
def clean():
  gin.clear_config()
  yield
  gin.clear_config()


def parse(*files: str, overrides: tuple[str, ...] = ('CACHE="cache"',)) -> dict[str, Any]:
  """What loop.train would be called with, and `infilling`, the rows' maker."""
  gin_files.parse(files, overrides, TRAIN, ["workdir"], commands.targets())
  found = gin.get_bindings(gin_files.configured(TRAIN))
  return found | {"infilling": found["data"].infilling(specials=SPECIALS)}


# GLM-130B: (what, attribute of an argument of loop.train, value, source).
GLM_130B = [
  ("layers", "model.num_layers", 70, "P T11"),
  ("hidden size", "model.embed_dim", 12_288, "P T11"),
  ("heads", "model.num_heads", 96, "P T11"),
  ("feed-forward width", "model.mlp_dim", 32_768, "P T11"),
  ("vocabulary, padded", "model.vocab_size", 150_528, "P T11"),
  ("sequence length", "model.max_length", 2_048, "P T11"),
  ("positions", "model.positions", "rotary", "P B.3"),
  ("norm", "model.norm", "deepnorm", "P 2.1"),
  ("residual weight", "model.alpha", 140**0.5, "P 2.1"),
  ("initial gain", "model.beta", 140**-0.5, "P 2.1"),
  ("norm's epsilon", "model.layer_norm_epsilon", 1e-5, "P T11"),
  ("feed-forward", "model.mlp", "geglu", "P 2.1"),
  ("tied head", "model.tie_embeddings", True, "LS"),
  ("hidden dropout", "model.hidden_dropout", 0.1, "P T11"),
  ("attention dropout", "model.attention_dropout", 0.1, "P T11"),
  ("compute type", "model.dtype", "float16", "P 3"),
  ("master weights", "model.param_dtype", "float32", "P 3"),
  ("recomputation", "model.remat", "dots", "P T11: forward once more, as 1F1B goes anyway"),
  ("row", "infilling.seq_length", 2_048, "P T11"),
  ("text of a row", "infilling.window_length", 2_000, "P T11: length_per_sample"),
  ("[MASK] samples in a row", "infilling.samples_per_sequence", 4, "P T11"),
  ("[MASK] context", "infilling.slot_length", 512, "P 2.3"),
  ("[gMASK] share", "infilling.gmask_rate", 0.7, "P T11: gpt_prob"),
  ("shortest [gMASK]", "infilling.gmask_min_ratio", 0.2, "P T11: min_gmask_ratio"),
  ("masked share", "infilling.mask_ratio", 0.15, "P T11"),
  ("mean span", "infilling.mean_span_length", 3, "P T11: Poisson"),
  ("longest span", "infilling.max_span_length", 39, "LS: collator"),
  ("one span", "infilling.single_span_rate", 0.02, "P T11"),
  ("short sequences", "infilling.short_sequence_rate", 0.02, "P T11"),
  ("shortest sequence", "infilling.short_sequence_min", 32, "LS: collator"),
  ("instruction's shortest text", "infilling.instruction_min_inputs", 128, "LS: collator"),
  ("instruction positions", "infilling.instruction_positions", "running", "LS: collator"),
  ("loss of a row", "loss_mean_of", "rows", "P T11: micro-batches of 1"),
  ("optimizer beta 1", "optimizer.b1", 0.9, "P T11"),
  ("optimizer beta 2", "optimizer.b2", 0.95, "P T11"),
  ("optimizer epsilon", "optimizer.epsilon", 1e-8, "P T11"),
  ("weight decay", "optimizer.weight_decay", 0.1, "P T11"),
  ("gradient clipping", "optimizer.clip_norm", 1.0, "P T11"),
  ("peak rate", "learning_rate.peak", 8e-5, "P T11"),
  ("last rate", "learning_rate.minimum", 8e-6, "P T11"),
  ("first rate", "learning_rate.initial", 1e-7, "P 2.3"),
  ("warmup samples", "learning_rate.warmup_samples", 1_098_632, "P T11"),
  ("decay samples", "learning_rate.decay_samples", 197_753_905, "P T11"),
  ("samples", "total_samples", 219_726_562, "P T11"),
  ("batch", "batches.size", 4_224, "P T11"),
  ("first batch", "batches.ramp_start", 192, "P T11"),
  ("batch increment", "batches.ramp_increment", 24, "P T11"),
  ("batch ramp", "batches.ramp_samples", 5_493_164, "P T11"),
  ("skipped", "batches.skip", (), ""),
  ("embedding gradient shrink", "embedding_alpha.value", 0.1, "P 3"),
  ("loss scale", "loss_scale.start", 65_536, "P T11"),
  ("loss scale window", "loss_scale.window", 2_000, "P T11"),
  ("loss scale hysteresis", "loss_scale.hysteresis", 2, "P T11"),
  ("least loss scale", "loss_scale.minimum", 1, "P T11"),
  ("rows at a time", "micro_batch", 24 * 176, "P T11: micro-batch 1 x 24"),
  ("of which the pipeline makes", "pipeline.microbatches", 176, "P B.4"),
  ("data parallel", "mesh.data", 24, "P T11"),
  ("tensor parallel", "mesh.tensor", 4, "P T11"),
  ("pipeline parallel", "mesh.stage", 8, "P T11"),
  ("optimizer state", "strategy", "zero1", "P T11: ZeRO stage 1"),
  ("devices", "mesh.sizes", 768, "P 2.3: 96 x 8"),
  ("seed", "seed", 1234, "P T11"),
  ("data seed", "data.seed", 1234, "P T11"),
  ("evaluation", "intervals.evaluate", 1_000, "P T11"),
  ("evaluated", "intervals.eval_samples", 3 * 4_224, "P T11"),
  ("checkpoints", "intervals.save", 500, "LOG 7 May"),
]


def value_of(arguments: dict[str, Any], path: str) -> Any:
  name, *attributes = path.split(".")
  value = arguments[name]
  for attribute in attributes:
    value = getattr(value, attribute)
  if path == "mesh.sizes":
    size = 1
    for axis in value(768):
      size *= axis
    return size
  return value


def test_glm_130b_is_the_published_run():
  found = parse("runs/glm_130b.gin", "meshes/glm_130b_a100_768.gin")
  wrong = [
    (what, value_of(found, path), wanted, source)
    for what, path, wanted, source in GLM_130B
    if value_of(found, path) != pytest.approx(wanted)
  ]
  assert not wrong
  assert params_lib.count(found["model"]) == 128_697_794_560
  rows = found["micro_batch"] // found["pipeline"].microbatches
  assert found["batches"].size / rows == 176  # P B.4
  assert all(size % rows == 0 for _, size in itertools.islice(found["batches"].plan(), 5_000))
  mesh = jax.sharding.AbstractMesh(found["mesh"].sizes(768), mesh_lib.AXES)
  stages = pipeline.make(found["pipeline"], found["model"], mesh, found["micro_batch"])
  assert stages.group * stages.rounds == 9  # layers of a stage: 72 = 70 + 2, LS


def test_instructions_of_glm_130b():
  bindings = {}
  given = ['CACHE="c"', 'TEXT_FILES={"en": "e"}', 'INSTRUCTIONS="i"', 'TOKENIZER="t"']
  gin_files.parse(["runs/glm_130b.gin"], given, "glmjax.data.token_cache.cache_mixture")
  for name in ("instruction_share", "max_examples"):
    bindings[name] = gin.query_parameter(f"glmjax.data.mixtures.pretraining.{name}")
  assert bindings["instruction_share"] == 0.05  # P T11: multitask_ratio
  assert sorted(bindings["max_examples"].values()) == [100_000, 200_000, 500_000, 500_000]  # P C.1


def test_bfloat16_differs_in_nothing_else():
  fp16, bf16 = (parse(f"runs/glm_130b{end}.gin", "meshes/cpu.gin") for end in ("", "_bf16"))
  assert bf16["model"].dtype == "bfloat16" and fp16["model"].dtype == "float16"
  for name, value in fp16.items():
    if name not in ("model", "infilling"):
      assert str(value) == str(bf16[name])


def samples_before(batches: schedules.Batches) -> list[int]:
  """Samples before each of the original's iterations and behind the last; it counted those it skipped."""
  plan = dataclasses.replace(batches, skip=()).plan()
  return [0, *(first + size for first, size in itertools.islice(plan, 49_300))]


def test_the_run_as_it_was():
  run = parse("runs/glm_130b_as_run.gin", "meshes/glm_130b_a100_768.gin")
  at = samples_before(run["batches"])
  assert run["total_samples"] == at[49_300]
  assert at[49_300] * 2_048 == pytest.approx(400.6e9, rel=1e-4)  # P 2.3: 400 G tokens
  alphas = {
    0: 0.1,
    6_000: 0.1,
    6_250: 0.55,
    6_500: 1,
    22_799: 1,
    22_800: 0.2,
    23_199: 0.2119,
    23_200: 0.2533,
    25_800: 0.6,
    28_800: 1,
    33_599: 1,
    33_600: 0.5,
    35_199: 0.5,
    35_200: 0.1,
    49_299: 0.1,
  }
  found = {step: float(run["embedding_alpha"](at[step])) for step in alphas}
  assert found == pytest.approx(alphas, abs=1e-3)
  full, half = schedules.LearningRate(), schedules.LearningRate(peak=4e-5)
  lower = schedules.LearningRate(peak=4e-5, minimum=4e-6)
  rates = {
    0: (full, 1),
    2_318: (full, 1),
    22_799: (full, 1),
    22_800: (full, 0),
    23_800: (full, 0.5),
    24_800: (full, 1),
    25_999: (full, 1),
    26_000: (half, 1),
    42_699: (half, 1),
    42_700: (lower, 1),
    49_299: (lower, 1),
  }
  for step, (schedule, factor) in rates.items():
    wanted = factor * float(schedule(at[step]))
    assert float(run["learning_rate"](at[step])) == pytest.approx(wanted, rel=2e-3, abs=1e-12), step
  steps = itertools.takewhile(lambda step: step[0] < at[49_300], run["batches"].plan())
  trained = [first for first, _ in steps]
  assert len(trained) == 48_900
  skipped = [*range(40_700, 40_900), *range(42_400, 42_600)]  # LS: iterations 40701-40900 and 42401-42600
  assert set(at[:-1]) - set(trained) == {at[step] for step in skipped}
  assert set(trained) <= set(at)
  assert run["intervals"].save == 100


def test_instruction_data_of_the_run_as_it_was():
  run = parse("runs/glm_130b_as_run.gin")
  at = samples_before(run["batches"])
  sets = {
    "pretrain_en": 0.475,
    "pretrain_zh": 0.475,
    "instruct_t0_a": 0.01,
    "instruct_t0_b": 0.02,
    "instruct_t0eval_c": 0.01,
    "instruct_deepstruct_d": 0.01,
  }

  class Cache:
    """What task_rates asks of a token cache."""

    directory = "cache"
    tasks = {name: {"rate": rate, "splits": {"train": {}}} for name, rate in sets.items()}

  def weigh(rates):
    return sampler.rate_weights(sampler.task_rates(Cache, "train", rates))

  timeline = sampler.Timeline(
    weigh(run["data"].rates),
    [(change.first_sample, change.ramp_samples, weigh(change.rates)) for change in run["data"].rate_changes],
  )

  def share(pattern: str, step: int) -> float:
    first, last = at[step], at[step + 50]
    return sum(
      timeline.count(name, last) - timeline.count(name, first) for name in sets if name.startswith(pattern)
    ) / (last - first)

  for step in (0, 5_000, 22_700, 22_900, 23_600, 24_700, 30_000):
    assert share("instruct", step) == pytest.approx(0.05, abs=1e-3)
  mistaken = {22_700: 0.0125, 23_775: 0.0125 * (1 - 1_000 / 2_000), 24_800: 0.0}
  assert {step: share("instruct_t0eval", step) for step in mistaken} == pytest.approx(mistaken, abs=3e-4)
  added = {23_449: 0.0, 24_125: 0.0125 / 2, 24_800: 0.0125}
  assert {step: share("instruct_deepstruct", step) for step in added} == pytest.approx(added, abs=3e-4)


@pytest.mark.parametrize(
  "name", sorted(path.name for path in (gin_files.packaged_folder() / "runs" / "interventions").glob("*.gin"))
)
def test_each_intervention_stands_alone(name: str):
  plain = parse("runs/glm_130b.gin")
  gin.clear_config()
  changed = parse("runs/glm_130b.gin", f"runs/interventions/{name}")
  assert any(str(value) != str(plain[key]) for key, value in changed.items())
  assert (
    parse("runs/glm_130b_as_run.gin")
    and f"interventions/{name}" in (gin_files.packaged_folder() / "runs" / "glm_130b_as_run.gin").read_text()
  )


# The family: values by file, sources GLM config/ds_block_*.sh and config_block_*.json (but for what is said).
FAMILY = {
  "glm_110m": {
    "model.num_layers": 12,
    "infilling.seq_length": 512,
    "infilling.mask_rate": 1.0,
    "infilling.dblock_rate": 0.0,
    "optimizer.b2": 0.98,
    "optimizer.epsilon": 1e-6,
    "learning_rate.peak": 4e-4,
    "learning_rate.minimum": 2e-5,
  },
  "glm_335m": {
    "model.num_layers": 24,
    "infilling.seq_length": 512,
    "infilling.mask_rate": 1.0,
    "optimizer.b2": 0.98,
    "optimizer.epsilon": 1e-6,
    "learning_rate.peak": 2e-4,
    "learning_rate.minimum": 1e-5,
  },
  "glm_2b": {
    "model.num_layers": 36,
    "model.max_length": 1_024,
    "infilling.seq_length": 512,
    "infilling.mask_rate": 0.4,
    "infilling.sentence_rate": 0.3,
    "infilling.dblock_rate": 0.1,
    "infilling.gmask_min_ratio": 0.25,
    "infilling.short_sequence_rate": 0.02,
    "optimizer.b2": 0.95,
    "optimizer.epsilon": 1e-8,
    "learning_rate.peak": 1e-4,
    "learning_rate.minimum": 1e-5,
  },
  "glm_10b": {
    "model.num_layers": 48,
    "model.max_length": 1_024,
    "infilling.seq_length": 512,
    "infilling.mask_rate": 0.5,
    "infilling.sentence_rate": 0.3,
    "infilling.dblock_rate": 0.1,
    "infilling.gmask_min_ratio": 0.25,
    "infilling.short_sequence_rate": 0.02,
    "optimizer.b2": 0.95,
    "optimizer.epsilon": 1e-8,
    "learning_rate.peak": 1e-4,
    "learning_rate.minimum": 1e-5,
  },
}
# Iterations, those of the decay, the warmup as a share of those; rows of a device x devices (assumed).
STEPS = {
  "glm_110m": (150_000, 120_000, 0.05, 16 * 64),
  "glm_335m": (200_000, 160_000, 0.05, 16 * 64),
  "glm_2b": (250_000, 175_000, 0.04, 32 * 256),
  "glm_10b": (250_000, 175_000, 0.04, 21 * 256),
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_as_published(name: str):
  no_tokenizer = "glmjax.data.glm10b.BlockStrategy.sentence_ends=(7,)"
  found = parse(f"runs/{name}.gin", "meshes/cpu.gin", overrides=('CACHE="cache"', no_tokenizer))
  common = {
    "optimizer.b1": 0.9,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 1.0,
    "seed": 1234,
    "learning_rate.initial": 0.0,
    "model.dtype": "float16",
    "loss_scale.window": 1_000,
    "model.hidden_dropout": 0.1,
    "model.attention_dropout": 0.1,
  }
  wanted = common | FAMILY[name]
  assert {path: value_of(found, path) for path in wanted} == wanted
  iterations, decay, warmup, batch = STEPS[name]
  rate = found["learning_rate"]
  assert (found["batches"].size, found["total_samples"]) == (batch, iterations * batch)
  assert (rate.decay_samples, rate.warmup_samples) == (decay * batch, round(warmup * decay * batch))


def test_chatglm_6b_is_as_published():  # CG6 ds_train_finetune.sh, and the Trainer's defaults
  found = parse("runs/chatglm_6b.gin", "meshes/cpu.gin", overrides=('CACHE="cache"', 'WEIGHTS="imported"'))
  wanted = {
    "batches.size": 4 * 4,
    "total_samples": 5_000 * 16,
    "infilling.seq_length": 64 + 64,
    "optimizer.b2": 0.999,
    "optimizer.weight_decay": 0.0,
    "model.dtype": "float16",
    "model.max_length": 2_048,
    "infilling.positions": "rotary_2d",
    "infilling.instruction_mask": "gmask",
    "infilling.instruction_cut": "end",
    "infilling.instruction_max_inputs": 64 - 1,
    "infilling.instruction_max_targets": 64 - 2,
    "infilling.instruction_sop_loss": True,
    "loss_mean_of": "tokens",
    "weights": "imported",
  }
  assert {path: value_of(found, path) for path in wanted} == wanted
  assert [float(found["learning_rate"](s)) for s in (0, 40_000, 80_000)] == pytest.approx([1e-4, 5e-5, 0])
