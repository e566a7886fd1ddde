"""A model whose logits are not finite says so in one line, whatever it is asked; and so does a token that is no id."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax import positions as positions_lib
from glmjax import tokens
from glmjax.cli import chat as chat_command
from glmjax.infer import beam
from glmjax.infer import chat
from glmjax.infer import decode
from glmjax.infer import engine
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import runner
from glmjax.infer import sampling
from glmjax.infer import score
from glmjax.models import config as config_lib
from glmjax.models import glm

MESSAGE = "the model's logits are not finite: its training diverged"


class Letters:
  """A letter a token."""

  num_image_tokens = 6
  specials = tokens.icetk(6, 40)
  vocab_size = specials.dblock + 1

  def encode(self, text: str) -> list[int]:
    return [10 + ord(letter) % 26 for letter in text]

  def decode(self, ids: list[int]) -> str:
    return "".join(chr(ord("a") + i % 26) for i in ids)

  def decode_bytes(self, ids: list[int]) -> bytes:
    return self.decode(ids).encode()


def model() -> tuple[config_lib.GLMConfig, dict]:
  config = config_lib.GLMConfig(vocab_size=64, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, max_length=64)
  return config, glm.init_params(config, jax.random.key(3))


def broken(value: float, where: str = "mlp") -> engine.Engine:
  config, params = model()
  name = jax.tree_util.keystr

  def flags(path, x):
    return x * value if where in name(path) and "kernel" in name(path) else x

  return engine.Engine(runner.Runner(config, jax.tree_util.tree_map_with_path(flags, params)), Letters())


@pytest.fixture(scope="module", params=[np.nan, np.inf, 1e38])
def sick(request) -> engine.Engine:
  """Of weights that are not finite, and of some so large that their products are not."""
  return broken(request.param)


def test_generate(sick):
  for how in (sampling.Sampling(), sampling.Sampling(temperature=1.0, top_k=5)):
    with pytest.raises(errors.NotFiniteError, match=MESSAGE):
      sick.generate(["ab[MASK]cd.", "hello"], max_tokens=4, sampling=how)


def test_score(sick):
  with pytest.raises(errors.NotFiniteError, match=MESSAGE):
    sick.score(["hello"])


def test_stream_and_chat(sick, capsys):
  with pytest.raises(errors.NotFiniteError, match=MESSAGE):
    list(sick.stream(sick.encode("hello"), 4))
  session = chat.Session(sick, max_length=32)
  with pytest.raises(errors.NotFiniteError, match=MESSAGE):  # a question that is wrong is passed over, not this
    chat_command.converse(session, iter(["x" * 100, "hello", "again"]), contextlib.nullcontext)
  assert "shorten the prompt" in capsys.readouterr().err and not session.rounds


def test_beam_search(sick):
  prompt = prompt_lib.fill(sick.encode("ab[MASK]cd."), Letters.specials, positions_lib.ROTARY)
  ids = beam.Ids([Letters.specials.eop], Letters.specials.pad)
  with pytest.raises(errors.NotFiniteError, match=MESSAGE):
    beam.search(sick.runner, [prompt], 4, beam.BeamSearch(num_beams=2), ids)


def test_rows_that_only_fill_a_batch_do_not_count():
  """Nor logits behind a row's end."""
  config, params = model()
  good = engine.Engine(runner.Runner(config, params), Letters())
  assert len(good.generate(["ab", "cd", "ef"], max_tokens=3)) == 3
  none = jnp.zeros(4, jnp.int32)
  finite_B = jnp.array([True, True, True, False])
  state = decode.State(
    {}, none, none, none, jnp.zeros((4, 1), jnp.int32), jnp.ones(4, bool), finite_B, jnp.zeros((4, 8))
  )
  decode.generated(state, 3)
  with pytest.raises(errors.NotFiniteError):
    decode.generated(state, 4)


@pytest.mark.parametrize("token", [-1, 64, 2**31 - 1])
def test_tokens_that_are_no_ids(token):
  config, params = model()
  good = engine.Engine(runner.Runner(config, params), Letters())
  message = f"token {token} is no id of the model's, which has 64"
  with pytest.raises(errors.InputError, match=message):
    good.fill_rows([[20, token, Letters.specials.mask]], 4, [sampling.Sampling()], [0])
  with pytest.raises(errors.InputError, match=message):
    list(good.stream([20, token, Letters.specials.mask], 4))
  prompt = prompt_lib.fill([20, 21, Letters.specials.gmask], Letters.specials, config.position_kind)
  row = score.Row(prompt, [token])
  with pytest.raises(errors.InputError, match=message):
    good.score_rows([row])
  with pytest.raises(errors.InputError, match=message):
    good.score_rows(
      [dataclasses.replace(row, prompt=dataclasses.replace(prompt, tokens=[*prompt.tokens[:-1], token]), targets=[20])]
    )
