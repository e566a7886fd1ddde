"""LoRA adapters in PEFT's layout, whose modules are those of the original's code: query_key_value stays fused.

adapter_config.json   adapter_model.safetensors
"""

from collections.abc import Iterable, Sequence
import dataclasses
import json

import numpy as np

from glmjax import errors
from glmjax import ranges
from glmjax.checkpoint import export
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import user_json
from glmjax.models import config as config_lib
from glmjax.thudm import layouts
from glmjax.thudm import tensors
from glmjax.thudm import torch_files

NAME = "peft"  # of the format
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"  # of PEFT before 0.7
_LARGEST_RANK = 1 << 16
_PREFIX = "base_model.model."  # PEFT's, of all keys
_MODULES = {module.split(".")[-1]: path for path, module in layouts.KERNELS.items()}
_READ = ("r", "lora_alpha", "use_rslora")
# What else decides what factors do, with the values that LoRA here stands for. Of how they begin, what is not here is
# of a base that was changed.
_PLAIN = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "fan_in_fan_out": (False, None),
  "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
# The rest must be nothing, but for what has no effect on factors that are there.
_WITHOUT_EFFECT = (
  "target_modules",
  "auto_mapping",
  "base_model_name_or_path",
  "revision",
  "inference_mode",
  "task_type",
  "peft_version",
  "lora_dropout",
  "exclude_modules",
  "loftq_config",
  "megatron_config",
  "megatron_core",
  "layers_pattern",
  "qalora_group_size",
)


def write(content: export.ExportSource, folder: paths.Path) -> None:
  """Writes an adapter.

  Raises:
    errors.InputError: for what is no LoRA adapter.
  """
  model = content.config.model
  if not content.config.base or not model.lora_rank:
    raise errors.InputError(f"the format {NAME} is for LoRA adapters: give the run that trained one")
  weights = {weight.name: weight for weight in content.weights}
  arrays: dict[str, np.ndarray] = {}
  for entry in layouts.adapters(_family(model), model):
    weight = weights[entry.name]
    found = content.read(weight, tuple(slice(0, n) for n in weight.shape))[entry.name]
    for key, x in zip(entry.keys(model.num_layers), found, strict=True):
      arrays[_PREFIX + key] = np.ascontiguousarray(entry.to_theirs(np.asarray(x, np.float32)))
  content.verify()
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / _TENSORS).open("wb") as file:
    file.write(tensors.safetensors_header({key: (x.dtype, x.shape) for key, x in arrays.items()}))
    for x in arrays.values():
      file.write(x.tobytes())
  modules = {path: module for module, path in _MODULES.items()}
  publish.write_json(
    folder / _CONFIG,
    {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": content.config.base["folder"],
      "inference_mode": True,
      "r": model.lora_rank,
      "lora_alpha": model.lora_scale * model.lora_rank,
      "lora_dropout": model.lora_dropout,
      "target_modules": [modules[path] for path in model.adapted],
      "bias": "none",
      "fan_in_fan_out": False,
    },
  )


def is_there(folder: paths.Path) -> bool:
  """Tells whether a folder holds what PEFT writes."""
  return (folder / _CONFIG).exists()


def read(
  folder: paths.Path, base: paths.Path, model: config_lib.GLMConfig
) -> tuple[config_lib.GLMConfig, dict[str, np.ndarray]]:
  """Reads an adapter that PEFT wrote: the configuration of the model with it, and its parameters, float32.

  Args:
    folder: PEFT's.
    base: the folder of the model that it adapts.
    model: what is in there.

  Raises:
    errors.InputError: where it is of another model, damaged, or does what LoRA here does not.
  """
  path, read_file = folder / _TENSORS, tensors.open_safetensors
  if not path.exists() and (folder / _PICKLED).exists():
    path, read_file = folder / _PICKLED, torch_files.open_state_dict
  there = read_file(path)
  model = _settings(folder / _CONFIG, model, _kernels(there))
  arrays: dict[str, np.ndarray] = {}
  for entry in layouts.adapters(_family(model), model):
    layers = []
    for key in entry.keys(model.num_layers):
      tensor, shape = there.pop(_PREFIX + key, None), entry.their_shape()
      if tensor is None or tensor.shape != shape:
        has = "is missing" if tensor is None else f"has {list(tensor.shape)}"
        raise errors.InputError(f"{path}: {key} {has}, and {base} takes {list(shape)}: another model's?")
      layers.append(entry.to_ours(tensor.whole().astype(np.float32), [slice(0, size) for size in entry.rows]))
    arrays[entry.name] = np.stack(layers)
    if not np.isfinite(arrays[entry.name]).all():
      raise errors.NotFiniteError(f"{path}: {entry.name} is not finite: train it anew")
  if there:
    raise errors.InputError(f"{path}: {min(there)} is of no kernel that {base} has")
  return model, arrays


def _settings(path: paths.Path, model: config_lib.GLMConfig, kernels: Sequence[str]) -> config_lib.GLMConfig:
  """Returns the model with the adapter that PEFT's adapter_config.json describes, beside these kernels."""
  content = user_json.read(path, expected="give the folder that PEFT wrote")
  for name, value in content.items():
    if name not in (*_READ, *_WITHOUT_EFFECT) and value not in _PLAIN.get(name, (None, False, [], {})):
      raise errors.InputError(f"{path}: {name} is {json.dumps(value)[:60]}, which LoRA here does not know")
  try:
    rank, alpha, stabilized = content.get("r"), content.get("lora_alpha"), content.get("use_rslora") or False
    ranges.whole("r", rank, 1, _LARGEST_RANK)
    ranges.number("lora_alpha", alpha, above=0, most=ranges.LARGEST)
    ranges.flag("use_rslora", stabilized)
    scale = alpha / (rank**0.5 if stabilized else rank)
    return dataclasses.replace(model, lora_rank=rank, lora_kernels=",".join(kernels), lora_scale=scale)
  except errors.InputError as error:
    raise errors.InputError(f"{path}: {error}") from error


def _kernels(keys: Iterable[str]) -> list[str]:
  """Returns the kernels that these keys are factors of, in the order of KERNELS."""
  modules = {key.split(".")[-3] for key in keys if key.count(".") > 3}
  return [path for path in config_lib.KERNELS if layouts.KERNELS[path].split(".")[-1] in modules]


def _family(model: config_lib.GLMConfig) -> str:
  if not model.position_kind.rotary_parts:
    raise errors.InputError("PEFT's layout is known for ChatGLM-6B and GLM-130B, not for GLM-10B and its kin")
  return "chatglm-6b"
