"""Models of random weights in THUDM's files, of any size: for tests and benchmarks, which need none of the published.

What belongs to the format is `glmjax.thudm.write`'s; here are the numbers, and the pickles that ChatGLM-6B came in.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
import pathlib

import ml_dtypes
import numpy as np

from glmjax.checkpoint import arrays
from glmjax.models import config as config_lib
from glmjax.thudm import layouts
from glmjax.thudm import prefix as prefix_lib
from glmjax.thudm import torch_files
from glmjax.thudm import write


def random_items(
  family: str,
  model: config_lib.GLMConfig,
  bits: int | None = None,
  dtype: str = "float16",
  groups: int = 1,
  seed: int = 0,
) -> list[write.Item]:
  """A model of random weights: linears and tables as DeepNorm starts them, norms near 1, small biases.

  Large tensors repeat a few megabytes, so that they cost no more than writing them.
  """
  model = dataclasses.replace(model, param_dtype=dtype)
  items, kept = [], np.dtype(arrays.zarr_dtype(dtype))
  every = layouts.entries(family, dataclasses.replace(model, tie_embeddings=family != "chatglm-6b"))
  for entry, layer in write.by_layer(every, model.num_layers):
    key = entry.key.format(layer)
    rows = math.prod(entry.rows)
    name = every[0].key if entry.name == "head/kernel" and model.tie_embeddings else key
    make = _random(name, seed, entry.their_shape(bits), entry.inputs, dtype, entry.kernel and bits)
    if not (bits and entry.kernel):
      items.append(write.Item(key, kept, entry.their_shape(), make, entry.split, entry.groups))
      continue
    items.append(write.Item(key, np.dtype(np.int8), entry.their_shape(bits), make, entry.split, entry.groups))
    count, split = (groups, "ranks") if entry.split == "inputs" else (1, entry.split)
    shape = (count, rows) if split == "ranks" else (rows,)
    step = math.sqrt(1 / math.prod(entry.inputs)) * 2 / (7 if bits == 4 else 127)

    def scales(shape=shape, step=step, key=key):
      return iter([(np.random.default_rng([seed, *key.encode()]).uniform(0.5, 1, shape) * step).astype(np.float16)])

    items.append(write.Item(key + "_scale", np.dtype(np.float16), shape, scales, split, entry.groups))
  if model.position_kind.rotary_parts:
    frequencies = layouts.inv_freq(model)
    items += [
      write.Item(layouts.INV_FREQ.format(i), frequencies.dtype, frequencies.shape, lambda: iter([frequencies]))
      for i in range(model.num_layers)
    ]
  if model.prefix_length:  # float32 and of spread 1, as ptuning/ starts and keeps it
    shape = (model.prefix_length, 2 * model.num_layers * model.embed_dim)

    def table():
      return iter([np.random.default_rng(seed).standard_normal(shape, np.float32)])

    items.append(write.Item(prefix_lib.TABLE, np.dtype(np.float32), shape, table))
  return items


def _random(
  key: str, seed: int, shape: tuple[int, ...], inputs: tuple[int, ...], dtype: str, codes: object
) -> Callable[[], Iterator[np.ndarray]]:
  """Makes the tensor `key`, the same at every call."""

  def make() -> Iterator[np.ndarray]:
    rng, count = np.random.default_rng([seed, *key.encode()]), min(math.prod(shape), 2**20 + 7)
    if codes:
      some = rng.integers(-127, 128, count, np.int8)
    else:
      some = rng.standard_normal(count, np.float32) * np.float32(math.prod(inputs) ** -0.5 if inputs else 0.02)
      some = (some + (1 if "layernorm.weight" in key else 0)).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
      )
    yield np.resize(some, shape)

  return make


def write_bin(folder: pathlib.Path, items: Sequence[write.Item], shard_bytes: int = write._SHARD_BYTES) -> None:
  """pytorch_model.bin, or shards of it with an index: how ChatGLM-6B was first published."""
  items = write._one_rank(items)
  folder.mkdir(parents=True, exist_ok=True)
  groups = write._grouped(items, shard_bytes)
  names = write._shard_names("pytorch_model", ".bin", len(groups))
  for name, group in zip(names, groups):
    writer = torch_files.TorchWriter(folder / name, {item.key: (item.dtype, item.shape) for item in group})
    for item in group:
      writer.write(piece for part in item.parts() for piece in write._pieces(part))
    writer.close()
  write._write_index(folder, "pytorch_model.bin.index.json", names, groups)
