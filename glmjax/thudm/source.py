"""A THUDM model in its own files: opened, checked against its configuration and tokenizer, read in parts."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.checkpoint import stored_weights
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.thudm import hub as hub_lib
from glmjax.thudm import layouts
from glmjax.thudm import merged
from glmjax.thudm import prefix as prefix_lib
from glmjax.thudm import shards as shards_lib
from glmjax.thudm import vocabulary

_FLOATS = ("float16", "bfloat16", "float32")
_TABLE, _HEAD = "transformer.word_embeddings.weight", "lm_head.weight"  # ChatGLM-6B's
_COMPARED = 2**20  # elements that are compared together
_HEAD_DIM = 64  # of all GLMs up to 10B


@dataclasses.dataclass(frozen=True)
class Source:
  """What is to be imported; everything about it has been checked but the numbers themselves."""

  family: str
  config: config_lib.GLMConfig
  bits: int | None  # of the codes in the files; None: float
  shards: shards_lib.Shards
  tensors: Mapping[str, merged.Merged]
  tokenizer: tokenizer_lib.Tokenizer | None
  prefix: prefix_lib.Prefix | None = None
  note: str | None = None  # what to tell whoever imports it, in a line

  @property
  def files(self) -> tuple[paths.Path, ...]:
    """All files that are read."""
    return self.shards.files + (() if self.prefix is None else self.prefix.files)

  @property
  def nbytes(self) -> int:
    """The bytes of all tensors."""
    return self.shards.nbytes + (0 if self.prefix is None else self.prefix.nbytes)

  def weights(self, bits: int | None, dtype: str | None) -> list[stored_weights.StoredWeight]:
    """Returns the parameters as they are to be stored; codes stay codes, floats keep their dtypes unless told."""
    found = []
    for entry in layouts.entries(self.family, self.config):
      shape = (self.config.num_layers, *entry.our_shape()) if entry.stacked else entry.our_shape()
      their = self.tensors[entry.keys(1)[0]].dtype.name
      quantized = (self.bits or bits) if entry.kernel else None
      groups = len(self.shards.ranks) if self.bits and entry.split == "inputs" else 1
      found.append(
        stored_weights.StoredWeight(
          entry.name, shape, dtype or (their if quantized is None else "float16"), quantized, groups
        )
      )
    return found if self.prefix is None else found + prefix_lib.weights(self.prefix, self.config, dtype)

  def read(self, weight: stored_weights.StoredWeight, region: stored_weights.Region) -> dict[str, np.ndarray]:
    """Reads a block as it is to be stored."""
    if weight.name in prefix_lib.NAMES:
      return weight.convert(self.prefix.read(weight.name, region[0]))
    entry = next(e for e in layouts.entries(self.family, self.config) if e.name == weight.name)
    keys = entry.keys(self.config.num_layers)[region[0]] if entry.stacked else entry.keys(1)
    factors = entry.factor_slices(region[1:] if entry.stacked else region)
    ours = _stack if entry.stacked else lambda blocks: blocks[0]
    block = ours([self._block(entry, key, factors) for key in keys])
    if not (self.bits and entry.kernel):
      return weight.convert(block)
    scale = ours([self._scale(entry, key + "_scale", factors) for key in keys])
    return {f"{weight.name}/values": block, f"{weight.name}/scale": scale}

  def _block(self, entry: layouts.Entry, key: str, factors: list[slice]) -> np.ndarray:
    rows = [self.tensors[key].rows(*ends) for ends in entry.ranges(factors)]
    return entry.to_ours(rows[0] if len(rows) == 1 else np.concatenate(rows), factors)

  def _scale(self, entry: layouts.Entry, key: str, factors: list[slice]) -> np.ndarray:
    """Reads one scale for each row; matrices whose inputs are divided have one for each row and rank."""
    tensor = self.tensors[key]
    parts = [tensor] if entry.split != "inputs" else [merged.Merged((shard,)) for shard in tensor.shards]
    scales = []
    for part in parts:
      rows = np.concatenate([part.rows(*ends) for ends in entry.ranges(factors)])
      scales.append(dataclasses.replace(entry, inputs=()).to_ours(rows, factors))
    ones = (1,) * (len(entry.inputs) - 1)
    return np.stack(scales).reshape(len(scales), *ones, *scales[0].shape)


def _stack(layers: list[np.ndarray]) -> np.ndarray:
  return layers[0][None] if len(layers) == 1 else np.stack(layers)


def open_source(
  family: str,
  folder: paths.Named,
  tokenizer: paths.Named | None = None,
  num_heads: int | None = None,
  rotary_rounding: str = "half_table",
  prefix: paths.Named | None = None,
) -> Source:
  """Opens a folder of THUDM's files and checks all that can be checked without reading the weights.

  Args:
    family: one of layouts.FAMILIES.
    folder: of the files.
    tokenizer: ice_text.model or a tokenizer folder; None: either in `folder`; "none": weights alone.
    num_heads: where the files do not tell: glm-10b (None: heads of 64).
    rotary_rounding: of the model's config: half_table is how the published models were run.
    prefix: folder or file of a P-Tuning v2 prefix for chatglm-6b, where `folder` has none of its own.

  Raises:
    errors.InputError: saying which file or tensor is wrong.
  """
  if family not in layouts.FAMILIES:
    raise errors.InputError(f"no family {family}: choose one of {', '.join(layouts.FAMILIES)}")
  if prefix is not None and family != "chatglm-6b":
    raise errors.InputError(f"--prefix is for chatglm-6b: the prefixes of {family} are not known")
  folder = paths.named(folder, "the source folder")
  try:
    if not folder.is_dir():
      raise errors.InputError(f"{folder}: no such folder; give the one that holds {family}'s files")
    is_hub = family == "chatglm-6b"
    hub = shards_lib.read_json(folder / hub_lib.CONFIG) if is_hub else {}
    found = _open_chatglm(folder, hub, prefix, num_heads) if is_hub else _open_ranks(family, folder, num_heads)
    config = found.config
    if family != "glm-10b":
      config = dataclasses.replace(config, rotary_rounding=rotary_rounding)
    words = vocabulary.read(family, folder, tokenizer, hub, config)
  except OSError as error:
    raise errors.InputError(f"cannot read {error.filename or folder}: {errors.reason(error)}") from error
  param_dtype = found.tensors[layouts.entries(family, config)[0].key].dtype.name
  compute = "float32" if param_dtype == "float32" else "bfloat16"
  config = dataclasses.replace(config, param_dtype=param_dtype, dtype=compute)
  return dataclasses.replace(found, config=config, tokenizer=words)


def _open_chatglm(
  folder: paths.Path, hub: Mapping[str, Any], prefix: paths.Named | None, num_heads: int | None
) -> Source:
  path = folder / hub_lib.CONFIG
  shards = shards_lib.open_hub(folder)
  if {key.startswith(prefix_lib.ENCODER) for key in shards.ranks[0]} == {True}:
    raise errors.InputError(
      f"{folder} holds a P-Tuning v2 prefix and no model: import the model that was tuned, with --prefix={folder}"
    )
  hub_lib.check(hub, path)
  config, bits = hub_lib.model(hub, path), hub.get("quantization_bit") or None
  if config.num_layers > len(shards.ranks[0]):
    raise errors.InputError(
      f"{path}: num_layers is {config.num_layers}, and the files hold {len(shards.ranks[0])} "
      "tensors: take config and weights from the same place"
    )
  if num_heads not in (None, config.num_heads):
    raise errors.InputError(f"num_heads is {num_heads}, and {path} says {config.num_heads}: leave --num_heads out")
  shards, found_prefix = _take_prefix(shards, prefix, hub, config, folder)
  if found_prefix is not None:
    config = dataclasses.replace(config, prefix_length=found_prefix.length)
  config, tensors, note = _with_head(config, bits, shards, folder, "tie_word_embeddings" in hub)
  return Source("chatglm-6b", config, bits, shards, tensors, None, found_prefix, note)


def _open_ranks(family: str, folder: paths.Path, num_heads: int | None) -> Source:
  shards = shards_lib.open_ranks(folder)
  _check_degree(shards, folder)
  config, bits = _config_of_shapes(family, shards, num_heads, folder), _bits_of_shapes(shards)
  return Source(family, config, bits, shards, _merge(family, config, bits, shards, folder), None)


def _with_head(
  config: config_lib.GLMConfig, bits: int | None, shards: shards_lib.Shards, folder: paths.Path, is_said: bool
) -> tuple[config_lib.GLMConfig, dict[str, merged.Merged], str | None]:
  """Returns the model with the head that transformers would give it, its tensors, a note where the file has another.

  The files hold a head beside the table, or, saved by transformers, one of the two for both. Where they differ,
  a tied model's head is the table.
  """
  [rank] = shards.ranks
  if quantized := [key for key in (_TABLE, _HEAD) if key + "_scale" in rank]:
    raise errors.InputError(
      f"{folder}: {quantized[0]} is quantized, as in chatglm-6b-int4-qe, which is not read: take "
      "chatglm-6b-int4, or import the float files with --bits=4"
    )
  if config.tie_embeddings and _HEAD not in rank:
    return config, _merge("chatglm-6b", config, bits, shards, folder), None
  if config.tie_embeddings and _TABLE not in rank:
    rank = {_TABLE if key == _HEAD else key: tensor for key, tensor in rank.items()}
    return config, _merge("chatglm-6b", config, bits, dataclasses.replace(shards, ranks=(rank,)), folder), None
  untied = dataclasses.replace(config, tie_embeddings=False)
  tensors = _merge("chatglm-6b", untied, bits, shards, folder)
  note = None
  if _same(tensors[_TABLE], tensors[_HEAD]):
    config = dataclasses.replace(config, tie_embeddings=True)
  elif config.tie_embeddings:
    why = "says tie_word_embeddings" if is_said else "does not name tie_word_embeddings, which is true by default"
    note = (
      f"{_HEAD} is not {_TABLE}, and config.json {why}: the head is the table, as transformers has it, and "
      f"{_HEAD} is left out (tie_word_embeddings false would use it)"
    )
  else:
    note = f"{_HEAD} is not {_TABLE}, and config.json says that the two are not tied: both are taken"
  if config.tie_embeddings:
    tensors.pop(_HEAD)
  return config, tensors, note


def _take_prefix(
  shards: shards_lib.Shards,
  given: paths.Named | None,
  hub: Mapping[str, Any],
  config: config_lib.GLMConfig,
  folder: paths.Path,
) -> tuple[shards_lib.Shards, prefix_lib.Prefix | None]:
  """Returns the model's own tensors, and the prefix among them or the one given."""
  [rank] = shards.ranks
  inside = {key: tensor for key, tensor in rank.items() if key.startswith(prefix_lib.ENCODER)}
  if inside and given is not None:
    raise errors.InputError(
      f"{folder} has a P-Tuning v2 prefix of its own: leave --prefix out, or import the model that was tuned"
    )
  if inside:
    prefix = prefix_lib.checked(inside, (), hub, config, folder)
    rest = {key: tensor for key, tensor in rank.items() if key not in inside}
    return dataclasses.replace(shards, ranks=(rest,)), prefix
  if given is None and hub.get("pre_seq_len"):
    raise errors.InputError(
      f"{folder / 'config.json'} has pre_seq_len {hub['pre_seq_len']}, and no file holds the "
      "prefix: name its folder with --prefix, or take the model's own config.json"
    )
  return shards, None if given is None else prefix_lib.open_prefix(given, config)


def _shape(shards: shards_lib.Shards, key: str, folder: paths.Path, ndim: int = 2) -> tuple[int, ...]:
  if key not in shards.ranks[0]:
    raise errors.InputError(f"{folder}: {key} is missing: this is not the model that it was taken for")
  shape = shards.ranks[0][key].shape
  if len(shape) != ndim:
    raise errors.InputError(f"{folder}: {key} has shape {list(shape)}, not that of a matrix: copy the files again")
  return shape


def _check_degree(shards: shards_lib.Shards, folder: paths.Path) -> None:
  """Checks that the files are as many as the ranks that the tensors were divided among."""
  at = "transformer.layers.0."
  ours = _shape(shards, at + "mlp.dense_h_to_4h.weight", folder)[0]
  rows, _ = _shape(shards, at + "attention.dense.weight", folder)
  qkv = _shape(shards, at + "attention.query_key_value.weight", folder)[0]
  degree, count = 3 * rows // max(1, qkv), len(shards.ranks)
  if degree != count or not ours:
    raise errors.InputError(
      f"{shards.files[0].parent} has {count} mp_rank files, and their tensors are those of "
      f"tensor-parallel degree {degree}: copy all {degree} files there"
    )
  if count not in layouts.DEGREES:
    raise errors.InputError(
      f"{shards.files[0].parent} is of tensor-parallel degree {count}: {layouts.KNOWN_DEGREES} are known"
    )


def _bits_of_shapes(shards: shards_lib.Shards) -> int | None:
  tensor = shards.ranks[0]["transformer.layers.0.attention.query_key_value.weight"]
  if tensor.dtype != np.int8:
    return None
  return 8 if tensor.shape[1] == shards.ranks[0]["transformer.layers.0.attention.dense.weight"].shape[0] else 4


def _config_of_shapes(
  family: str, shards: shards_lib.Shards, num_heads: int | None, folder: paths.Path
) -> config_lib.GLMConfig:
  """Infers the sizes of a checkpoint without a configuration file from its tensors' shapes."""
  first, count = shards.ranks[0], len(shards.ranks)
  if num_heads is not None and num_heads < 1:
    raise errors.InputError(f"num_heads is {num_heads}: give 1 or more, or leave it out")
  is_glm = family == "glm-10b"
  table = "word_embeddings.weight"
  if table not in first:
    table = "transformer." + table
  vocab, width = _shape(shards, table, folder)
  mlp = _shape(shards, "transformer.layers.0.mlp.dense_h_to_4h.weight", folder)[0] * count
  sizes = dict(
    vocab_size=vocab * count,
    embed_dim=width,
    num_layers=len({key.split(".")[2] for key in first if key.startswith("transformer.layers.")}),
  )
  if is_glm:
    length = _shape(shards, "transformer.position_embeddings.weight", folder)[0] - 1
    return config_lib.GLMConfig(
      **sizes,
      num_heads=num_heads or max(1, width // _HEAD_DIM),
      mlp_dim=mlp,
      max_length=length,
      positions="learned_2d",
      norm="pre",
      mlp="gelu_tanh",
    )
  frequencies = first.get(layouts.INV_FREQ.format(0))
  head_dim = 2 * frequencies.shape[0] if frequencies is not None and len(frequencies.shape) == 1 else 128
  return config_lib.GLMConfig(**sizes, num_heads=num_heads or max(1, width // head_dim), mlp_dim=mlp // 2)


def _merge(
  family: str, config: config_lib.GLMConfig, bits: int | None, shards: shards_lib.Shards, folder: paths.Path
) -> dict[str, merged.Merged]:
  """Merges every tensor by its key; keys, shapes and dtypes are as the configuration asks."""
  found_by_key, wanted = shards.ranks[0], []
  every = layouts.entries(family, config)
  if every[0].key not in found_by_key and "transformer." + every[0].key in found_by_key:  # SwissArmyTransformer's
    shards = dataclasses.replace(
      shards,
      ranks=tuple(
        {key.replace("transformer.word_", "word_"): tensor for key, tensor in rank.items()} for rank in shards.ranks
      ),
    )
  for entry in every:
    wanted += entry.keys(config.num_layers)
    if bits and entry.kernel:
      wanted += [key + "_scale" for key in entry.keys(config.num_layers)]
  optional = [layouts.INV_FREQ.format(i) for i in range(config.num_layers)]
  shards_lib.check_keys(shards, wanted, optional, folder)
  tensors = {}
  for entry in every:
    for key in entry.keys(config.num_layers):
      coded = bits if entry.kernel else None
      tensors[key] = _joined(shards, key, entry, entry.their_shape(bits), "int8" if coded else None)
      if tensors[key].dtype != (first := tensors[entry.keys(1)[0]]).dtype:
        raise errors.InputError(
          f"{shards.ranks[0][key].path}: {key} is {tensors[key].dtype} and {entry.keys(1)[0]} is "
          f"{first.dtype}: all layers of a parameter have one type; convert the file"
        )
      if entry.split == "none":
        _check_alike(shards, key)
      if coded:
        scales = dataclasses.replace(entry, split="none" if entry.split == "inputs" else entry.split)
        tensors[key + "_scale"] = _joined(shards, key + "_scale", scales, (math.prod(entry.rows),), "float16")
  _check_frequencies(shards, config, optional)
  return tensors


def _same(a: merged.Merged, b: merged.Merged) -> bool:
  """Tells whether two matrices are the same bit for bit; as much is read as is alike."""
  if a == b:  # one place in a file, which torch shares between two names
    return True
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  count = max(1, _COMPARED // a.shape[1])

  def read(x: merged.Merged, i: int) -> np.ndarray:
    return np.ascontiguousarray(x.rows(i, min(i + count, a.shape[0]))).view(np.uint8)

  return all(np.array_equal(read(a, i), read(b, i)) for i in range(0, a.shape[0], count))


def _joined(
  shards: shards_lib.Shards, key: str, entry: layouts.Entry, shape: tuple[int, ...], dtype: str | None
) -> merged.Merged:
  parts = tuple(rank[key] for rank in shards.ranks)
  for path, part in zip(shards.files, parts):
    if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
      raise errors.InputError(
        f"{path}: {key} is {part.dtype} {list(part.shape)} there and {parts[0].dtype} "
        f"{list(parts[0].shape)} in {shards.files[0].name}: copy the files again"
      )
  if parts[0].dtype.name not in ((dtype,) if dtype else _FLOATS):
    raise errors.InputError(
      f"{parts[0].path}: {key} is {parts[0].dtype}, expected {dtype or 'a float'}; is its quantization_bit right?"
    )
  found = merged.Merged(parts, entry.split, entry.groups)
  if found.shape != shape:
    hint = (
      "the vocabulary is of another date"
      if "word_embeddings" in key or "lm_head" in key
      else ("the configuration is another model's")
    )
    raise errors.InputError(
      f"{parts[0].path}: {key} has shape {list(found.shape)}, and the configuration asks for "
      f"{list(shape)}: {hint}; take config and weights from the same place"
    )
  return found


def _check_alike(shards: shards_lib.Shards, key: str) -> None:
  """Checks that what every rank holds whole is the same in all files, up to roundings by which ranks may drift."""
  first, *others = (rank[key] for rank in shards.ranks)
  about, count = ml_dtypes.finfo(first.dtype), max(1, _COMPARED // math.prod(first.shape[1:]))
  tolerance = 4 * float(about.eps)
  least = tolerance * float(about.smallest_normal)  # float16's small numbers lie further apart than their share
  for start in range(0, first.shape[0] if others else 0, count):
    stop = min(start + count, first.shape[0])
    block = first.rows(start, stop).astype(np.float32)
    for path, part in zip(shards.files[1:], others):
      if not np.allclose(part.rows(start, stop).astype(np.float32), block, tolerance, least, equal_nan=True):
        raise errors.InputError(
          f"{path}: {key} has other values there than in {shards.files[0].name}, and all ranks "
          "hold the same: the files are of different checkpoints, copy them again"
        )


def _check_frequencies(shards: shards_lib.Shards, config: config_lib.GLMConfig, keys: list[str]) -> None:
  """Checks that rotary frequencies in the files are those that the model will compute."""
  expected = layouts.inv_freq(config)
  for key in keys[:1]:
    tensor = shards.ranks[0].get(key)
    if tensor is None:
      continue
    if tensor.shape != expected.shape or not np.allclose(tensor.whole().astype("f4"), expected.astype("f4"), rtol=2e-3):
      raise errors.InputError(
        f"{tensor.path}: {key} are not the frequencies of base {config.rotary_base:g} over "
        f"{2 * expected.size} dimensions: this model turns its heads otherwise"
      )
