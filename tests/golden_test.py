"""The model, decoding and scoring against what the original PyTorch code computed (golden_models)."""

import ast
import dataclasses
import functools
import os
import re
from typing import Any

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import positions as positions_lib
from glmjax import tokens as tokens_lib
from glmjax.infer import beam as beam_lib
from glmjax.infer import decode
from glmjax.infer import engine
from glmjax.infer import prompt
from glmjax.infer import sampling
from glmjax.infer import score
from glmjax.infer import scoring
from glmjax.models import glm
from glmjax.models import kv_cache
from glmjax.parallel import partitioning

TOLERANCE = 1e-4
# Suffix of the logits: what the model was run with.
VARIANTS = {
  "glm130b_tiny": {"": {}, "_fp32rope": dict(rotary_rounding="none"), "_halftable": dict(rotary_rounding="half_table")},
  "chatglm6b_tiny": {
    "": {},
    "_fp32rope": dict(rotary_rounding="none"),
    "_halftable": dict(rotary_rounding="half_table"),
    "_alpha28": dict(residual_alpha=56**0.5),
  },
  "glm10b_tiny": {"": {}},
}
# Where models answer: on the mesh that is named, or on one device and on these.
MESHES = [os.environ["GLMJAX_GOLDEN_MESH"]] if "GLMJAX_GOLDEN_MESH" in os.environ else [None, "tensor=2"]
MESHES += [pytest.param("data=2,tensor=4", marks=pytest.mark.slow)] * (len(MESHES) > 1)
on_meshes = pytest.mark.parametrize("mesh", MESHES)
VARIANT_NAMES = {"_fp32rope": "float32 rotary", "_halftable": "float16 rotary table", "_alpha28": "alpha of 28 layers"}
jitted_logits = jax.jit(
  lambda config, params, *inputs: glm.GLM(config).apply({"params": params}, *inputs), static_argnums=0
)


def cases(group: str) -> list[str]:
  """Cases whose masks are intervals; multi_choice is tested choice by choice."""
  names = {key.split("/")[1] for key in golden_models.load(group)[1] if key.startswith("case/")}
  return sorted(names - {"multi_choice"})


def inputs(group: str, case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """tokens, positions, start, end, and where logits count."""
  arrays = golden_models.load(group)[1]

  def get(key):
    return arrays[f"case/{case}/{key}"]

  if group == "glm10b_tiny":
    tokens, positions = get("text"), get("position_id")
    end = np.maximum(np.arange(1, tokens.shape[1] + 1), get("attention_mask")[:, None])
    return tokens, positions, np.zeros_like(tokens), end, np.ones(tokens.shape, bool)
  tokens, positions, hidden = get("tokens"), get("position_ids"), get("attention_mask")[:, 0]
  counts = ~hidden.all(-1)
  if f"case/{case}/context_length" in arrays:
    counts &= np.arange(tokens.shape[1]) < get("context_length")[:, None]
  return tokens, positions, *golden_models.intervals(hidden), counts


@functools.cache
def all_inputs(group: str) -> tuple[list[jax.Array], dict[str, tuple[slice, np.ndarray]]]:
  """Every case of the group in one batch, padded on the right; and each one's rows and counting places."""
  each = {case: inputs(group, case) for case in cases(group)}
  length = max(x[0].shape[1] for x in each.values())
  places, parts, row = {}, [], 0
  for case, (tokens, positions, start, end, counts) in each.items():
    width = [(0, 0), (0, length - tokens.shape[1])]
    own = np.tile(np.arange(length), (len(tokens), 1))
    end = np.concatenate([end, own[:, end.shape[1] :] + 1], 1)
    start = np.concatenate([start, own[:, start.shape[1] :]], 1)
    parts.append([np.pad(tokens, width), np.pad(positions, [(0, 0)] * (positions.ndim - 2) + width), start, end])
    places[case] = slice(row, row + len(tokens)), counts
    row += len(tokens)
  return [jnp.array(np.concatenate(x), jnp.int32) for x in zip(*parts)], places


@pytest.mark.parametrize("group, suffix", [(group, suffix) for group in VARIANTS for suffix in VARIANTS[group]])
def test_logits(group: str, suffix: str):
  arrays = golden_models.load(group)[1]
  config = golden_models.config(group, **VARIANTS[group][suffix])
  batch, places = all_inputs(group)
  logits = np.asarray(jitted_logits(config, golden_models.params(group), *batch))
  compared = 0
  for case, (rows, counts) in places.items():
    if (expected := arrays.get(f"case/{case}/logits{suffix}")) is not None:
      what = f"logits ({VARIANT_NAMES[suffix]})" if suffix else "logits"
      golden_models.close(group, what, logits[rows, : counts.shape[1]][counts], expected[counts], TOLERANCE, case=case)
      compared += 1
  assert compared


def test_half_precision_logits():
  """The fp16 run of the original, within fp16's own noise."""
  for group, case, key in (
    ("glm130b_tiny", "mask_single", "logits_fp16_unstubbed"),
    ("chatglm6b_tiny", "mask_middle", "logits_fp16"),
  ):
    expected = golden_models.load(group)[1].get(f"case/{case}/{key}")
    if expected is None:
      continue
    config = golden_models.config(group, rotary_rounding="half_table", dtype="float16")
    tokens, positions, start, end, counts = inputs(group, case)
    logits = jitted_logits(
      config, golden_models.params(group), *(jnp.array(x, jnp.int32) for x in (tokens, positions, start, end))
    )
    golden_models.close(group, "logits of a float16 model", np.asarray(logits)[counts], expected[counts], 0.05)


def hidden_cases() -> list[tuple[str, str]]:
  return [
    (group, case)
    for group in VARIANTS
    for case in sorted({key.split("/")[1] for key in golden_models.load(group)[1] if key.startswith("hidden/")})
  ]


@pytest.mark.parametrize("group, case", hidden_cases())
def test_hidden_states_and_cache(group: str, case: str):
  arrays = golden_models.load(group)[1]
  config = golden_models.config(group, scan_layers=False)
  n = config.num_layers
  tokens, positions, start, end, counts = (jnp.array(x, jnp.int32) for x in inputs(group, case))
  params = glm.unstack_layers(golden_models.params(group))

  @jax.jit
  def run(params: Any) -> tuple[Any, Any]:
    (_, cache), captured = glm.GLM(config).apply(
      {"params": params},
      tokens,
      positions,
      start,
      end,
      cache=kv_cache.empty(partitioning.target(), config, len(tokens), 0),
      method="hidden",
      capture_intermediates=True,
      mutable=["intermediates"],
    )
    return cache, captured["intermediates"]

  cache, captured = jax.tree.map(np.asarray, run(params))
  at = f"hidden/{case}/"
  pairs = [(captured["final_norm"]["__call__"][0], at + "final_layernorm_out")]
  for i in range(n):
    layer, at_layer = captured[f"layers_{i}"], f"{at}layer{i}/"
    qkv = layer["attention"]["qkv"]["__call__"][0]  # [B, L, 3, H, K]
    if group != "glm10b_tiny":
      qkv = np.swapaxes(qkv, 2, 3)
    pairs += [
      (layer["attention_norm"]["__call__"][0], at_layer + "input_layernorm_out"),
      (qkv.reshape(*qkv.shape[:2], -1), at_layer + "query_key_value_out"),
      (layer["attention"]["out"]["__call__"][0], at_layer + "attention_out"),
      (layer["mlp_norm"]["__call__"][0], at_layer + "post_attention_layernorm_out"),
      (layer["mlp"]["__call__"][0], at_layer + "mlp_out"),
      (layer["__call__"][0][0], at_layer + ("output" if group == "glm130b_tiny" else "layer_out")),
    ]
    key, value = (np.swapaxes(getattr(cache[f"layers_{i}"], name).kept, 1, 2) for name in ("key", "value"))
    if group == "glm130b_tiny":
      pairs.append((np.concatenate([x.reshape(*x.shape[:2], -1) for x in (key, value)], -1), at_layer + "mem_kv"))
    if group == "chatglm6b_tiny":
      pairs += [(np.swapaxes(key, 0, 1), at_layer + "past_key"), (np.swapaxes(value, 0, 1), at_layer + "past_value")]
  pairs = [pair for pair in pairs if pair[1] in arrays]
  assert len(pairs) >= 6 * n
  for ours, key in pairs:
    what = "KV cache" if key.split("/")[-1] in ("mem_kv", "past_key", "past_value") else "hidden states"
    golden_models.close(group, what, ours, arrays[key], TOLERANCE, 1e-5, case=key)


def grad_cases() -> list[tuple[str, str]]:
  return [
    (group, key.split("/")[1])
    for group in VARIANTS
    for key in golden_models.load(group)[1]
    if key.startswith("grad_case/") and key.endswith("/loss")
  ]


@pytest.mark.parametrize("group, case", grad_cases())
def test_loss_and_gradients(group: str, case: str):
  arrays = golden_models.load(group)[1]
  tokens, positions, start, end, _ = (jnp.array(x, jnp.int32) for x in inputs(group, case))
  if group == "chatglm6b_tiny":  # labels to be shifted
    labels = arrays[f"grad_case/{case}/labels"]
    targets = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    weights = targets != -100
    targets = np.where(weights, targets, 0)
  else:
    name = {"glm130b_tiny": ("targets", "loss_masks"), "glm10b_tiny": ("target", "loss_mask")}[group]
    targets, weights = (arrays[f"case/{case}/{key}"] for key in name)

  def loss(params: Any) -> jax.Array:
    logits = glm.GLM(golden_models.config(group)).apply({"params": params}, tokens, positions, start, end)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.array(targets)[..., None], -1)[..., 0]
    return -jnp.sum(log_probs * weights) / weights.sum()

  value, grads = jax.jit(jax.value_and_grad(loss))(jax.tree.map(jnp.array, golden_models.params(group)))
  golden_models.close(group, "loss", value, arrays[f"grad_case/{case}/loss"], rtol=1e-5)
  expected = golden_models.params(group, f"grad_case/{case}/grad/")
  jax.tree.map(lambda a, b: golden_models.close(group, "gradients", a, b, TOLERANCE, 1e-3), grads, expected)


def greedy(
  group: str,
  mesh: str | None,
  prompts: list[prompt.Prompt],
  steps: int,
  stops: tuple[int, ...] = (),
  suppressed: tuple[int, ...] = (),
) -> list[list[int]]:
  model = golden_models.runner(group, mesh)

  def flags(ids):
    return np.isin(np.arange(model.config.vocab_size), ids)

  batch, rows = decode.make_rows(prompts, [steps] * len(prompts), 0, model.batch_size(len(prompts)))
  fill = len(rows.limit_B)
  state = model.run(decode.prefill, batch, rows, new_tokens=steps)
  state = model.run(
    decode.decode,
    rows,
    state,
    sampling.draws([sampling.Sampling()] * fill, [0] * fill),
    flags(suppressed),
    flags(stops),
    np.int32(steps),
  )
  return decode.generated(state, len(prompts))


def build_glm130b(case: str, tokens: list[int], specials: tokens_lib.SpecialTokens) -> prompt.Prompt:
  """Our prompt for the text in a case's tokens."""
  if case.endswith("unidirectional"):
    return prompt.extend(prompt.fill([specials.gmask], specials, positions_lib.ROTARY), tokens[2:])
  return prompt.fill(tokens[:-1], specials, positions_lib.ROTARY)


@on_meshes
@pytest.mark.parametrize("case", ["eval_batch_mask", "eval_batch_gmask", "eval_batch_unidirectional"])
def test_greedy_generation_glm130b(case: str, mesh: str | None):
  """Prompts built by our rules are the original's, and so are the tokens that follow."""
  arrays, specials = golden_models.load("glm130b_tiny")[1], golden_models.specials("glm130b_tiny")

  def get(key):
    return arrays[f"case/{case}/{key}"]

  prompts = []
  for row, n in enumerate(get("context_length")):
    tokens = get("tokens")[row, :n].tolist()
    built = build_glm130b(case, tokens, specials)
    longer = prompt.extend(built, [0] * get("target_position_ids").shape[1])
    positions = [*get("position_ids")[row, :n].tolist(), *get("target_position_ids")[row].tolist()]
    golden_models.same(
      "glm130b_tiny", "prompts and positions", [built.tokens, longer.positions[0].tolist()], [tokens, positions]
    )
    prompts.append(built)
  expected = get("greedy_generate_text")
  new = greedy("glm130b_tiny", mesh, prompts, expected.shape[1], stops=(specials.eop, specials.eos))
  golden_models.same("glm130b_tiny", "greedy tokens", new, [row[row >= 0].tolist() for row in expected], case)


@on_meshes
def test_greedy_generation_chatglm(mesh: str | None):
  arrays, specials = golden_models.load("chatglm6b_tiny")[1], golden_models.specials("chatglm6b_tiny")
  tokens = arrays["case/left_pad_batch/tokens"]
  sequences = arrays["generate/left_pad_batch/sequence"]
  prompts = []
  for row, positions, length in zip(
    tokens, arrays["case/left_pad_batch/position_ids"], arrays["case/left_pad_batch/lengths"]
  ):
    row = row[-length:].tolist()
    sop = row.index(specials.sop)  # behind it is the start of an answer
    prompts.append(prompt.extend(prompt.fill(row[:sop], specials, positions_lib.ROTARY_2D), row[sop + 1 :]))
    golden_models.same(
      "chatglm6b_tiny",
      "prompts and positions",
      [prompts[-1].tokens, prompts[-1].positions.tolist()],
      [row, positions[:, -length:].tolist()],
    )
  new = greedy("chatglm6b_tiny", mesh, prompts, sequences.shape[1] - tokens.shape[1], suppressed=(specials.eop,))
  golden_models.same("chatglm6b_tiny", "greedy tokens", new, sequences[:, tokens.shape[1] :])

  sequence, start = arrays["generate/gmask_prompt/sequence"][0], arrays["case/gmask_prompt/tokens"][0]
  built = prompt.fill(start[:-1].tolist(), specials, positions_lib.ROTARY_2D)
  new = greedy("chatglm6b_tiny", mesh, [built], len(sequence) - len(start), suppressed=(specials.eop,))
  golden_models.same("chatglm6b_tiny", "greedy tokens", new[0], sequence[len(start) :])


def test_step_logits_chatglm():
  """Logits of every cached step, positions included."""
  arrays, specials = golden_models.load("chatglm6b_tiny")[1], golden_models.specials("chatglm6b_tiny")
  sequence, start = arrays["generate/gmask_prompt/sequence"][0], arrays["case/gmask_prompt/tokens"][0]
  config, params = golden_models.config("chatglm6b_tiny"), golden_models.params("chatglm6b_tiny")
  built = prompt.fill(start[:-1].tolist(), specials, positions_lib.ROTARY_2D)
  batch, rows = decode.make_rows([built], [1], 0)
  expected = arrays["generate/gmask_prompt/step_logits"][0]
  state = decode.prefill(config, params, batch, rows, len(expected))
  step = jax.jit(decode.next_logits, static_argnums=0)
  for i, logits in enumerate(expected):
    ours, cache = step(config, params, rows, state)
    golden_models.close("chatglm6b_tiny", "logits of each step", ours[0], logits, TOLERANCE)
    positions = arrays[f"generate/gmask_prompt/step{i}_position_ids"][0, :, -1]
    ours = (rows.position_B2 + i * rows.stride_B2)[0]
    golden_models.same("chatglm6b_tiny", "positions of each step", ours, positions)
    state = dataclasses.replace(
      state,
      cache=cache,
      length_B=state.length_B + 1,
      step_B=state.step_B + 1,
      last_B=jnp.array(sequence[len(start) + i])[None],
    )


@dataclasses.dataclass(frozen=True)
class Numbers:
  """The golden cases' tokenizer: text is token ids."""

  specials: tokens_lib.SpecialTokens
  vocab_size: int
  num_image_tokens: int = 0

  def encode(self, text: str) -> list[int]:
    return [int(x) for x in text.split()]

  def decode(self, ids: list[int]) -> str:
    return " ".join(map(str, ids))


@on_meshes
def test_streamed_tokens_chatglm(mesh: str | None):
  arrays, specials = golden_models.load("chatglm6b_tiny")[1], golden_models.specials("chatglm6b_tiny")
  sequence, start = arrays["generate/gmask_prompt/sequence"][0], arrays["case/gmask_prompt/tokens"][0]
  config = golden_models.config("chatglm6b_tiny")
  answering = engine.Engine(
    golden_models.runner("chatglm6b_tiny", mesh),
    Numbers(specials, config.vocab_size),
    stop_tokens=(),
    suppressed_tokens=(specials.eop,),
  )
  new = list(answering.stream(start[:-1].tolist(), len(sequence) - len(start)))
  golden_models.same("chatglm6b_tiny", "streamed tokens", new, sequence[len(start) :])


@on_meshes
def test_fill_blanks_end_to_end(mesh: str | None):
  meta, specials = golden_models.load("glm130b_tiny")[0], golden_models.specials("glm130b_tiny")
  for name, case in meta["fill_blanks"].items():
    config = golden_models.config("glm130b_tiny", max_length=case["out_seq_length"])
    answering = engine.Engine(
      golden_models.runner("glm130b_tiny", mesh, max_length=case["out_seq_length"]),
      Numbers(specials, config.vocab_size),
      stop_tokens=(specials.eop, specials.eos),
      suppressed_tokens=(),
    )
    result = answering.generate([case["raw_text"]], max_tokens=config.max_length)[0]
    golden_models.same(
      "glm130b_tiny",
      "fill_blanks end to end",
      [[result.text], [result.pieces]],
      [case["answers"], case["blanks"]],
      name,
    )


@on_meshes
def test_multiple_choice_scores(mesh: str | None):
  arrays, specials = golden_models.load("glm130b_tiny")[1], golden_models.specials("glm130b_tiny")

  def get(key):
    return arrays[f"case/multi_choice/{key}"]

  rows, expected = [], []
  for question, log_probs in enumerate(get("cond_log_prob")):
    division = get(f"choice_target_ids_{question}_0")[0]
    context = get("tokens")[question, :division].tolist()
    for choice, log_prob in enumerate(log_probs):
      answer = get(f"choice_{question}_{choice}").tolist()
      rows.append(score.target_row(context, answer, specials, positions_lib.ROTARY))
      expected.append(log_prob)
  scores = scoring.score_rows(golden_models.runner("glm130b_tiny", mesh), rows, pad=0)
  golden_models.close("glm130b_tiny", "scores of choices", [s.total for s in scores], expected, TOLERANCE)


@on_meshes
def test_multiple_choice_scores_by_the_engine(mesh: str | None):
  """Texts in, with the blank in the context's middle, at its end, or put there."""
  arrays, specials = golden_models.load("glm130b_tiny")[1], golden_models.specials("glm130b_tiny")

  def get(key):
    return arrays[f"case/multi_choice/{key}"]

  config = golden_models.config("glm130b_tiny")
  answering = engine.Engine(golden_models.runner("glm130b_tiny", mesh), Numbers(specials, config.vocab_size))

  def text(ids):
    return " ".join(map(str, ids.tolist()))

  for question, log_probs in enumerate(get("cond_log_prob")):
    context = get("tokens")[question, : get(f"choice_target_ids_{question}_0")[0]]
    choices = [text(get(f"choice_{question}_{choice}")) for choice in range(len(log_probs))]
    contexts = [(text(context), "[MASK]")]
    if context[-1] in (specials.mask, specials.gmask):
      contexts.append((text(context[:-1]), "[gMASK]" if context[-1] == specials.gmask else "[MASK]"))
    for shown, mask in contexts:
      found = answering.score_choices([shown], [choices], mask)[0]
      golden_models.close("glm130b_tiny", "scores of choices", [s.total for s in found.scores], log_probs, TOLERANCE)
      assert found.best == int(np.argmax(log_probs)) and found.left_out == 0


@on_meshes
def test_language_model_scores(mesh: str | None):
  """The original's windows of a text, token for token, and their losses."""
  arrays, specials = golden_models.load("glm130b_tiny")[1], golden_models.specials("glm130b_tiny")

  def get(key):
    return arrays[f"case/lm/{key}"]

  counts = get("loss_masks").sum(-1)
  length, stride = get("tokens").shape[1], int(counts[1])
  rows = score.window_rows(get("raw_text").tolist(), specials, positions_lib.ROTARY, length, stride)
  assert sum(len(row.targets) for row in rows) == len(get("raw_text"))
  for row, tokens, positions, targets, count in zip(rows, get("tokens"), get("position_ids"), get("targets"), counts):
    golden_models.same(
      "glm130b_tiny",
      "windows of text",
      [row.prompt.tokens, row.prompt.positions[0].tolist(), list(row.targets)],
      [tokens.tolist(), positions.tolist(), targets[-count:].tolist()],
    )
  scores = scoring.score_rows(golden_models.runner("glm130b_tiny", mesh), rows, pad=0)
  golden_models.close(
    "glm130b_tiny", "scores of text", [-s.total for s in scores[: len(counts)]], get("calculate_loss"), rtol=1e-5
  )


def test_sampling_filters():
  meta, arrays = golden_models.load("generation")
  logits = jnp.array(arrays["filter/logits"])
  for i, case in enumerate(meta["top_k_top_p"]):
    k, p = case["top_k"], case["top_p"] or 1.0
    out = sampling.filter_logits(logits / case["temperature"], jnp.array([k]), jnp.array([p], jnp.float32))
    golden_models.close("generation", "filtered logits", out, arrays[f"filter/{i}/logits_out"], rtol=1e-6)
    golden_models.close("generation", "probabilities", jax.nn.softmax(out), arrays[f"filter/{i}/probs"], 1e-6)
    golden_models.same("generation", "tokens kept by top-k and top-p", (out > sampling.FILTERED).sum(), case["kept"])


def invalid(text: str, vocab: int) -> np.ndarray:
  """bool [vocab], True in every slice(a, b, None) written in the text."""
  mask = np.zeros(vocab, bool)
  for first, last in re.findall(r"slice\((\d+), (\d+), None\)", text):
    mask[int(first) : int(last)] = True
  return mask


def test_greedy_of_the_table_model():
  meta, arrays = golden_models.load("generation")
  greedy_draws = functools.cache(lambda n: sampling.draws([sampling.Sampling()] * n, [0] * n))
  step = jax.jit(sampling.sample)
  for name, case in meta["base"].items():
    if not case["deterministic"]:
      continue
    suppressed = jnp.array(invalid(case["kw"], meta["V"]))
    sequences = arrays[f"base/{name}/context"]
    done = np.zeros(len(sequences), bool)
    expected = arrays[f"base/{name}/output"][:, 0]
    while sequences.shape[1] < expected.shape[1]:
      logits = arrays["T"][sequences[:, -1]] + arrays["P"][sequences.shape[1] - 1]
      new = np.where(done, -1, step(jnp.array(logits), suppressed, greedy_draws(len(done)), jnp.int32(0)))
      done |= np.isin(new, [meta["EOP"], meta["EOS"]])
      sequences = np.concatenate([sequences, new[:, None]], 1)
    golden_models.same("generation", "greedy tokens", sequences, expected, name)


def test_beam_search_of_the_table_model():
  """Tokens and scores of every step, ends and final order."""
  meta, arrays = golden_models.load("generation")
  for name, case in meta["beam"].items():
    suppressed = invalid(case["kw"].get("invalid_slices", ""), meta["V"])
    kw = {key: ast.literal_eval(value) for key, value in case["kw"].items() if key != "invalid_slices"}
    settings = beam_lib.BeamSearch(
      kw["num_beams"],
      kw["length_penalty"],
      kw.get("no_repeat_ngram_size", 0),
      kw.get("min_gen_length", 0),
      kw["consider_end"],
    )
    searches = [
      beam_lib.Search(settings, context, beam_lib.Ids(case["end_tokens"], 0, suppressed)) for context in case["context"]
    ]
    for step in case["steps"]:
      for i, search in enumerate(searches):
        search.advance(np.stack([arrays["T"][beam[-1]] + arrays["P"][len(beam) - 1] for beam in search.live]))
        golden_models.same(
          "generation",
          "beam tokens of each step",
          [search.live, search.done],
          [step["tokens"][i], step["is_done"][i]],
          name,
        )
        golden_models.close("generation", "beam scores of each step", search.scores, step["scores"][i], 1e-4)
    for i, search in enumerate(searches):
      tokens = [beam.tokens for beam in search.result()]
      golden_models.same("generation", "beam tokens", tokens, case["output"][i], name)
      if settings.stop_early:
        golden_models.close(
          "generation", "beam scores", [beam.score for beam in search.result()], case["penalized_scores"][i], 1e-5
        )


@on_meshes
@pytest.mark.parametrize("case", ["eval_batch_mask", "eval_batch_gmask", "eval_batch_unidirectional"])
def test_beam_generation_glm130b(case: str, mesh: str | None):
  arrays, specials = golden_models.load("glm130b_tiny")[1], golden_models.specials("glm130b_tiny")

  def get(key):
    return arrays[f"case/{case}/{key}"]

  prompts = [
    build_glm130b(case, get("tokens")[row, :n].tolist(), specials) for row, n in enumerate(get("context_length"))
  ]
  expected = get("beam3_generate_text")
  beams = beam_lib.search(
    golden_models.runner("glm130b_tiny", mesh),
    prompts,
    expected.shape[2],
    beam_lib.BeamSearch(expected.shape[1], no_repeat_ngram=2),
    beam_lib.Ids((specials.eop, specials.eos), pad=0),
  )
  for row, (found, prompt_) in enumerate(zip(beams, prompts)):
    for beam, tokens in zip(found, expected[row], strict=True):
      new = beam.tokens[len(prompt_.tokens) :]
      new = new[:-1] if new[-1] in (specials.eop, specials.eos) else new
      golden_models.same("glm130b_tiny", "beam tokens", new, tokens[tokens >= 0], case)
