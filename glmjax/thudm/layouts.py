"""What THUDM's files call each parameter, and how their matrices and ours are the same numbers.

Their linears are [outputs, inputs]; ours have the inputs first and both sides unfolded into heads, branches
and the like. The outputs are therefore described by factors: query_key_value of GLM-130B and ChatGLM-6B is
heads x (q, k, v) x head dimension (the view that the original takes of it), that of GLM (q, k, v) x heads x
head dimension. Tensor-parallel ranks hold equal parts of the outputs (`split` "rows": of each of `groups`
stretches of them, so that a rank has its share of both GeGLU halves) or of the inputs ("inputs").
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
from typing import Literal

import numpy as np

from glmjax.models import config as config_lib
from glmjax.models import params as params_lib

FAMILIES = ("glm-130b", "glm-10b", "chatglm-6b")
DEGREES = (1, 2, 4, 8, 16)  # of tensor parallelism
KNOWN_DEGREES = f"{', '.join(map(str, DEGREES[:-1]))} and {DEGREES[-1]}"
INV_FREQ = "transformer.layers.{}.attention.rotary_emb.inv_freq"
_TILE = 16  # rows that are transposed together: faster than numpy's own way for wide matrices


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter in both layouts."""

  key: str  # theirs; {} stands for the layer
  name: str  # ours
  rows: tuple[int, ...]  # factors of their first axis
  inputs: tuple[int, ...] = ()  # factors of their second axis
  order: tuple[int, ...] = ()  # our order of the factors of the rows, where it is not theirs
  split: Literal["none", "rows", "inputs"] = "none"  # what tensor-parallel ranks divide
  groups: int = 1
  inputs_first: bool = True  # False: tables, as they are

  @property
  def stacked(self) -> bool:
    """Whether there is one for each layer."""
    return "{}" in self.key

  @property
  def kernel(self) -> bool:
    """Whether quantized files hold codes for it."""
    return params_lib.known(self.name).quantizes

  def keys(self, num_layers: int) -> list[str]:
    """Returns their keys, layer by layer."""
    return [self.key.format(i) for i in range(num_layers)] if self.stacked else [self.key]

  def their_shape(self, bits: int | None = None) -> tuple[int, ...]:
    """Returns the shape of the merged matrix or vector; INT4 codes are packed in pairs along the inputs."""
    if not self.inputs:
      return (math.prod(self.rows),)
    return math.prod(self.rows), math.prod(self.inputs) // (2 if self.kernel and bits == 4 else 1)

  def our_rows(self, rows: Sequence[int] | None = None) -> tuple[int, ...]:
    """Returns the factors of the rows in our order."""
    rows = self.rows if rows is None else rows
    return tuple(rows[i] for i in self.order or range(len(rows)))

  def our_shape(self) -> tuple[int, ...]:
    """Returns the shape of our array, of one layer."""
    return (*self.inputs, *self.our_rows()) if self.inputs_first else (*self.our_rows(), *self.inputs)

  def factor_slices(self, region: Sequence[slice]) -> list[slice]:
    """Returns what a region of our array (one layer's) takes of each factor of the rows, in their order."""
    ours = region[len(self.inputs) :] if self.inputs_first else region[: len(self.rows)]
    order = list(self.order or range(len(self.rows)))
    return [ours[order.index(i)] for i in range(len(self.rows))]

  def ranges(self, factors: Sequence[slice]) -> Iterator[tuple[int, int]]:
    """Yields the stretches of their rows that these slices of the factors are; one factor at most is cut."""
    cut = next((i for i, (s, n) in enumerate(zip(factors, self.rows)) if s.stop - s.start < n), 0)
    inner, size = math.prod(self.rows[cut + 1 :]), self.rows[cut]
    for outer in range(math.prod(self.rows[:cut])):
      yield (outer * size + factors[cut].start) * inner, (outer * size + factors[cut].stop) * inner

  def to_ours(self, block: np.ndarray, factors: Sequence[slice]) -> np.ndarray:
    """Turns rows of their matrix (or vector) into a block of our array; `factors` say which rows they are."""
    rows = [s.stop - s.start for s in factors]
    if self.order:
      block = block.reshape(*rows, -1).transpose(*self.order, len(rows)).reshape(block.shape)
    if not self.inputs:
      return block.reshape(self.our_rows(rows))
    inputs = (*self.inputs[:-1], block.shape[1] // math.prod(self.inputs[:-1]))  # half as many when packed
    if not self.inputs_first:
      return block.reshape(*self.our_rows(rows), *inputs)
    return transpose(block).reshape(*inputs, *self.our_rows(rows))

  def to_theirs(self, ours: np.ndarray) -> np.ndarray:
    """Turns our array, one layer's, into their matrix or vector."""
    if not self.inputs:
      block = ours.reshape(math.prod(self.rows))
    elif self.inputs_first:
      block = transpose(ours.reshape(-1, math.prod(self.rows)))
    else:
      block = ours.reshape(math.prod(self.rows), -1)
    if self.order:
      back = np.argsort(self.order)
      block = block.reshape(*self.our_rows(), -1).transpose(*back, len(self.rows)).reshape(block.shape)
    return block


def transpose(x: np.ndarray) -> np.ndarray:
  """Returns x.T, in memory of its own."""
  out = np.empty(x.shape[::-1], x.dtype)
  for i in range(0, x.shape[0], _TILE):
    out[:, i : i + _TILE] = x[i : i + _TILE].T
  return out


def entries(family: str, config: config_lib.GLMConfig) -> list[Entry]:
  """Returns all parameters of a model, in the order of the original's state dict."""
  at, make = "transformer.layers.{}.", functools.partial(_entry, config)
  qkv = {"split": "rows", "groups": 3} if family == "glm-10b" else {"split": "rows", "order": (1, 0, 2)}
  wi = {"split": "rows", "groups": config.mlp_branches}
  table = "word_embeddings.weight" if family == "glm-10b" else "transformer.word_embeddings.weight"
  found = [make(table, "embedding/table", split="rows")]
  if family == "glm-10b":
    found += [make(f"transformer.{x}_embeddings.weight", f"embedding/{x}") for x in ("position", "block_position")]
  found += [
    *_norm(config, at + "input_layernorm", "layers/attention_norm"),
    make(at + "attention.query_key_value.weight", "layers/attention/qkv/kernel", **qkv),
    make(at + "attention.query_key_value.bias", "layers/attention/qkv/bias", **qkv),
    make(at + "attention.dense.weight", "layers/attention/out/kernel", split="inputs"),
    make(at + "attention.dense.bias", "layers/attention/out/bias"),
    *_norm(config, at + "post_attention_layernorm", "layers/mlp_norm"),
    make(at + "mlp.dense_h_to_4h.weight", "layers/mlp/wi/kernel", **wi),
    make(at + "mlp.dense_h_to_4h.bias", "layers/mlp/wi/bias", **wi),
    make(at + "mlp.dense_4h_to_h.weight", "layers/mlp/wo/kernel", split="inputs"),
    make(at + "mlp.dense_4h_to_h.bias", "layers/mlp/wo/bias"),
    *_norm(config, "transformer.final_layernorm", "final_norm"),
  ]
  if not config.tie_embeddings:
    found.append(make("lm_head.weight", "head/kernel", split="rows"))
  return found


KERNELS = {
  "attention/qkv": "attention.query_key_value",
  "attention/out": "attention.dense",
  "mlp/wi": "mlp.dense_h_to_4h",
  "mlp/wo": "mlp.dense_4h_to_h",
}


def adapters(family: str, config: config_lib.GLMConfig) -> list[Entry]:
  """Returns the factors beside a model's kernels, as PEFT names them for the original's code."""
  found = []
  for path in config.adapted:
    key, name = f"transformer.layers.{{}}.{KERNELS[path]}.", f"{params_lib.LAYERS}/{path}/"
    order = (1, 0, 2) if path == "attention/qkv" and family != "glm-10b" else ()
    found += [
      _entry(config, f"{key}lora_A.weight", f"{name}lora_a"),
      _entry(config, f"{key}lora_B.weight", f"{name}lora_b", order),
    ]
  return found


def _entry(
  config: config_lib.GLMConfig,
  key: str,
  name: str,
  order: tuple[int, ...] = (),
  split: Literal["none", "rows", "inputs"] = "none",
  groups: int = 1,
) -> Entry:
  """Returns the entry of a parameter of the table, under their key."""
  in_layer = name.removeprefix(f"{params_lib.LAYERS}/")
  param = params_lib.table(config)[name] if in_layer == name else params_lib.layer(config)[in_layer]
  if param.part == "embedding":
    return Entry(key, name, param.shape[:1], param.shape[1:], split=split, inputs_first=False)
  outputs = [size for axis, size in enumerate(param.shape) if axis not in param.inputs]
  rows = tuple(outputs[order.index(i)] for i in range(len(outputs))) if order else tuple(outputs)
  return Entry(key, name, rows, tuple(param.shape[axis] for axis in param.inputs), order, split, groups)


def _norm(config: config_lib.GLMConfig, key: str, name: str) -> list[Entry]:
  return [_entry(config, f"{key}.weight", f"{name}/scale"), _entry(config, f"{key}.bias", f"{name}/bias")]


def inv_freq(config: config_lib.GLMConfig) -> np.ndarray:
  """Returns the rotary frequencies that every layer's files repeat; ChatGLM-6B's are of half a head."""
  size = config.head_dim // max(1, config.position_kind.rotary_parts)
  exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
  return (np.float32(1.0) / np.float32(config.rotary_base) ** exponents).astype(np.float16)
