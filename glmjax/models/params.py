"""The parameter table: every fact about every parameter of a model, in one place.

| path (stacked: layers have a leading axis N) | shape | in |
|---|---|---|
| embedding/table | [V, D] | all |
| embedding/position, embedding/block_position | [max_length + 1, D] | learned_2d |
| embedding_norm/{scale,bias} | [D] | embedding_norm |
| layers/attention_norm/{scale,bias}, layers/mlp_norm/{scale,bias} | [N, D] | all |
| layers/attention_output_norm/..., layers/mlp_output_norm/... | [N, D] | sandwich |
| layers/attention/qkv/{kernel,bias} | [N, D, 3, H, K], [N, 3, H, K] | all |
| layers/attention/{prefix_key,prefix_value} | [N, H, P, K] | prefix_length, without prefix_hidden |
| prefix_encoder/{table,hidden_kernel,hidden_bias} | [P, D], [D, E], [E] | prefix_hidden |
| prefix_encoder/{out_kernel,out_bias} | [E, N, 2, H, K], [N, 2, H, K] | prefix_hidden |
| layers/<kernel>/lora_a, layers/<kernel>/lora_b | [N, inputs, R], [N, R, outputs] of the kernel | lora_kernels |
| layers/attention/out/{kernel,bias} | [N, H, K, D], [N, D] | all |
| layers/mlp/wi/{kernel,bias} | [N, D, T, F], [N, T, F] | all |
| layers/mlp/wo/{kernel,bias} | [N, F, D], [N, D] | all |
| final_norm/{scale,bias} | [D] | all |
| head/kernel | [D, V] | untied models |

D model, H heads, K head dimension, F mlp, V vocabulary, P prefix, E hidden in front of it, R rank, T branches of the
mlp (2 for GeGLU).
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import math
from typing import Any

from glmjax import errors
from glmjax.models import config as config_lib

PARTS = ("embedding", "attention", "mlp", "norms", "head")
LAYERS = "layers"  # path of the stacked layers; apart they are layers_0, layers_1, ...
# A model, of no use, that has every parameter there is.
_ALL = config_lib.GLMConfig(
  8,
  1,
  8,
  2,
  8,
  positions="learned_2d",
  norm="sandwich",
  tie_embeddings=False,
  embedding_norm=True,
  prefix_length=1,
  lora_rank=1,
  lora_kernels=",".join(config_lib.KERNELS),
)


@dataclasses.dataclass(frozen=True)
class Param:
  """What is true of one parameter; of a layer's, for one layer, without the leading axis.

  Axes are counted from the front. A kernel's input axes are those that a product sums over.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]  # logical names (parallel/partitioning.py)
  part: str  # one of PARTS: under whose gradient norm it is counted
  init: str = "normal"  # normal, zeros or ones
  std: float = 0.0  # of normal
  gains: tuple[float, ...] = ()  # factors of std, one for each index of the axis `gains_axis`
  gains_axis: int = 0
  inputs: tuple[int, ...] = ()  # of kernels
  decays: bool = True  # whether weight decay applies: to all but biases and norms; embeddings decay too, as in Megatron
  quantizes: bool = False  # the four kernels of a block
  cut: int | None = None  # the axis along which it is written and quantized block by block; None: whole

  @property
  def size(self) -> int:
    """The number of elements."""
    return math.prod(self.shape)

  @property
  def is_weight(self) -> bool:
    """Whether a step reads it in the compute dtype: kernels, embeddings, adapters; biases and norms are float32."""
    return self.decays

  @property
  def is_matrix(self) -> bool:
    """Whether inference keeps it in the compute dtype: all but norms and biases of one axis, in each layer."""
    return len(self.shape) - (self.axes[0] == LAYERS) > 1

  @property
  def inputs_from_end(self) -> tuple[int, ...]:
    """The input axes counted from the end: the same for a layer and for all of them stacked."""
    return tuple(axis - len(self.shape) for axis in self.inputs)

  @property
  def matrix(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Input and output axes of a kernel, those aside that only tell matrices apart; None of other parameters."""
    if not self.inputs:
      return None
    apart = (LAYERS, "qkv", "branches")
    rest = [i for i in range(len(self.shape)) if i not in self.inputs and self.axes[i] not in apart]
    return self.inputs, tuple(rest)


Predicate = Callable[[str, Param], bool]  # of a parameter by its path, and what the table says of it


@functools.lru_cache(maxsize=64)
def layer(config: config_lib.GLMConfig) -> Mapping[str, Param]:
  """Returns the parameters of one block by their paths in it, in the order of the computation and of the original's
  files.
  """
  d, h, k, f = config.embed_dim, config.num_heads, config.head_dim, config.mlp_dim
  deepnorm = config.norm == "deepnorm"
  qkv_std = xavier_std(d, d) if deepnorm else config.init_std
  gains = (1.0, 1.0, config.beta) if deepnorm else ()  # beta on values only: not on the last third of the heads
  wi_std = xavier_std(d, f, config.beta) if deepnorm else config.init_std
  found = dict(_norm("attention_norm", config))
  found |= _kernel("attention/qkv", (d, 3, h, k), ("embed", "qkv", "heads", "kv"), 1, qkv_std, cut=2, gains=gains)
  if config.prefix_length and not config.prefix_hidden:  # normal(1): as the original's torch.nn.Embedding starts
    for name in ("prefix_key", "prefix_value"):
      found[f"attention/{name}"] = Param((h, config.prefix_length, k), ("heads", "prefix", "kv"), "attention", std=1.0)
  found |= _kernel("attention/out", (h, k, d), ("heads", "kv", "embed"), 2, _output_std(config, d), cut=2)
  if config.norm == "sandwich":
    found |= _norm("attention_output_norm", config)
  found |= _norm("mlp_norm", config)
  found |= _kernel("mlp/wi", (d, config.mlp_branches, f), ("embed", "branches", "mlp"), 1, wi_std, cut=2)
  found |= _kernel("mlp/wo", (f, d), ("mlp", "embed"), 1, _output_std(config, f), cut=1)
  if config.norm == "sandwich":
    found |= _norm("mlp_output_norm", config)
  for path in config.adapted:
    found |= _adapter(path, found[f"{path}/kernel"], config.lora_rank)
  return found


@functools.lru_cache(maxsize=64)
def table(config: config_lib.GLMConfig) -> Mapping[str, Param]:
  """Returns all parameters of a model by their paths, its layers stacked, in the order of the original's files."""
  d, v = config.embed_dim, config.vocab_size
  deepnorm = config.norm == "deepnorm"
  std = xavier_std(v, d) if deepnorm else config.init_std
  found = {"embedding/table": Param((v, d), ("vocab", "embed"), "embedding", std=std, cut=0)}
  if not config.position_kind.rotary_parts:
    for name in ("position", "block_position"):
      found[f"embedding/{name}"] = Param(
        (config.max_length + 1, d), ("length_table", "embed"), "embedding", std=config.init_std
      )
  if config.embedding_norm:
    found |= _norm("embedding_norm", config)
  found |= {f"prefix_encoder/{name}": param for name, param in prefix_encoder(config).items()}
  found |= {f"{LAYERS}/{path}": _stacked(param, config.num_layers) for path, param in layer(config).items()}
  found |= _norm("final_norm", config)
  if not config.tie_embeddings:
    found["head/kernel"] = Param((d, v), ("embed", "vocab"), "head", std=xavier_std(d, v), inputs=(0,), cut=1)
  return found


def prefix_encoder(config: config_lib.GLMConfig) -> dict[str, Param]:
  """Returns the parameters of the perceptron that makes prefixes (models/prefix.py), spread as torch's layers begin."""
  if not config.prefix_hidden:
    return {}
  d, e, outputs = config.embed_dim, config.prefix_hidden, (config.num_layers, 2, config.num_heads, config.head_dim)
  axes = ("prefix_layers", "qkv", "heads", "kv")
  make = functools.partial(Param, part="attention")
  return {
    "table": make((config.prefix_length, d), ("prefix", "embed"), std=1.0),
    "hidden_kernel": make((d, e), ("embed", "prefix_hidden"), std=(3 * d) ** -0.5, inputs=(0,)),
    "hidden_bias": make((e,), ("prefix_hidden",), init="zeros", decays=False),
    "out_kernel": make((e, *outputs), ("prefix_hidden", *axes), std=(3 * e) ** -0.5, inputs=(0,)),
    "out_bias": make(outputs, axes, init="zeros", decays=False),
  }


def sizes(config: config_lib.GLMConfig) -> dict[str, int]:
  """Returns the size of every logical axis that the model's parameters have."""
  return {axis: size for param in table(config).values() for axis, size in zip(param.axes, param.shape)}


@functools.lru_cache(maxsize=1024)
def known(path: str) -> Param:
  """Returns what is true of a parameter in any model that has it: all but its sizes and initial spread.

  Raises:
    errors.InputError: when no model has such a parameter.
  """
  first, _, rest = path.partition("/")
  number = first.removeprefix(f"{LAYERS}_")
  if first != number and number.isdecimal():
    found = layer(_ALL).get(rest)
  else:
    found = table(_ALL).get(path) or table(dataclasses.replace(_ALL, prefix_hidden=1)).get(path)
  if found is None:
    raise errors.InputError(f"{path} is no parameter of any model: glmjax/models/params.py has their table")
  return found


def apart(config: config_lib.GLMConfig) -> Iterator[tuple[str, Param]]:
  """Yields all parameters by their paths, each layer by itself: layers_0/..., layers_1/..., as inference has them."""
  for path, param in table(config).items():
    if not path.startswith(f"{LAYERS}/"):
      yield path, param
  for i in range(config.num_layers):
    for path, param in layer(config).items():
      yield f"{LAYERS}_{i}/{path}", param


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the leaves of nested dicts by their paths; whatever is no dict is a leaf."""
  found = {}
  for name, child in tree.items():
    if isinstance(child, Mapping):
      found |= {f"{name}/{path}": leaf for path, leaf in flatten(child).items()}
    else:
      found[name] = child
  return found


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested dicts that `flatten` names."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    inner = tree
    for parent in parents:
      inner = inner.setdefault(parent, {})
    inner[last] = leaf
  return tree


def always(path: str, param: Param) -> bool:
  """Returns True: the predicate that is true of every parameter."""
  del path, param
  return True


def split(tree: Mapping[str, Any], predicate: Predicate) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns nested dicts with the parameters for which the predicate is true, and with the others."""
  flat = flatten(tree)
  true = {path for path in flat if predicate(path, known(path))}
  return tuple(nest({path: x for path, x in flat.items() if (path in true) is part}) for part in (True, False))


def merge(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested dicts with the leaves of both, which share none."""
  return nest(flatten(tree) | flatten(other))


def sublayers() -> tuple[str, ...]:
  """Returns the parts of a block, whatever its kind of norms, in the order in which they compute."""
  return tuple(dict.fromkeys(path.split("/")[0] for path in layer(_ALL)))


@functools.lru_cache(maxsize=1024)
def quantized_inputs(path: str) -> tuple[int, ...] | None:
  """Returns the input axes, from the end, of a kernel that quantized models have as codes; None of other parameters.

  Raises:
    errors.InputError: when no model has such a parameter.
  """
  param = known(path)
  return param.inputs_from_end if param.quantizes else None


def row_inputs(path: str) -> int:
  """Returns how many input axes a weight has that CPUs read as rows (models/output_rows.py), a block's kernel or the
  head; 0 of all other parameters, adapters and prefix encoders among them.

  Raises:
    errors.InputError: when no model has such a parameter.
  """
  param = known(path)
  return len(param.inputs) if param.quantizes or param.part == "head" else 0


def count(config: config_lib.GLMConfig) -> int:
  """Counts all parameters; the tied embedding counts once."""
  return sum(param.size for param in table(config).values())


def count_of_matmuls(config: config_lib.GLMConfig) -> int:
  """Counts the weights that meet every token in a matmul: the blocks' kernels and the head, which may be the
  embedding's table.
  """
  return sum(param.size for _, param in _matmuls(config))


def _matmuls(config: config_lib.GLMConfig) -> Iterator[tuple[str, Param]]:
  """Yields these weights, and their paths."""
  for path, param in table(config).items():
    is_head = path == "embedding/table" and config.tie_embeddings
    if is_head or param.inputs and not path.startswith("prefix_encoder/"):
      yield path, param


def train_flops_per_token(config: config_lib.GLMConfig, length: int, is_trained: Predicate = always) -> float:
  """Returns the model FLOPs of forward and backward for one token of a row of `length` tokens.

  6 per matmul weight, 4 per frozen one, whose own gradient nobody asks for, plus 12 N D length for attention scores
  (PaLM paper, appendix B); no recompute.
  """
  scores = 12.0 * config.num_layers * config.embed_dim * (config.prefix_length + length)
  return scores + sum((6.0 if is_trained(path, param) else 4.0) * param.size for path, param in _matmuls(config))


def xavier_std(fan_in: int, fan_out: int, gain: float = 1.0) -> float:
  """Returns the spread of Glorot and Bengio 2010, normal form."""
  return gain * (2.0 / (fan_in + fan_out)) ** 0.5


def _output_std(config: config_lib.GLMConfig, fan_in: int) -> float:
  """Returns the initial spread of a sublayer's last projection."""
  if config.norm == "deepnorm":
    return xavier_std(fan_in, config.embed_dim, config.beta)
  return config.init_std * config.beta  # GPT-2's 0.02 / sqrt(2 N)


def norm(width: int) -> dict[str, Param]:
  """Returns the parameters of a LayerNorm."""
  return {
    name: Param((width,), ("act_embed",), "norms", init, decays=False)
    for name, init in (("scale", "ones"), ("bias", "zeros"))
  }


def _norm(path: str, config: config_lib.GLMConfig) -> dict[str, Param]:
  return {f"{path}/{name}": param for name, param in norm(config.embed_dim).items()}


def _kernel(
  path: str,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  num_inputs: int,
  std: float,
  cut: int,
  gains: tuple[float, ...] = (),
) -> dict[str, Param]:
  """Returns a block's kernel and its bias, which has the axes that a product does not sum over."""
  part = path.split("/")[0]
  return {
    f"{path}/kernel": Param(
      shape, axes, part, std=std, gains=gains, gains_axis=1, inputs=tuple(range(num_inputs)), quantizes=True, cut=cut
    ),
    f"{path}/bias": Param(shape[num_inputs:], axes[num_inputs:], part, "zeros", decays=False),
  }


def _adapter(path: str, kernel: Param, rank: int) -> dict[str, Param]:
  """Returns the two factors beside a kernel: the first begins as PEFT's does in spread, the second with zeros."""
  n = len(kernel.inputs)
  inputs, outputs = kernel.shape[:n], kernel.shape[n:]
  std = (3 * math.prod(inputs)) ** -0.5  # of PEFT's uniform distribution over +-inputs^-0.5
  a = Param((*inputs, rank), (*kernel.axes[:n], "rank"), kernel.part, std=std, inputs=kernel.inputs)
  b = Param((rank, *outputs), ("rank", *kernel.axes[n:]), kernel.part, "zeros", inputs=(0,))
  return {f"{path}/lora_a": a, f"{path}/lora_b": b}


def _stacked(param: Param, num_layers: int) -> Param:
  """Returns a layer's parameter with the axis of the layers in front."""
  return dataclasses.replace(
    param,
    shape=(num_layers, *param.shape),
    axes=(LAYERS, *param.axes),
    gains_axis=param.gains_axis + 1,
    inputs=tuple(axis + 1 for axis in param.inputs),
    cut=None if param.cut is None else param.cut + 1,
  )
