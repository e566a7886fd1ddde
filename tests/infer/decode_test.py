"""Decoding with a cache against one pass over the whole row; limits, stops, streaming."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import positions as positions_lib
from glmjax import tokens
from glmjax.infer import decode
from glmjax.infer import prompt
from glmjax.infer import sampling
from glmjax.models import config as config_lib
from glmjax.models import glm

SPECIALS = tokens.icetk(0, 80)
VOCAB = 96
FAMILIES = {
  "rotary": dict(mlp="geglu"),
  "rotary_2d": dict(mlp="gelu_tanh", tie_embeddings=False),
  "learned_2d": dict(mlp="gelu_tanh", norm="pre", init_std=0.3),
}


def model(positions: str, **changes) -> tuple[config_lib.GLMConfig, dict]:
  config = config_lib.GLMConfig(
    **(
      dict(vocab_size=VOCAB, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=128, positions=positions)
      | FAMILIES[positions]
      | changes
    )
  )
  return config, glm.init_params(dataclasses.replace(config, scan_layers=True), jax.random.key(1))


def prompts(positions: str) -> list[prompt.Prompt]:
  rng = np.random.default_rng(0)

  def text(n):
    return rng.integers(4, 80, n).tolist()

  mask, gmask = SPECIALS.mask, SPECIALS.gmask
  texts = [text(3) + [mask] + text(9), [gmask], text(40) + [gmask], [mask] + text(2)]
  out = [prompt.fill(t, SPECIALS, positions_lib.KINDS[positions]) for t in texts]
  return out + [prompt.extend(out[1], text(7))]


def full_logits(config: config_lib.GLMConfig, params: dict, some: list[prompt.Prompt], new: np.ndarray) -> list:
  """Logits of whole rows at once, without cache or left padding, from each prompt's last token on."""
  whole = [prompt.extend(p, row.tolist()) for p, row in zip(some, new)]
  length = max(len(p.tokens) for p in whole)
  tokens, positions = np.zeros((len(whole), length), int), np.zeros((len(whole), 2, length), int)
  end = np.tile(np.arange(1, length + 1), (len(whole), 1))
  for row, p in enumerate(whole):
    n = len(p.tokens)
    tokens[row, :n], positions[row, :, :n] = p.tokens, p.positions
    end[row] = np.maximum(end[row], p.context_length)
  forward = jax.jit(glm.GLM(config).apply)
  logits = np.asarray(
    forward(
      {"params": params},
      *(
        jnp.array(x, jnp.int32) for x in (tokens, config.position_kind.of_model(positions), np.zeros_like(tokens), end)
      ),
    )
  )
  return [row[len(p.tokens) - 1 : len(w.tokens)] for row, p, w in zip(logits, some, whole)]


def run(
  config: config_lib.GLMConfig,
  params: dict,
  some: list[prompt.Prompt],
  steps: int,
  until: int | None = None,
  requests: list | None = None,
  seeds: list | None = None,
  **kwargs,
) -> tuple[decode.Rows, decode.State]:
  batch_of_prompts, rows = decode.make_rows(some, [steps] * len(some), SPECIALS.pad, **kwargs)
  batch = len(rows.limit_B)
  fill = batch - len(some)
  draws = sampling.draws(
    (requests or [sampling.Sampling()] * len(some)) + [sampling.Sampling()] * fill,
    (seeds or [0] * len(some)) + [0] * fill,
  )
  none = jnp.zeros(VOCAB, bool)
  state = decode.prefill(config, params, batch_of_prompts, rows, 16)
  if until is not None:
    for _ in range(0, steps, until):
      state = decode.decode(config, params, rows, state, draws, none, none, jnp.int32(until))
  return rows, decode.decode(config, params, rows, state, draws, none, none, jnp.int32(steps))


@pytest.mark.parametrize(
  "positions, scan, prefix",
  [
    ("rotary", True, 0),
    ("rotary_2d", True, 5),
    ("rotary_2d", False, 5),
    *((positions, False, 0) for positions in FAMILIES),
  ],
)
def test_cached_decode_is_the_full_forward(positions: str, scan: bool, prefix: int):
  """A padded batch of unlike prompts: every step's logits as from one pass over the row alone."""
  config, params = model(positions, scan_layers=scan, prefix_length=prefix)
  got, expected = cached_and_full(config, params if scan else glm.unstack_layers(params))
  for row, whole in enumerate(expected):
    np.testing.assert_allclose(got[:, row], whole, atol=2e-4)


@pytest.mark.parametrize("positions", FAMILIES)
def test_decode_with_a_cache_of_int8_is_near_the_full_forward(positions: str):
  got, expected = cached_and_full(*model(positions, kv_cache_dtype="int8"))
  for row, whole in enumerate(expected):
    off = np.abs(got[:, row] - whole).max() / whole.std()
    assert 1e-5 < off < 0.1


def cached_and_full(config: config_lib.GLMConfig, params: dict) -> tuple[np.ndarray, list[np.ndarray]]:
  """Logits of six steps [6, B, V], with a cache and from one pass over each row alone."""
  some = prompts(config.positions)
  batch, rows = decode.make_rows(some, [6] * len(some), SPECIALS.pad)
  state = decode.prefill(config, params, batch, rows, 8)
  new = np.random.default_rng(1).integers(4, 80, (len(rows.limit_B), 6)).astype(np.int32)
  step = jax.jit(decode.next_logits, static_argnums=0)
  got = []
  for i in range(6):
    logits, cache = step(config, params, rows, state)
    got.append(np.asarray(logits))
    state = dataclasses.replace(
      state, cache=cache, length_B=state.length_B + 1, step_B=state.step_B + 1, last_B=jnp.array(new[:, i])
    )
  return np.stack(got), full_logits(config, params, some, new[:, :5])


@pytest.mark.parametrize("positions, prefix", [*((positions, 0) for positions in FAMILIES), ("rotary_2d", 5)])
def test_batch_is_the_same_as_one_by_one(positions: str, prefix: int):
  config, params = model(positions, prefix_length=prefix)
  some = prompts(positions)
  # All filter, so that the rows alone share one program.
  requests = [
    sampling.Sampling(temperature=t, top_p=p) for t, p in ((1, 0.5), (0.8, 0.9), (2, 0.99), (1.2, 0.8), (1, 0.1))
  ]
  seeds = [0, 1, 2, 3, 4]
  together = decode.generated(run(config, params, some, 10, requests=requests, seeds=seeds)[1], len(some))
  for i, p in enumerate(some):
    alone = decode.generated(run(config, params, [p], 10, requests=[requests[i]], seeds=[seeds[i]], slots=48)[1], 1)[0]
    assert alone == together[i] and len(alone) == 10


def test_running_in_pieces_is_the_same_and_compiles_once():
  config, params = model("rotary", num_layers=1)
  some = prompts("rotary")[:3]
  decode.prefill.clear_cache()
  decode.decode.clear_cache()
  whole = decode.generated(run(config, params, some, 9)[1], 3)
  assert decode.generated(run(config, params, some, 9, until=2)[1], 3) == whole
  assert decode.generated(run(config, params, some[::-1], 7)[1], 3) == [row[:7] for row in whole[::-1]]
  assert decode.prefill._cache_size() == decode.decode._cache_size() == 1


def test_stops_limits_and_filling_rows():
  config, params = model("rotary")
  some = prompts("rotary")[:3]
  free = decode.generated(run(config, params, some, 10)[1], 3)
  stop = free[1][4]
  batch, rows = decode.make_rows(some, [10, 10, 3], SPECIALS.pad, batch=4)
  draws = sampling.draws([sampling.Sampling()] * 4, [0] * 4)
  stops = jnp.zeros(VOCAB, bool).at[stop].set(True)
  state = decode.decode(
    config,
    params,
    rows,
    decode.prefill(config, params, batch, rows, 16),
    draws,
    jnp.zeros(VOCAB, bool),
    stops,
    jnp.int32(16),
  )

  def cut(row, most):
    return row[: min(row.index(stop) + 1 if stop in row else len(row), most)]

  assert decode.generated(state, 4) == [cut(free[0], 10), cut(free[1], 10), cut(free[2], 3), []]
  assert int(state.step_B.max()) <= 10 and bool(state.done_B.all())
  suppressed = decode.decode(
    config, params, rows, decode.prefill(config, params, batch, rows, 16), draws, stops, stops, jnp.int32(10)
  )
  assert stop not in sum(decode.generated(suppressed, 4), [])


@pytest.mark.parametrize("dtype, kv_cache_dtype", [("float32", None), ("bfloat16", None), ("bfloat16", "int8")])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_copies_no_cache(batch: int, dtype: str, kv_cache_dtype: str | None):
  config, params = model("rotary", dtype=dtype, kv_cache_dtype=kv_cache_dtype, scan_layers=False)
  params = glm.unstack_layers(params)
  batch_of_prompts, rows = decode.make_rows(prompts("rotary")[:batch], [16] * batch, SPECIALS.pad, batch)
  draws = sampling.draws([sampling.Sampling()] * batch, [0] * batch)
  none = jnp.zeros(VOCAB, bool)
  state = decode.prefill(config, params, batch_of_prompts, rows, 16)
  cache = jax.tree.leaves(state.cache)[0].shape
  text = decode.decode.lower(config, params, rows, state, draws, none, none, jnp.int32(16)).compile().as_text()
  copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", text)
  assert " while(" in text
  assert not [shape for shape in copied if shape.split(",")[-3:] == [*map(str, cache[-3:])]], copied
