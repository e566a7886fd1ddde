"""A small model whose tokens are letters, for tests of the engine."""

import dataclasses
import functools

import jax

from glmjax import tokens
from glmjax.infer import engine
from glmjax.infer import runner
from glmjax.models import config as config_lib
from glmjax.models import glm

TEXT = "abcdefghijklmnopqrstuvwxyz []MASKg."


class Letters:
  """A letter a token, in the icetk layout with image ids before them."""

  num_image_tokens = 6
  specials = tokens.icetk(6, 4 + len(TEXT))
  vocab_size = specials.dblock + 1

  def __eq__(self, other: object) -> bool:
    return type(self) is type(other)

  def __hash__(self) -> int:
    return hash(type(self))

  def encode(self, text: str) -> list[int]:
    return [10 + TEXT.index(letter) for letter in text]

  def decode(self, ids: list[int]) -> str:
    return "".join(TEXT[i - 10] for i in ids if 0 <= i - 10 < len(TEXT))


@functools.cache
def model(positions: str = "rotary", vocab_size: int = 64) -> tuple[config_lib.GLMConfig, dict]:
  norm = "pre" if positions == "learned_2d" else "deepnorm"
  config = config_lib.GLMConfig(
    vocab_size=vocab_size,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=64,
    positions=positions,
    norm=norm,
    init_std=0.5,
    tie_embeddings=positions != "rotary_2d",
  )
  return config, glm.init_params(config, jax.random.key(3))


@functools.cache
def make(positions: str = "rotary", kv_cache_dtype: str | None = None, **kwargs) -> engine.Engine:
  config, params = model(positions)
  config = dataclasses.replace(config, kv_cache_dtype=kv_cache_dtype)
  return engine.Engine(runner.Runner(config, params), Letters(), **kwargs)
