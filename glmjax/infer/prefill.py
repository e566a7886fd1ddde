"""Reading a prompt layer by layer, a few at a time, so that others may decode in between.

All tokens pass one layer before any passes the next: a prompt that is seen from both sides cannot be cut along its
length, as its first tokens depend on its last. Layers are alike, so that one program is compiled for all of them:
tracing and compiling them together takes as often as long as there are layers.

B batch, P prompt slots, D width.
"""

import functools
from typing import Any

import jax

from glmjax.infer import decode
from glmjax.infer import offload
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import rows as rows_lib
from glmjax.infer import runner as runner_lib
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import kv_cache
from glmjax.models import lowrank
from glmjax.models import params as params_lib
from glmjax.parallel import partitioning

TOKENS = 64  # that go through all layers at a time: the work between two runs of who decodes


class Prefill:
  """A prompt that is being read, all but its last token."""

  def __init__(self, runner: runner_lib.Runner, prompt: prompt_lib.Prompt, pad: int, new_tokens: int) -> None:
    """Begins with the embedding.

    Args:
      runner: the model.
      prompt: what is read.
      pad: the id that fills its row up.
      new_tokens: for how many tokens the state will have room.
    """
    self._runner, self._new_tokens = runner, new_tokens
    prompts, rows = decode.make_rows([prompt], [1], pad, runner.batch_size(1))
    self._prompts, self._rows = runner.on_devices((prompts, rows))
    self._x = runner.run(embed, self._prompts)
    self._cache: dict[str, kv_cache.KVCache] = {}
    slots, layers = prompts.tokens.shape[1], runner.config.num_layers
    self._at_once = layers_at_once(layers, slots)
    self.step = -(-slots * self._at_once // layers)  # what `advance` takes: so many tokens through all layers

  @property
  def done(self) -> bool:
    """Whether all layers have read it."""
    return len(self._cache) == self._runner.config.num_layers

  def advance(self) -> None:
    """Reads on, through the next layers."""
    first = len(self._cache)
    for i in range(first, first + self._at_once):
      self._x, self._cache[f"layers_{i}"] = self._runner.layer(i).run(through, self._x, self._prompts)

  def state(self) -> decode.State:
    """Returns what was read as the state that decoding goes on from."""
    return self._runner.run(decode.begin, self._cache, self._rows, new_tokens=self._new_tokens)


def layers_at_once(num_layers: int, tokens: int) -> int:
  """Returns how many layers a prompt of so many tokens goes through between two rounds: a divisor of all."""
  most = max(1, num_layers * TOKENS // tokens)
  return max(n for n in range(1, num_layers + 1) if num_layers % n == 0 and n <= most)


@functools.partial(jax.jit, static_argnames=("config",))
def embed(config: config_lib.GLMConfig, params: Any, prompts: rows_lib.Batch) -> jax.Array:
  """Returns what the first layer reads, [B, P, D]."""
  positions = config.position_kind.of_model(prompts.positions)
  return glm.GLM(config).apply({"params": offload.fetch(params)}, prompts.tokens, positions, method="embed")[0]


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("x_BPD",))
def through(
  config: config_lib.GLMConfig, params: Any, x_BPD: jax.Array, prompts: rows_lib.Batch
) -> tuple[jax.Array, kv_cache.KVCache]:
  """Returns what the one layer of a model gives, and its cache."""
  x_BPD, cache = glm.GLM(config).apply(
    {"params": lowrank.for_rows(offload.fetch(params), prompts.adapter)},
    x_BPD,
    config.position_kind.of_model(prompts.positions),
    prompts.start,
    prompts.end,
    cache=kv_cache.empty(partitioning.target(), config, len(x_BPD), 0),
    method="through",
  )
  return x_BPD, cache[f"{params_lib.LAYERS}_0"].constrain()
