"""P-Tuning v2 prefixes of ChatGLM-6B: the files that its ptuning/ leaves, and ours.

Theirs is a table [P, 2 N D]: for each place of the prefix the key and the value of layer 0, of layer 1, and so on,
each of all heads. A checkpoint with prefix_projection has a small table and a perceptron that makes the large one of
it (linear, tanh, linear); it is evaluated here, since nothing but the large one ever reaches the model.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

import numpy as np

from glmjax import errors
from glmjax.checkpoint import stored_weights
from glmjax.io import paths
from glmjax.io import printable
from glmjax.models import config as config_lib
from glmjax.thudm import shards as shards_lib
from glmjax.thudm import tensors as tensors_lib

ENCODER = "transformer.prefix_encoder."
TABLE = ENCODER + "embedding.weight"
NAMES = ("layers/attention/prefix_key", "layers/attention/prefix_value")  # ours, in their order
_ROWS = 256  # of the perceptron's matrices, read together
_LARGEST_HIDDEN = 1 << 26  # elements between the perceptron's matrices; those of ptuning/ have 2^19
_PROJECTION = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")


@dataclasses.dataclass(frozen=True)
class Prefix:
  """A prefix in its files, checked against the model."""

  tensors: Mapping[str, tensors_lib.Tensor]  # by keys without ENCODER
  files: tuple[paths.Path, ...]
  embed_dim: int
  num_heads: int

  @property
  def length(self) -> int:
    """P, how many keys every query sees besides."""
    return self.tensors["embedding.weight"].shape[0]

  @property
  def nbytes(self) -> int:
    """The bytes of all tensors."""
    return sum(tensor.nbytes for tensor in self.tensors.values())

  @property
  def dtype(self) -> str:
    """The dtype of the large table; an evaluated one is float32, as ptuning/ keeps the encoder."""
    return "float32" if self._projected else self.tensors["embedding.weight"].dtype.name

  @property
  def _projected(self) -> bool:
    return len(self.tensors) > 1

  def read(self, name: str, layers: slice) -> np.ndarray:
    """Reads some layers of one of NAMES, [layers, H, P, K]."""
    starts = [(2 * layer + NAMES.index(name)) * self.embed_dim for layer in range(layers.start, layers.stop)]
    found = np.stack([self._columns(start, start + self.embed_dim) for start in starts])  # [layers, P, D]
    return found.reshape(*found.shape[:2], self.num_heads, -1).transpose(0, 2, 1, 3)

  def _columns(self, start: int, stop: int) -> np.ndarray:
    """Returns columns of the large table [P, columns]: what the file holds of them, or a few of the perceptron's
    outputs.
    """
    if self._projected:
      return self._linear("trans.2", self._hidden, start, stop)
    table = self.tensors["embedding.weight"]
    offset = table.offset + start * table.strides[1] * table.dtype.itemsize
    return dataclasses.replace(table, offset=offset, shape=(self.length, stop - start)).whole()

  @functools.cached_property
  def _hidden(self) -> np.ndarray:
    table, size = self.tensors["embedding.weight"].whole(), self.tensors["trans.0.bias"].shape[0]
    return np.tanh(self._linear("trans.0", table.astype("f4"), 0, size))

  def _linear(self, name: str, x: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Returns outputs [start, stop) of one of the perceptron's layers, in float32."""
    weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
    parts = [x @ weight.rows(i, min(i + _ROWS, stop)).astype("f4").T for i in range(start, stop, _ROWS)]
    return np.concatenate(parts, 1) + bias.rows(start, stop).astype("f4")


def to_theirs(key_NHPK: np.ndarray, value_NHPK: np.ndarray) -> np.ndarray:
  """Returns the large table [P, 2 N D]."""
  both = np.stack([key_NHPK, value_NHPK], 1)  # N, 2, H, P, K
  return both.transpose(3, 0, 1, 2, 4).reshape(both.shape[3], -1)


def to_files(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns what ptuning/ would have saved of a prefix, or of the perceptron that makes it, by its keys.

  `params`: ours, by path.
  """
  if NAMES[0] in params:
    return {TABLE: to_theirs(*(params[name] for name in NAMES))}
  own = {path.removeprefix("prefix_encoder/"): x for path, x in params.items()}
  out_kernel, out_bias = own["out_kernel"], own["out_bias"]  # [E, N, 2, H, K], [N, 2, H, K]
  found = {
    "embedding.weight": own["table"],
    "trans.0.weight": own["hidden_kernel"].T,
    "trans.0.bias": own["hidden_bias"],
    "trans.2.weight": out_kernel.reshape(len(out_kernel), -1).T,
    "trans.2.bias": out_bias.reshape(-1),
  }
  return {ENCODER + key: np.ascontiguousarray(x) for key, x in found.items()}


def is_there(source: paths.Path) -> bool:
  """Tells whether this could be what ptuning/ left: a file, or a folder of the Hub's files of tensors."""
  return source.is_file() or any((source / name).exists() for name in ("pytorch_model.bin", "model.safetensors"))


def read(
  source: paths.Path, base: paths.Path, model: config_lib.GLMConfig
) -> tuple[config_lib.GLMConfig, dict[str, np.ndarray]]:
  """Reads a prefix as an adapter: the configuration of the model with it, and its keys and values, float32.

  Args:
    source: folder or file that ptuning/ wrote.
    base: the folder of the model that it was trained with.
    model: what is in there.

  Raises:
    errors.InputError: where it is of another model, or damaged.
  """
  if model.prefix_length:
    raise errors.InputError(f"{base} has a prefix of its own: give the model without it")
  if not model.position_kind.rotary_parts:
    raise errors.InputError(f"prefixes are known for ChatGLM-6B and its kin, and {base} holds a model of GLM-10B's")
  prefix = open_prefix(source, model)
  arrays = {name: prefix.read(name, slice(0, model.num_layers)).astype(np.float32) for name in NAMES}
  if not all(np.isfinite(x).all() for x in arrays.values()):
    raise errors.NotFiniteError(f"{source}: the prefix is not finite: train it anew")
  return dataclasses.replace(model, prefix_length=prefix.length), arrays


def weights(prefix: Prefix, config: config_lib.GLMConfig, dtype: str | None) -> list[stored_weights.StoredWeight]:
  """Returns the two parameters as they are to be stored; quantizing leaves them alone."""
  shape = (config.num_layers, config.num_heads, config.prefix_length, config.head_dim)
  return [stored_weights.StoredWeight(name, shape, dtype or prefix.dtype) for name in NAMES]


def open_prefix(path: paths.Named, config: config_lib.GLMConfig) -> Prefix:
  """Opens what P-Tuning left: its folder (config.json is read where there is one), or the file of tensors.

  Raises:
    errors.InputError: when there is no prefix, or it is another model's.
  """
  path = paths.named(path, "--prefix")
  if path.is_dir():
    opened = shards_lib.open_hub(path)
    said = shards_lib.read_json(path / "config.json") if (path / "config.json").exists() else {}
  elif path.is_file():
    opened, said = shards_lib.Shards((shards_lib.open_file(path),), (path,)), {}
  else:
    raise errors.InputError(f"{path}: no such file or folder; give the one that P-Tuning wrote")
  found = {key: tensor for key, tensor in opened.ranks[0].items() if key.startswith(ENCODER)}
  if not found:
    raise errors.InputError(f"{path} holds no {TABLE}: give the folder or file that P-Tuning wrote")
  return checked(found, opened.files, said, config, path)


def checked(
  found: Mapping[str, tensors_lib.Tensor],
  files: Sequence[paths.Path],
  said: Mapping[str, object],
  config: config_lib.GLMConfig,
  where: paths.Path,
) -> Prefix:
  """Returns a prefix of tensors under their full keys; `said`: the config.json beside them.

  Raises:
    errors.InputError: when tensors are missing, or their sizes are not the model's.
  """
  found = {key.removeprefix(ENCODER): tensor for key, tensor in found.items()}
  wanted = ("embedding.weight", *(_PROJECTION if len(found) > 1 else ()))
  if different := sorted(set(wanted) ^ set(found)):
    what = "is missing" if different[0] in wanted else "is unexpected"
    raise errors.InputError(f"{where}: {ENCODER}{printable.line(different[0], 80)} {what}: copy the files again")
  shape = found["embedding.weight"].shape
  length = shape[0] if len(shape) == 2 else 0
  width, columns = config.embed_dim, 2 * config.num_layers * config.embed_dim
  hidden = found["trans.0.bias"].shape[0] if len(found) > 1 and found["trans.0.bias"].shape else 0
  expected = {
    "embedding.weight": (length, width if len(found) > 1 else columns),
    "trans.0.weight": (hidden, width),
    "trans.0.bias": (hidden,),
    "trans.2.weight": (columns, hidden),
    "trans.2.bias": (columns,),
  }
  for key, tensor in found.items():
    if tensor.shape != expected[key] or not tensor.shape[0]:
      raise errors.InputError(
        f"{where}: {ENCODER}{key} has shape {list(tensor.shape)}, and {config.num_layers} layers "
        f"of width {width} ask for {list(expected[key])}: it is the prefix of another model"
      )
    if tensor.dtype.name not in config_lib.DTYPES:
      raise errors.InputError(f"{where}: {ENCODER}{key} is {tensor.dtype}, expected a float: copy the files again")
  if length * hidden > _LARGEST_HIDDEN:
    raise errors.InputError(
      f"{where}: {length} places through a perceptron of width {hidden} are more than any prefix "
      "has: copy the files again"
    )
  if said.get("pre_seq_len") not in (None, length):
    raise errors.InputError(
      f"{where}: config.json's pre_seq_len is {said['pre_seq_len']!r:.40}, and {TABLE} has "
      f"{length} rows: take both from the same place"
    )
  return Prefix(found, tuple(files), width, config.num_heads)
