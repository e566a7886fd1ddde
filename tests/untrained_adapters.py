"""Adapters with random factors beside an untrained model, each of another rank, scale and choice of kernels."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load
from glmjax.checkpoint import manager
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib

LORA = {
  "wide": {"lora_rank": 6, "lora_kernels": ",".join(config_lib.KERNELS), "lora_scale": 0.3},
  "narrow": {"lora_rank": 2, "lora_kernels": "attention/qkv", "lora_scale": 2.0},
  "mlp": {"lora_rank": 3, "lora_kernels": "mlp/wi,mlp/wo", "lora_scale": 1.0},
}


def write(base: pathlib.Path, folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes an adapter of each kind beside the model in `base`; returns their folders by name."""
  found = {}
  for seed, (name, settings) in enumerate(LORA.items()):
    found[name] = write_one(base, folder / name, seed, settings)
  return found


def write_one(base: pathlib.Path, run: pathlib.Path, seed: int, settings: dict) -> pathlib.Path:
  """Writes the run of one adapter, LoRA or a prefix, and returns its folder."""
  of_base = folder_lib.read_config(base)
  config = dataclasses.replace(of_base.model, **settings)
  own = {
    path: 0.4 * jax.random.normal(jax.random.key(100 * seed + i), param.shape)
    for i, (path, param) in enumerate(params_lib.table(config).items())
    if path not in params_lib.table(of_base.model)
  }
  named = {"folder": str(base), "fingerprint": load.fingerprint(base), "bits": None}
  run.mkdir(parents=True)
  folder_lib.write_config(run, folder_lib.FolderConfig(config, {}, {}, base=named))
  saver = manager.Manager(run / "checkpoints")
  saver.save(1, {"params": params_lib.nest(own), "step": jnp.int32(1)}, {"samples_seen": 1})
  saver.close()
  return run
