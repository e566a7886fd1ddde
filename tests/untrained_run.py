"""A run of an untrained model, with a tokenizer."""

import pathlib

import jax
import jax.numpy as jnp

from glmjax import tokenizer as tokenizer_lib
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager
from glmjax.io import tokenizer_folder
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import compute

CONFIG = config_lib.GLMConfig(
  vocab_size=440, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=256, init_std=0.3
)
_TEXT = [f"On day {i} the quick brown fox jumps over {i} lazy dogs. 第{i}天，小河边的柳树发芽了。" for i in range(60)]


def write(run: pathlib.Path, seed: int = 1) -> pathlib.Path:
  """Writes the run's folder, and returns it."""
  tokenizer_lib.train(_TEXT, run / folder_lib.TOKENIZER, vocab_size=CONFIG.vocab_size)
  described = tokenizer_folder.read(run / folder_lib.TOKENIZER)
  folder_lib.write_config(run, folder_lib.FolderConfig(CONFIG, {}, described))
  saver = manager.Manager(run / "checkpoints")
  saver.save(1, {"params": glm.init_params(CONFIG, jax.random.key(seed)), "step": jnp.int32(1)}, {"samples_seen": 1})
  saver.close()
  return run


def write_session(run: pathlib.Path) -> None:
  """Writes what a run of no steps records of itself; of each call it is another run."""
  (run / "compute.jsonl").unlink(missing_ok=True)
  session = compute.Session(run / "compute.jsonl", mesh_lib.make_mesh(mesh_lib.MeshConfig()))
  session.begin(0)
  session.close()
