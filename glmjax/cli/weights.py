"""The commands that read weights, and write them in other forms: weights, export, import, inspect."""

import argparse
from pathlib import Path
from typing import Any

from glmjax import errors
from glmjax.cli.flags import Command, Flag
from glmjax.cli.shared_flags import CHECKPOINT
from glmjax.io import paths


def export_format(options: argparse.Namespace) -> dict[str, Any]:
  """Returns export's `write_format`; of our own format its layout, where it is another than Orbax's."""
  if options.format in (None, "orbax", "cpu"):
    if options.tensor_parallel is not None:
      raise errors.InputError("--tensor_parallel is for --format=glm130b-sat; our own format loads on any mesh")
    return {"layout": "cpu"} if options.format == "cpu" else {}

  def write(content: Any, folder: paths.Path) -> None:
    from glmjax.thudm import write as write_lib  # here, as flags are looked at before JAX is loaded

    write_lib.write_format(options.format, options.tensor_parallel)(content, folder)

  return {"write_format": write}


def show_inspection(report: dict[str, Any]) -> None:
  """Prints what glmjax.thudm.inspection found."""
  from glmjax.thudm import inspection

  inspection.show(report)


def status_of_inspection(report: dict[str, Any]) -> int:
  """Returns the exit status of the inspect command: 2, that of mistakes to mend, where there is a problem."""
  return 2 if report["problem"] else 0


def show_tables(result: dict[str, Any]) -> None:
  """Prints what glmjax.study.weights found as tables in Markdown."""
  from glmjax.study import weights_table

  print(weights_table.tables(result))


COMMANDS = (
  Command(
    "weights",
    "glmjax.study.weights.measure",
    "how models' weights are spread, and what rounding them costs",
    "glmjax weights --label=GLM --label=GPT --out=runs/weights runs/mine runs/causal",
    (
      Flag("checkpoints", "folders of training runs and float exports", Path, repeatable=True),
      Flag("--out", "folder for weights.json, weights.md and weights.png", Path),
      Flag("--cache", "folder of the token cache whose held-out text they read, rounded too (none)", Path),
      Flag("--label", "what to call each checkpoint, in their order (their folders' names)", repeatable=True),
    ),
    show=show_tables,
  ),
  Command(
    "export",
    "glmjax.checkpoint.export.export",
    "write a float, INT8 or INT4 model from a training run, or give one back in THUDM's layout",
    "glmjax export --checkpoint=runs/mine --bits=4 --out=runs/mine-int4",
    (
      CHECKPOINT,
      Flag("--out", "folder to write", Path),
      Flag("--bits", "weight bits (without it: as they are)", int, choices=(8, 4)),
      Flag("--dtype", "of the float parameters: float32, bfloat16 or float16"),
      Flag(
        "--format",
        "whose layout (orbax: ours; cpu: ours, to be mapped into memory by CPUs)",
        kind="prepared",
        choices=("orbax", "cpu", "safetensors", "chatglm-hf", "glm130b-sat", "peft"),
      ),
      Flag("--adapter", "an adapter of the model, to be merged into it: a run that trained it, or its export", Path),
      Flag("--tensor_parallel", "ranks of glm130b-sat (8)", int, kind="prepared", least=1, most=4096),
      Flag("--overwrite", "replace an export there", bool, kind="passed"),
    ),
    prepare=export_format,
  ),
  Command(
    "import",
    "glmjax.thudm.load.import_model",
    "read GLM-130B, GLM-10B or ChatGLM-6B in its own files",
    "glmjax import --bits=4 chatglm-6b models/chatglm-6b runs/chatglm-6b-int4",
    (
      Flag("family", "whose files they are", choices=("glm-130b", "glm-10b", "chatglm-6b")),
      Flag("source", "folder of the files", Path),
      Flag("out", "folder to write", Path),
      Flag("--dtype", "of the float parameters (as in the files)"),
      Flag("--bits", "weight bits (as in the files)", int, choices=(8, 4)),
      Flag("--tokenizer", "ice_text.model or a tokenizer folder (the one in the source folder)", Path),
      Flag("--num_heads", "attention heads of a GLM whose heads are not 64 wide", int, least=1),
      Flag(
        "--rotary_rounding",
        "of cosines and sines (half_table, as the published models were run)",
        choices=("none", "half_frequencies", "half_table"),
      ),
      Flag("--prefix", "folder or file of a P-Tuning v2 prefix of chatglm-6b", Path),
      Flag("--memory_limit_gib", "most memory to take, in GiB (about 1.2)", float, above=0),
      Flag("--overwrite", "replace an export there", bool, kind="passed"),
    ),
    modes=(
      Command(
        "import --base",
        "glmjax.thudm.load.import_adapter",
        "read a LoRA adapter in PEFT's files, or a prefix in ptuning's",
        "glmjax import --base=runs/chatglm-6b-int4 peft-adapter runs/my-adapter",
        (
          Flag("--base", "folder of the model that was adapted", Path),
          Flag("source", "folder that PEFT or ptuning/ wrote", Path),
          Flag("out", "folder to write", Path),
          Flag("--overwrite", "replace an export there", bool, kind="passed"),
        ),
      ),
    ),
  ),
  Command(
    "inspect",
    "glmjax.thudm.inspection.inspect",
    "tell what a folder or file of weights holds",
    "glmjax inspect --hashes models/chatglm-6b",
    (
      Flag("path", "a training run, an export, a model in THUDM's files, or one file", Path),
      Flag("--hashes", "read everything: sha256 of their files, our checksums verified", bool, kind="passed"),
    ),
    show=show_inspection,
    status=status_of_inspection,
  ),
)
