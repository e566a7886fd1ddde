"""Held-out figures: against what models of known behaviour must get, and against scoring text by hand."""

import dataclasses
import json
import math
from typing import Any

import bucket_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glmjax

from glmjax import errors
from glmjax import positions as positions_lib
from glmjax import tokenizer as tokenizer_lib
from glmjax import tokens
from glmjax.data import nearby
from glmjax.data import rows
from glmjax.data import shards
from glmjax.data import spans
from glmjax.evaluate import heldout
from glmjax.evaluate import windows
from glmjax.checkpoint import adapter as adapter_lib
from glmjax.checkpoint import load
from glmjax.infer import runner as runner_lib
from glmjax.infer import engine
from glmjax.infer import runner
from glmjax.infer import score
from glmjax.infer import scoring
from glmjax.infer import vocabulary
from glmjax.io import progress
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.models import weights

FIGURES = {
  "documents",
  "tokens",
  "split_tokens",
  "bytes",
  "bits_per_byte",
  "bits_per_token",
  "unigram_bits_per_byte",
  "xz_bits_per_byte",
  "infill_accuracy",
  "infill_accuracy_se",
  "infill_accuracy_left_only",
  "infill_accuracy_left_only_se",
  "infill_gain",
  "infill_gain_se",
  "infill_samples",
  "infill_tokens",
  "unigram_accuracy",
}


def test_every_language_gets_every_figure(model, cache) -> None:
  result = heldout.evaluate_model(model, cache)
  assert set(result) == {"en", "zh"}
  for language, figures in result.items():
    assert set(figures) == FIGURES
    reader = cache.split(f"pretrain_{language}", "validation")
    assert figures["tokens"] == figures["split_tokens"] == reader.num_tokens - reader.num_documents
    assert figures["bytes"] == reader.utf8_bytes
    assert all(math.isfinite(figure) for figure in figures.values())
    assert 0 < figures["unigram_bits_per_byte"] < figures["bits_per_byte"]  # this model knows nothing
  assert heldout.evaluate_model(model, cache) == result
  json.dumps(result)


def apart(params: Any) -> Any:
  """Returns a copy of parameters, each layer by itself, as they are read."""
  return params_lib.nest(dict(heldout.placement.apart(params_lib.flatten(jax.tree.map(jnp.copy, params)))))


def test_weights_are_held_once(model, cache, monkeypatch) -> None:
  """What lies as rows takes the place of what was read, but for who keeps that."""
  read = dataclasses.replace(model, params=apart(model.params))
  kernel, settings = read.params["layers_0"]["mlp"]["wo"]["kernel"], {"max_tokens": 50, "max_fills": 0}
  heldout.evaluate_model(read, cache, heldout.Settings(**settings))
  assert not kernel.is_deleted()
  monkeypatch.setattr(runner_lib, "read", lambda *unused, **options: read)
  heldout.evaluate("run", cache.directory, **settings)
  assert kernel.is_deleted()


def test_an_adapter_is_measured_with_its_model(model, cache, tmp_path, monkeypatch) -> None:
  """Factors of zero change no figure, others do."""
  config = dataclasses.replace(model.config, lora_rank=2, lora_kernels="attention/qkv", lora_scale=4.0)
  factors = {path: x.shape for path, x in params_lib.table(config).items() if path.endswith(("/lora_a", "/lora_b"))}

  def loaded(*unused: Any) -> load.LoadedModel:
    return dataclasses.replace(model, params=apart(model.params), metadata={"weights": "the model's"})

  monkeypatch.setattr(runner_lib.stream, "stream", loaded)

  def bits(scale: float) -> float:
    found = {path: scale * jax.random.normal(jax.random.key(0), shape) for path, shape in factors.items()}
    found = {path: np.asarray(x) for path, x in found.items()}
    made = adapter_lib.Adapter(tmp_path, config, found, {"fingerprint": "the model's"}, "the adapter's")
    monkeypatch.setattr(adapter_lib.Adapter, "read", lambda folder: made)
    return heldout.evaluate("model", cache.directory, max_fills=0, adapter="adapter")["en"]["bits_per_byte"]

  alone = heldout.evaluate("model", cache.directory, max_fills=0)["en"]["bits_per_byte"]
  assert bits(0.0) == pytest.approx(alone, abs=1e-6)
  assert abs(bits(1.0) - alone) > 1e-3


def test_a_cache_in_a_bucket_gives_the_same(model, cache, server, tmp_path, monkeypatch) -> None:
  monkeypatch.setenv(nearby.FOLDER, str(tmp_path))
  for path in cache.directory.rglob("*"):
    if path.is_file():
      server.put(f"cache/{path.relative_to(cache.directory)}", path.read_bytes())
  there = shards.TokenCache.open("gs://bucket/cache")
  assert heldout.evaluate_model(model, there) == heldout.evaluate_model(model, cache)


def test_how_far_it_is_is_told_in_lines_where_there_is_no_terminal(model, cache, capsys, caplog, monkeypatch) -> None:
  told = progress.Progress
  monkeypatch.setattr(progress, "Progress", lambda total, what, seconds: told(total, what, 0))
  with caplog.at_level("INFO", "glmjax"):
    heldout.evaluate_model(model, cache, heldout.Settings(max_tokens=200, max_fills=0))
  assert "tokens evaluated" in caplog.text and not capsys.readouterr().err


def test_guesses_are_text(model, cache, tokenizer, monkeypatch) -> None:
  """No special token, image id or row that pads the vocabulary: what the engine never generates, but for its stops."""
  seen, exact = [], scoring.score_rows

  def look(*arguments, unguessed, **more):
    seen.append({*unguessed})
    return exact(*arguments, unguessed=unguessed, **more)

  monkeypatch.setattr(heldout.scoring, "score_rows", look)
  heldout.evaluate_model(model, cache, heldout.Settings(max_tokens=200, max_fills=2))
  answering = engine.Engine(runner.Runner(model.config, model.params), tokenizer)
  assert seen == [{*np.flatnonzero(answering._vocabulary.suppressed_V | answering._vocabulary.stops_V).tolist()}]
  assert {*range(tokenizer.vocab_size, 640), *dataclasses.astuple(tokenizer.specials)} == seen[0]
  images = tokenizer_lib.Tokenizer(tokenizer.model, num_image_tokens=20)
  assert {*range(20)} <= vocabulary.not_text(images, 640) and 20 + 130 not in vocabulary.not_text(images, 640)


def test_windows_are_as_long_as_in_training(model, tokenizer) -> None:
  held_out = windows.HeldOut([np.arange(10, 300, dtype=np.int32)], b"", 1, None)

  def longest(infilling: dict, **settings) -> tuple[int, int]:
    trained = dataclasses.replace(model, metadata={"data": {"infilling": infilling}})
    asked = heldout.ask(held_out, trained, tokenizer.specials, heldout.Settings(**settings))
    return tuple(
      max(len(row.prompt.tokens) for row in rows)
      for rows in (asked.left_to_right, [fill.both_sides for fill in asked.fills])
    )

  assert longest({}) == (64, 15)  # the model's length and a quarter of it; eop is not asked for
  assert longest({"seq_length": 48, "samples_per_sequence": 2}) == (48, 23)
  assert longest({"seq_length": 48, "samples_per_sequence": 1}, seq_length=40) == (40, 39)


def test_uniform_model_needs_log2_vocabulary_for_every_token(model, cache) -> None:
  params = jax.tree.map(jnp.zeros_like, model.params)
  unrolled = dataclasses.replace(model.config, scan_layers=False)  # as some train; params are stacked on disk
  uniform = dataclasses.replace(model, config=unrolled, params=params)
  result = heldout.evaluate_model(uniform, cache, heldout.Settings(max_fills=0))
  for figures in result.values():
    np.testing.assert_allclose(figures["bits_per_token"], math.log2(640), rtol=1e-6)
    expected = math.log2(640) * figures["tokens"] / figures["bytes"]
    np.testing.assert_allclose(figures["bits_per_byte"], expected, rtol=1e-6)
    assert "infill_accuracy" not in figures


@pytest.mark.parametrize("positions", ["rotary", "learned_2d"])
def test_bits_are_those_of_each_window_alone(model, cache, tokenizer, positions: str) -> None:
  config = dataclasses.replace(model.config, positions=positions)
  params = model.params
  if positions == "learned_2d":
    tables = {
      name: 0.1 * jax.random.normal(jax.random.key(len(name)), (65, 32)) for name in ("position", "block_position")
    }
    params = params | {"embedding": params["embedding"] | tables}
  figures = heldout.evaluate_model(
    dataclasses.replace(model, config=config, params=params), cache, heldout.Settings(max_tokens=200, max_fills=0)
  )["en"]
  held_out = windows.choose_documents(
    cache.split("pretrain_en", "validation"), tokenizer.specials, tokenizer.decode_bytes, 200, 0
  )
  infilling = rows.BlankInfilling(64, tokenizer.specials, positions)  # as in training

  @jax.jit
  def log_probs(row: dict) -> jax.Array:
    features = (row[name][None] for name in ("tokens", "positions", "attend_start", "attend_end"))
    logits = glm.GLM(config).apply({"params": params}, *features)[0]
    return jax.nn.log_softmax(logits)[jnp.arange(64), row["targets"]]

  bits = 0.0
  for row in windows.left_to_right(held_out, 64, tokenizer.specials, positions_lib.KINDS[positions]):
    prefix = row.prompt.tokens[: row.prompt.context_length - 1]
    sample = spans.corrupt_suffix(
      np.array([*prefix, *row.targets]), len(prefix), tokenizer.specials.gmask, tokenizer.specials
    )
    alone = log_probs(infilling.pack([sample], tokens.OBJECTIVE_GMASK))
    bits -= float(alone[sample.context_length : len(sample.tokens)].sum()) / math.log(2)
  np.testing.assert_allclose(figures["bits_per_byte"] * figures["bytes"], bits, rtol=1e-5)


def test_no_token_sees_its_future(model, tokenizer) -> None:
  ids = np.arange(10, 100, dtype=np.int32)
  changed = np.where(np.arange(90) < 70, ids, ids + 200)
  bits = []
  for document in (ids, changed):
    held_out = windows.HeldOut([document], b"", 1, None)
    rows_asked = heldout.ask(held_out, model, tokenizer.specials, heldout.Settings(max_fills=0)).rows
    scores = scoring.score_rows(runner.Runner(model.config, model.params), rows_asked, tokenizer.specials.pad)
    bits.append(score.join(scores).log_probs)
  np.testing.assert_allclose(bits[0][:70], bits[1][:70], rtol=1e-5)
  assert np.abs(bits[0][70:] - bits[1][70:]).min() > 1e-6


def test_a_causal_model_is_asked_as_it_was_trained(model, tokenizer) -> None:
  """Every row begins with its one [gMASK], later windows too, and nothing that is right of a blank is shown."""
  causal = dataclasses.replace(model, config=dataclasses.replace(model.config, causal=True))
  held_out = windows.HeldOut([np.arange(10, 250, dtype=np.int32)], b"", 1, tokenizer.specials.eos)
  asked = heldout.ask(held_out, causal, tokenizer.specials, heldout.Settings(max_fills=8))
  glm_asked = heldout.ask(held_out, model, tokenizer.specials, heldout.Settings(max_fills=8))
  assert asked.fills and [row.targets for row in asked.rows] == [row.targets for row in glm_asked.rows]
  for row in asked.rows:
    first, sop, *text = row.prompt.tokens
    assert (first, sop) == (tokenizer.specials.gmask, tokenizer.specials.sop) and row.prompt.context_length == 1
    text = [*text, row.targets[-1]]
    text = text[1:] if text[0] == tokenizer.specials.eos else text
    assert text == list(range(text[0], text[0] + len(text)))
  assert all(fill.both_sides == fill.left_only for fill in asked.fills)


def test_a_model_that_knows_one_token_gets_the_unigram_accuracy(model, cache, tokenizer) -> None:
  frequent = heldout.baselines.count_unigrams(
    cache.split("pretrain_zh", "train"), tokenizer.vocab_size, tokenizer.specials.eos
  ).most_frequent
  params = jax.tree.map(jnp.zeros_like, model.params)
  params["final_norm"]["bias"] = jnp.ones_like(params["final_norm"]["bias"])
  params["embedding"]["table"] = params["embedding"]["table"].at[frequent].set(1.0)
  figures = heldout.evaluate_model(dataclasses.replace(model, params=params), cache)["zh"]
  assert figures["infill_accuracy"] == figures["infill_accuracy_left_only"] == figures["unigram_accuracy"] > 0
  assert figures["infill_gain"] == figures["infill_gain_se"] == 0


def test_standard_error_counts_samples() -> None:
  right, size = np.array([1, 0] * 50), np.ones(100)
  ratio, error = heldout.ratio_and_error(right, size)
  assert ratio == 0.5 and error == pytest.approx(0.05)
  _, clustered = heldout.ratio_and_error(4 * right, 4 * size)
  assert clustered == pytest.approx(0.05)


@pytest.mark.parametrize("bits,tolerance", [(8, 0.005), (4, 0.1)])
def test_quantized_models_are_evaluated_alike(model, cache, bits: int, tolerance: float) -> None:
  settings = heldout.Settings(max_tokens=200, max_fills=0)
  quantized = dataclasses.replace(model, params=weights.quantize(model.params, bits), bits=bits)
  expected, found = (heldout.evaluate_model(m, cache, settings)["en"] for m in (model, quantized))
  assert found["bytes"] == expected["bytes"] and found["bits_per_byte"] != expected["bits_per_byte"]
  assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=tolerance)


def test_result_is_written_whole(model, cache, tmp_path, monkeypatch) -> None:
  monkeypatch.setattr(runner, "read", lambda folder, place, adapter: model)
  out = tmp_path / "new" / "heldout.json"
  result = heldout.evaluate("run", cache.directory, out, max_tokens=50, max_fills=2)
  written = json.loads(out.read_text())
  assert written.pop("model") == {"weights": None, "glmjax": glmjax.__version__} and written == result
  assert [path.name for path in out.parent.iterdir()] == ["heldout.json"]


def test_result_in_a_bucket(model, cache, tmp_path, server, monkeypatch) -> None:
  monkeypatch.setattr(runner, "read", lambda folder, place, adapter: model)
  result = heldout.evaluate("run", cache.directory, "gs://bucket/x/heldout.json", max_tokens=50, max_fills=2)
  heldout.evaluate("run", cache.directory, tmp_path / "heldout.json", max_tokens=50, max_fills=2)
  assert server.keys() == ["x/heldout.json"] and json.loads(server.data("x/heldout.json")).items() >= result.items()
  assert server.data("x/heldout.json") == (tmp_path / "heldout.json").read_bytes()
  server.put("x/thesis.tex", b"mine")
  server.fault = lambda method, path: bucket_server.Fault(status=403) if method == "PUT" else None
  for name, message in (("thesis.tex", "holds other things"), ("other.json", "cannot be written: permission denied")):
    with pytest.raises(errors.InputError, match=message):
      heldout.evaluate("no checkpoint", cache.directory, f"gs://bucket/x/{name}")


def test_a_place_that_cannot_be_written_is_named_before_the_work(cache, tmp_path) -> None:
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.InputError, match="cannot be written"):
    heldout.evaluate("no checkpoint", cache.directory, tmp_path / "file" / "heldout.json")
  with pytest.raises(errors.InputError, match="is a folder; name a file"):
    heldout.evaluate("no checkpoint", cache.directory, tmp_path)
  for name, message in (
    (tmp_path / "thesis.tex", "holds other things than an evaluation"),
    (cache.directory / "manifest.json", "belongs to a token cache"),
  ):
    before = name.read_bytes() if name.exists() else name.write_bytes(b"\\section{}") and b"\\section{}"
    with pytest.raises(errors.InputError, match=message):
      heldout.evaluate("no checkpoint", cache.directory, name)
    assert name.read_bytes() == before


def test_another_tokenizer_is_refused(model, make_cache, tmp_path) -> None:
  texts = {"en": {"train": ["abc"], "validation": ["abc"]}}
  other = make_cache(tmp_path / "cache", texts, fingerprint="f" * 64)
  with pytest.raises(errors.InputError, match="made with tokenizer ffffffff"):
    heldout.evaluate_model(model, other)


@pytest.mark.parametrize(
  "splits,kind,message",
  [
    ({"train": ["abc"]}, "text", "no split 'validation'"),
    ({"train": ["abc"], "validation": []}, "text", "no text in its validation split"),
    ({"train": ["abc"], "validation": ["", ""]}, "text", "no text in its validation split"),
    ({"train": ["abc"], "validation": ["abc"]}, "instruction", "no text task"),
  ],
)
def test_nothing_to_evaluate_on_is_an_error(model, make_cache, tmp_path, splits, kind, message) -> None:
  empty = make_cache(tmp_path / "cache", {"en": splits}, kind=kind)
  with pytest.raises(errors.InputError, match=message):
    heldout.evaluate_model(model, empty)


def test_weights_that_are_not_numbers_are_an_error(model, cache) -> None:
  params = jax.tree.map(lambda x: x * jnp.nan, model.params)
  with pytest.raises(errors.InputError, match="logits are not finite"):
    heldout.evaluate_model(dataclasses.replace(model, params=params), cache, heldout.Settings(max_fills=0))


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"max_fills": -1}, {"seq_length": 4}])
def test_settings_out_of_range(wrong: dict) -> None:
  with pytest.raises(errors.InputError):
    heldout.Settings(**wrong)
