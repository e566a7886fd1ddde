"""Flags that several commands have, and the groups of settings that flags belong to."""

import dataclasses
from pathlib import Path

from glmjax.cli import hosts
from glmjax.cli.flags import Flag
from glmjax.models import config as config_lib

SEEDS = {"least": -(1 << 63), "most": (1 << 63) - 1}

CHECKPOINT = Flag("--checkpoint", "a training run's or an exported model's folder", Path)
ADAPTER = Flag(
  "--adapter", "an adapter of the model, LoRA or P-Tuning v2: a run that trained it, or its export (none)", Path
)
DEVICES = "glmjax.cli.inference.Devices"
DRAFTING = "glmjax.cli.inference.Drafting"
DECODING = "glmjax.cli.inference.Decoding"
OUTPUT = "glmjax.cli.inference.Output"
DRAWING = "glmjax.cli.chat.Drawing"
ITEMS = "glmjax.cli.evaluation.Items"
LIMITS = "glmjax.cli.serve.Limits"
MESH = Flag(
  "--mesh",
  "devices to split the model over, as tensor=4 or data=2,tensor=4, or a gin file of a mesh (the first alone)",
  makes="glmjax.parallel.mesh.MeshConfig",
)
SAMPLING = (
  Flag("--temperature", "0 picks the likeliest token (greedy)", float, least=0),
  Flag("--top_k", "sample among the k likeliest tokens", int, least=0),
  Flag("--top_p", "sample among the likeliest tokens that together reach probability p", float, above=0, most=1),
  Flag("--seed", "seed of the sampling", int, **SEEDS),
  Flag("--no_repeat_ngram", "generate no n-gram of this size twice (0: as it comes)", int, least=0, most=64),
  Flag(
    "--repetition_penalty", "makes tokens that are there already less likely (1: does not)", float, least=0.01, most=100
  ),
)


def of_group(group: str, *flags: Flag) -> tuple[Flag, ...]:
  """Returns the flags as those that set fields of a group."""
  return tuple(dataclasses.replace(flag, of=group) for flag in flags)


DEVICE_FLAGS = of_group(
  DEVICES,
  MESH,
  Flag("--offload_layers", "layers, the last, whose weights stay in the host's memory (0)", int, least=0),
  Flag(
    "--activation_bits",
    "8 rounds what INT4 and INT8 weights are multiplied with, which is faster on CPUs (floats as they are)",
    int,
    choices=config_lib.BITS["activation_bits"],
  ),
  Flag(
    "--head_bits",
    "quantizes the head as it is loaded, which is faster on CPUs (as it is)",
    int,
    choices=config_lib.BITS["head_bits"],
  ),
)
DRAFTS = of_group(
  DRAFTING,
  Flag(
    "--drafts",
    "tokens read ahead, as they followed the same ones before, which is faster (serve: 7; else 0)",
    int,
    least=0,
    most=7,
  ),
  Flag("--draft_model", "folder of a small model of the same tokenizer, whose tokens are read ahead instead", Path),
)
SHARED = (*DEVICE_FLAGS, *of_group(DEVICES, ADAPTER), *hosts.FLAGS)
ADAPTERS = of_group(
  DEVICES,
  Flag(
    "--adapter",
    "an adapter of the model, always on (none); or as NAME=FOLDER, once for each (LoRA), on where it is asked for",
    repeatable=True,
  ),
)
KV_CACHE = of_group(
  DEVICES,
  Flag(
    "--kv_cache_dtype",
    "int8 keeps the keys and values of what is answered in half the memory of bfloat16 (as they are computed)",
    choices=config_lib.KV_CACHE_DTYPES,
  ),
)
