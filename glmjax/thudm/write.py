"""Weights given back in THUDM's layouts, tensor by tensor, and in plain safetensors."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import json
import math

import numpy as np
import tqdm

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.io import paths
from glmjax.io import lease
from glmjax.io import progress
from glmjax.io import publish
from glmjax.io import tokenizer_folder
from glmjax.checkpoint import export
from glmjax.checkpoint import folder as folder_lib
from glmjax.models import config as config_lib
from glmjax.thudm import layouts
from glmjax.thudm import merged
from glmjax.thudm import peft
from glmjax.thudm import prefix as prefix_lib
from glmjax.thudm import tensors
from glmjax.thudm import torch_files
from glmjax import tokenizer as tokenizer_lib
from glmjax.checkpoint import stored_weights

FORMATS = ("safetensors", "chatglm-hf", "glm130b-sat", peft.NAME)
_SHARD_BYTES = 2 * 10**9  # of a Hub shard; ChatGLM-6B's own are up to 1.9 GB
_PIECE = 2**24  # bytes written at a time
_ITERATION = "49300"  # of the released GLM-130B; `latest` must name one


@dataclasses.dataclass(frozen=True)
class Item:
  """One tensor to write. `split` and `groups` as in layouts.Entry; "ranks": see merged.part."""

  key: str
  dtype: np.dtype
  shape: tuple[int, ...]  # of the whole
  parts: Callable[[], Iterator[np.ndarray]]  # the tensor, or stretches of its first axis one after another
  split: str = "none"
  groups: int = 1

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def whole(self) -> np.ndarray:
    """Returns the tensor in one piece."""
    parts = list(self.parts())
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def write_format(name: str, tensor_parallel: int | None = None) -> export.FormatWriter:
  """Writes the named format for `export.export`.

  Raises:
    errors.InputError: for an unknown name, or a degree where there are no ranks.
  """
  if name not in FORMATS:
    raise errors.InputError(f"no format {name}: choose one of orbax, cpu, {', '.join(FORMATS)}")
  if tensor_parallel is not None and name != "glm130b-sat":
    raise errors.InputError(f"tensor_parallel is for glm130b-sat; {name} has no ranks")
  if tensor_parallel not in (None, *layouts.DEGREES):
    raise errors.InputError(f"tensor_parallel is {tensor_parallel}: {layouts.KNOWN_DEGREES} are known")
  if name == "safetensors":
    return _write_safetensors
  if name == "chatglm-hf":
    return _write_chatglm
  if name == peft.NAME:
    return peft.write
  return lambda content, folder: _write_glm_130b(content, folder, tensor_parallel or 8)


def _write_safetensors(content: export.ExportSource, folder: paths.Path) -> None:
  """Writes our own names and shapes; codes and scales of quantized kernels beside each other."""
  items = []
  for weight in content.weights:
    rest = tuple(slice(0, n) for n in weight.shape[1:])
    step = 1 if weight.stacked else weight.shape[0]
    regions = [(slice(i, i + step), *rest) for i in range(0, weight.shape[0], step)]
    for name, (shape, dtype) in weight.stored(weight.shape).items():
      parts = functools.partial(_read_each, content, weight, regions, name)
      items.append(Item(name.replace("/", "."), np.dtype(arrays.zarr_dtype(dtype)), shape, parts))
  write_safetensors(folder, items)
  content.verify()
  folder_lib.write_config(folder, content.config)
  if content.tokenizer is not None:
    tokenizer_folder.copy(content.tokenizer, folder / folder_lib.TOKENIZER)


def _read_each(
  content: export.ExportSource, weight: stored_weights.StoredWeight, regions: Sequence[stored_weights.Region], name: str
) -> Iterator[np.ndarray]:
  """Yields stretches of one of the arrays that a weight is stored as."""
  return (content.read(weight, region)[name] for region in regions)


def _write_chatglm(content: export.ExportSource, folder: paths.Path) -> None:
  """Writes a folder for the Hub's modeling_chatglm.py, which is not ours to give: copy its *.py files there; or of a
  prefix what ptuning/ writes.
  """
  if content.config.base and not content.config.model.lora_rank:
    return _write_prefix(content, folder)
  _check_whole(content, "chatglm-hf")
  model = content.config.model
  _check_model(model, "chatglm-hf", positions="rotary_2d", mlp="gelu_tanh", norm="deepnorm", alpha=math.sqrt(56))
  write_safetensors(folder, items_of("chatglm-6b", content))
  content.verify()
  tokenizer = None if content.tokenizer is None else tokenizer_lib.Tokenizer.load(content.tokenizer)
  write_hub_configs(folder, model, content.config.export.get("bits"), tokenizer)


def _write_prefix(content: export.ExportSource, folder: paths.Path) -> None:
  """Writes a prefix alone."""
  model = content.config.model
  if not model.position_kind.rotary_parts:
    raise errors.InputError("prefixes are known for ChatGLM-6B and its kin, and this is of a model of GLM-10B's")
  whole = {weight: tuple(slice(0, n) for n in weight.shape) for weight in content.weights}
  params = {weight.name: np.asarray(content.read(weight, region)[weight.name]) for weight, region in whole.items()}
  content.verify()
  found = prefix_lib.to_files(params)
  shapes = {key: (x.dtype, x.shape) for key, x in found.items()}
  folder.mkdir(parents=True, exist_ok=True)
  with torch_files.TorchWriter(folder / "pytorch_model.bin", shapes) as file:
    for x in found.values():
      file.write(_pieces(x))
  said = {"pre_seq_len": model.prefix_length, "prefix_projection": bool(model.prefix_hidden)}
  publish.write_json(folder / "config.json", said)


def _write_glm_130b(content: export.ExportSource, folder: paths.Path, degree: int) -> None:
  _check_whole(content, "glm130b-sat")
  model = content.config.model
  _check_model(
    model,
    "glm130b-sat",
    positions="rotary",
    mlp="geglu",
    norm="deepnorm",
    tie_embeddings=True,
    prefix_length=0,
    alpha=math.sqrt(2 * model.num_layers),
  )
  write_ranks(folder, items_of("glm-130b", content), degree, content.config.export.get("iteration") or _ITERATION)
  content.verify()
  if content.tokenizer is not None:
    tokenizer_folder.copy(content.tokenizer, folder / folder_lib.TOKENIZER)


def _check_whole(content: export.ExportSource, name: str) -> None:
  if base := content.config.base.get("folder"):
    raise errors.InputError(
      f"{name} is for models, and this is an adapter of {base}: export that with --adapter, or this with --format="
      + (peft.NAME if content.config.model.lora_rank else "chatglm-hf")
    )


def _check_model(model: config_lib.GLMConfig, name: str, **expected: object) -> None:
  for field, value in expected.items():
    found = getattr(model, field)
    if found != value and not (isinstance(value, float) and math.isclose(found, value, rel_tol=1e-6)):
      raise errors.InputError(
        f"{name} is for models with {field} {value}, and this one has {found}: choose the format safetensors"
      )


def items_of(family: str, content: export.ExportSource) -> list[Item]:
  """Returns the model's tensors under the original's keys."""
  model = content.config.model
  weights = {weight.name: weight for weight in content.weights}
  items = []
  every = layouts.entries(family, dataclasses.replace(model, tie_embeddings=family != "chatglm-6b"))
  for entry, layer in by_layer(every, model.num_layers):
    if entry.name == "head/kernel" and model.tie_embeddings:  # the format has a head of its own
      weight, entry = weights["embedding/table"], dataclasses.replace(entry, inputs_first=False)
    else:
      weight = weights[entry.name]
    items += _items_of_entry(entry, layer, weight, content)
  if model.prefix_length:
    items.append(_prefix_item([weights[name] for name in prefix_lib.NAMES], content))
  if model.position_kind.rotary_parts:
    frequencies = layouts.inv_freq(model)
    for i in range(model.num_layers):
      items.append(Item(layouts.INV_FREQ.format(i), frequencies.dtype, frequencies.shape, lambda: iter([frequencies])))
  return items


def _prefix_item(both: Sequence[stored_weights.StoredWeight], content: export.ExportSource) -> Item:
  """Returns keys and values of all layers as the one table that they are in the original."""
  layers, heads, length, size = both[0].shape
  region = tuple(slice(0, n) for n in both[0].shape)

  def read() -> Iterator[np.ndarray]:
    yield prefix_lib.to_theirs(*(content.read(weight, region)[weight.name] for weight in both))

  return Item(prefix_lib.TABLE, np.dtype(arrays.zarr_dtype(both[0].dtype)), (length, 2 * layers * heads * size), read)


def by_layer(every: Sequence[layouts.Entry], num_layers: int) -> Iterator[tuple[layouts.Entry, int | None]]:
  """Yields entries in the order of a state dict, those of a layer together."""
  stacked = [entry for entry in every if entry.stacked]
  for entry in every:
    if not entry.stacked:
      yield entry, None
    elif entry is stacked[0]:
      for layer in range(num_layers):
        yield from ((entry, layer) for entry in stacked)


def _items_of_entry(
  entry: layouts.Entry, layer: int | None, weight: stored_weights.StoredWeight, content: export.ExportSource
) -> Iterator[Item]:
  """Yields a matrix or vector, or the codes and the scales of one."""
  key = entry.key.format(layer)
  region = tuple(slice(0, n) for n in weight.shape)
  if layer is not None:
    region = (slice(layer, layer + 1), *region[1:])

  def read() -> dict[str, np.ndarray]:
    found = content.read(weight, region)
    return found if layer is None else {name: x[0] for name, x in found.items()}

  if weight.bits is None:
    yield Item(
      key,
      np.dtype(arrays.zarr_dtype(weight.dtype)),
      entry.their_shape(),
      lambda: iter([entry.to_theirs(read()[weight.name])]),
      entry.split,
      entry.groups,
    )
    return
  kept: dict[str, np.ndarray] = {}  # both are read at once; the scales wait here until they are written

  def codes() -> Iterator[np.ndarray]:
    kept.update(read())
    yield entry.to_theirs(kept.pop(f"{weight.name}/values"))

  def scales() -> Iterator[np.ndarray]:
    scale = kept.pop(f"{weight.name}/scale")
    vector = dataclasses.replace(entry, inputs=())
    rows = [vector.to_theirs(x) for x in scale.reshape(weight.groups, *entry.our_rows())]
    yield np.stack(rows) if entry.split == "inputs" else rows[0]

  half = np.dtype(np.float16)
  yield Item(key, np.dtype(np.int8), entry.their_shape(weight.bits), codes, entry.split, entry.groups)
  rows = math.prod(entry.rows)
  if entry.split == "inputs":
    yield Item(key + "_scale", half, (weight.groups, rows), scales, "ranks")
  else:
    yield Item(key + "_scale", half, (rows,), scales, entry.split, entry.groups)


def _pieces(x: np.ndarray) -> Iterator[memoryview]:
  flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  for start in range(0, flat.size, _PIECE):
    yield flat[start : start + _PIECE].data


def _bar(items: Sequence[Item]) -> tqdm.tqdm:
  return progress.bar(
    total=sum(item.nbytes for item in items), unit="B", unit_scale=True, desc="writing", disable=None, mininterval=1
  )


def _one_rank(items: Sequence[Item]) -> list[Item]:
  """Turns scales that are counted by rank into the vectors that files without ranks have."""
  found = []
  for item in items:
    if item.split == "ranks":
      if item.shape[0] > 1:
        raise errors.InputError(
          f"{item.key} has a scale for each of {item.shape[0]} tensor-parallel ranks, which only glm130b-sat can hold"
        )
      item = dataclasses.replace(item, shape=item.shape[1:], parts=lambda parts=item.parts: (x[0] for x in parts()))
    found.append(item)
  return found


def write_safetensors(folder: paths.Path, items: Sequence[Item], shard_bytes: int = _SHARD_BYTES) -> None:
  """Writes model.safetensors, or shards of it with an index."""
  items = _one_rank(items)
  folder.mkdir(parents=True, exist_ok=True)
  groups = _grouped(items, shard_bytes)
  names = _shard_names("model", ".safetensors", len(groups))
  with _bar(items) as bar:
    for name, group in zip(names, groups):
      with (folder / name).open("wb") as file:
        file.write(tensors.safetensors_header({item.key: (item.dtype, item.shape) for item in group}))
        for item in group:
          lease.check()
          for part in item.parts():
            for piece in _pieces(part):
              file.write(piece)
          bar.update(item.nbytes)
  _write_index(folder, "model.safetensors.index.json", names, groups)


def _grouped(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
  groups: list[list[Item]] = [[]]
  for item in items:
    if groups[-1] and sum(other.nbytes for other in groups[-1]) + item.nbytes > shard_bytes:
      groups.append([])
    groups[-1].append(item)
  return groups


def _shard_names(stem: str, suffix: str, count: int) -> list[str]:
  if count == 1:
    return [stem + suffix]
  return [f"{stem}-{i + 1:05d}-of-{count:05d}{suffix}" for i in range(count)]


def _write_index(folder: paths.Path, index: str, names: Sequence[str], groups: Sequence[Sequence[Item]]) -> None:
  if len(names) > 1:
    total = sum(item.nbytes for group in groups for item in group)
    weight_map = {item.key: name for name, group in zip(names, groups) for item in group}
    publish.write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_ranks(folder: paths.Path, items: Sequence[Item], degree: int, iteration: str) -> None:
  """Writes `latest` and <iteration>/mp_rank_XX_model_states.pt.

  Raises:
    errors.InputError: when a tensor does not divide among the ranks.
  """
  for item in items:
    divides = {
      "rows": item.shape[0] // item.groups % degree == 0,
      "inputs": item.shape[-1] % degree == 0,
      "none": True,
      "ranks": degree % item.shape[0] == 0,
    }
    if not divides[item.split]:
      what = f"has scales for {item.shape[0]} ranks" if item.split == "ranks" else f"{list(item.shape)} does not divide"
      raise errors.InputError(f"tensor_parallel is {degree}, and {item.key} {what}: choose another degree")
  (folder / iteration).mkdir(parents=True, exist_ok=True)
  shapes = {item.key: (item.dtype, merged.part_shape(item.shape, item.split, degree)) for item in items}
  with _bar(items) as bar, contextlib.ExitStack() as stack:
    files = [folder / iteration / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(degree)]
    writers = [stack.enter_context(torch_files.TorchWriter(path, shapes, "module")) for path in files]
    for item in items:
      lease.check()
      whole = item.whole()
      for rank, writer in enumerate(writers):
        writer.write(_pieces(merged.part(whole, item.split, item.groups, rank, degree)))
      bar.update(item.nbytes)
  (folder / "latest").write_text(iteration, encoding="utf-8")


def write_hub_configs(
  folder: paths.Path, model: config_lib.GLMConfig, bits: int | None, tokenizer: tokenizer_lib.Tokenizer | None
) -> None:
  """Writes config.json, and the tokenizer's two files."""
  config = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "position_encoding_2d": True,
    "auto_map": {
      "AutoConfig": "configuration_chatglm.ChatGLMConfig",
      "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
      "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "vocab_size": model.vocab_size,
    "num_layers": model.num_layers,
    "hidden_size": model.embed_dim,
    "num_attention_heads": model.num_heads,
    "inner_hidden_size": model.mlp_dim,
    "max_sequence_length": model.max_length,
    "layernorm_epsilon": model.layer_norm_epsilon,
    "torch_dtype": model.param_dtype,
    "use_cache": True,
    "quantization_bit": bits or 0,
    "tie_word_embeddings": model.tie_embeddings,
  }
  if model.prefix_length:
    config |= {"pre_seq_len": model.prefix_length, "prefix_projection": False}
  if tokenizer is not None:
    specials = tokenizer.specials
    config |= {
      "bos_token_id": specials.sop,
      "eos_token_id": specials.eop,
      "mask_token_id": specials.mask,
      "gmask_token_id": specials.gmask,
      "pad_token_id": specials.pad,
    }
    described = {
      "tokenizer_class": "ChatGLMTokenizer",
      "num_image_tokens": tokenizer.num_image_tokens,
      "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
      "bos_token": "<sop>",
      "eos_token": "<eop>",
      "end_token": "</s>",
      "gmask_token": "[gMASK]",
      "mask_token": "[MASK]",
      "pad_token": "<pad>",
      "unk_token": "<unk>",
      "do_lower_case": False,
      "remove_space": False,
      "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    (folder / "ice_text.model").write_bytes(tokenizer.model)
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
