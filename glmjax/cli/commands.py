"""The table of subcommands: which function of the library each one is, and its flags."""

import dataclasses
from pathlib import Path

from glmjax import ranges
from glmjax.cli import corpus, doctor, evaluation, hosts, inference, inputs, plans, weights
from glmjax.cli.flags import Command, Flag
from glmjax.models import config as config_lib

_64_BITS = {"least": -(1 << 63), "most": (1 << 63) - 1}

CHECKPOINT = Flag("--checkpoint", "a training run's or an exported model's folder", Path)
ADAPTER = Flag("--adapter", "a run that trained an adapter of the model: LoRA, P-Tuning v2 (the model alone)", Path)
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
  Flag("--seed", "seed of the sampling", int, **_64_BITS),
  Flag("--no_repeat_ngram", "generate no n-gram of this size twice (0: as it comes)", int, least=0, most=64),
  Flag(
    "--repetition_penalty", "makes tokens that are there already less likely (1: does not)", float, above=0, most=100
  ),
)


def _of(group: str, *flags: Flag) -> tuple[Flag, ...]:
  """Returns the flags as those that set fields of a group."""
  return tuple(dataclasses.replace(flag, of=group) for flag in flags)


DEVICE_FLAGS = _of(
  DEVICES,
  MESH,
  Flag("--offload_layers", "layers, the last, whose weights stay in the host's memory (0)", int, least=0),
  ADAPTER,
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
DRAFTS = _of(
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
SHARED = (*DEVICE_FLAGS, *hosts.FLAGS)
KV_CACHE = _of(
  DEVICES,
  Flag(
    "--kv_cache_dtype",
    "int8 keeps the keys and values of what is answered in half the memory of bfloat16 (as they are computed)",
    choices=config_lib.KV_CACHE_DTYPES,
  ),
)
COMMANDS = {
  command.name: command
  for command in (
    Command(
      "text",
      "glmjax.data.text.fetch_sample_text",
      "fetch a few MB of English and Chinese text",
      "glmjax text --directory=runs/text",
      (Flag("--directory", "where to put the text", Path),),
    ),
    Command(
      "tokenizer",
      "glmjax.tokenizer.train",
      "train a tokenizer on the training split's text",
      "glmjax tokenizer --gin_file=runs/quickstart.gin --folder=runs/tokenizer",
      (
        Flag("--folder", "where to put the tokenizer", Path),
        Flag("--vocab_size", "number of ids, special tokens included", int, least=1),
      ),
      describe=corpus.describe_tokenizer,
      folder="folder",
    ),
    Command(
      "cache",
      "glmjax.data.token_cache.cache_mixture",
      "tokenize a mixture once into shards on disk",
      "glmjax cache --gin_file=runs/quickstart.gin --directory=runs/cache",
      (
        Flag("--mixture", "name of a mixture of your own that is registered with seqio"),
        Flag("--directory", "where to put the shards", Path),
        Flag("--num_shards", "shards per task", int, least=1, most=ranges.MOST_SHARDS),
        Flag("--num_workers", "processes; 0: this one", int, least=0, most=ranges.MOST_WORKERS),
        Flag("--overwrite", "replace another cache there", bool, kind="passed"),
      ),
      folder="directory",
    ),
    Command(
      "train",
      "glmjax.train.loop.train",
      "train a model, or resume a run that was stopped",
      "glmjax train --gin_file=runs/quickstart.gin --workdir=runs/mine --gin.TOTAL_SAMPLES=3200",
      (
        Flag("--workdir", "folder of the run; a run found there is resumed", Path),
        Flag("--overwrite", "start anew over an existing run", bool, kind="passed"),
        Flag("--stop_at_step", "stop early at this step; the schedules stay as they are", int, least=1, kind="passed"),
        *hosts.FLAGS,
      ),
      prepare=hosts.check,
      within=hosts.training,
      folder="workdir",
    ),
    Command(
      "evaluate",
      "glmjax.evaluate.heldout.evaluate",
      "measure a model on held-out text",
      "glmjax evaluate --checkpoint=runs/mine --cache=runs/cache --out=runs/mine/heldout.json",
      (
        CHECKPOINT,
        Flag("--cache", "folder of the token cache", Path),
        Flag("--out", "JSON file to write", Path),
        MESH,
        ADAPTER,
        *hosts.FLAGS,
      ),
      prepare=hosts.check_mesh,
      within=hosts.evaluating,
      modes=(
        Command(
          "evaluate --tasks",
          "glmjax.cli.evaluation.evaluate",
          "put tasks to a model: questions with choices, texts to fill or go on with, texts to score",
          "glmjax evaluate --tasks=tasks/lambada.yaml --data=data --checkpoint=runs/mine --out=runs/mine-evaluated",
          (
            CHECKPOINT,
            Flag(
              "--tasks",
              "name of a task (docs/evaluation_tasks.md), YAML file, or folder of such",
              Path,
              repeatable=True,
            ),
            Flag("--data", "folder in which the tasks' paths are", Path),
            Flag("--out", "folder for each item's record and the report. A stopped run goes on", Path),
            Flag("--overwrite", "replace the records there", bool, kind="passed"),
            *_of(
              ITEMS,
              Flag("--limit", "only the first so many items of each file", int, least=1),
              Flag("--skip", "leave out what has no file, and items that the model has no room for", bool),
            ),
            *SHARED,
          ),
          groups={"items": ITEMS, "devices": DEVICES},
          prepare=hosts.check_mesh,
          within=hosts.evaluating,
          show=evaluation.show,
        ),
      ),
    ),
    Command(
      "compare",
      "glmjax.harness.compare.compare",
      "compare what tasks made of two models or more",
      "glmjax compare --json runs/float-evaluated runs/int8-evaluated runs/int4-evaluated",
      (Flag("runs", "folders that evaluate --tasks wrote", Path, repeatable=True),),
      show=evaluation.show_comparison,
      modes=(
        Command(
          "compare --toxicity",
          "glmjax.harness.toxicity.measure",
          "score the continuations of one model or more",
          "glmjax compare --toxicity=words runs/float-evaluated runs/int4-evaluated",
          (
            Flag("runs", "folders that evaluate --tasks=realtoxicityprompts wrote", Path, repeatable=True),
            Flag("--toxicity", "scorer: words, the name of an entry point, MODULE:FUNCTION, or a file of scores"),
          ),
          show=evaluation.show_comparison,
        ),
      ),
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
        Flag("--adapter", "a run that trained an adapter of the model, to be merged into it", Path),
        Flag("--tensor_parallel", "ranks of glm130b-sat (8)", int, kind="prepared", least=1, most=4096),
        Flag("--overwrite", "replace an export there", bool, kind="passed"),
      ),
      prepare=weights.export_format,
    ),
    Command(
      "import",
      "glmjax.thudm.load.import_model",
      "read GLM-130B, GLM-10B or ChatGLM-6B in its own files",
      "glmjax import --bits=4 chatglm-6b models/chatglm-6b runs/chatglm-6b-int4",
      (
        Flag("family", "whose files they are", choices=("glm-130b", "glm-10b", "chatglm-6b", "peft")),
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
        Flag("--base", "of peft: the folder of the model that was adapted", Path),
        Flag("--memory_limit_gib", "most memory to take, in GiB (about 1.2)", float, above=0),
        Flag("--overwrite", "replace an export there", bool, kind="passed"),
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
      show=weights.show_inspection,
      status=weights.status_of_inspection,
    ),
    Command(
      "generate",
      "glmjax.cli.inference.generate",
      "fill [MASK]s in a text, or continue it",
      "glmjax generate --checkpoint=runs/mine-int4 --prompt='The capital of France is [MASK].'",
      (
        CHECKPOINT,
        Flag("--prompt", "text with [MASK] or [gMASK] (repeatable)", repeatable=True, kind="prepared"),
        Flag(
          "--file",
          'file of prompts, one a line, or JSON lines with a "prompt"; - is standard input',
          Path,
          kind="prepared",
        ),
        *_of(
          DECODING,
          Flag("--max_tokens", "most tokens to generate for each blank", int, least=1),
          *SAMPLING,
          Flag("--min_tokens", "fewest tokens to generate for each blank (0)", int, least=0),
          Flag("--num_beams", "beams of a beam search, in place of sampling (1: none)", int, least=1, most=64),
          Flag("--length_penalty", "of beam search: above 0 favours longer texts (1)", float, least=-100, most=100),
        ),
        *_of(
          OUTPUT,
          Flag("--out", "JSON lines file for the answers; - is standard output. A stopped run goes on", Path),
          Flag("--overwrite", "replace the answers there", bool),
          Flag("--samples", "JSON lines file to add prompts and outputs to", Path),
          Flag("--label", "what the model is called there (the folder's name)"),
        ),
        *DRAFTS,
        *KV_CACHE,
        *SHARED,
      ),
      groups={"decoding": DECODING, "drafting": DRAFTING, "output": OUTPUT, "devices": DEVICES},
      prepare=inputs.check_prompts,
      reads={"prompts": inputs.prompts},
      within=hosts.sharing,
      show=inference.show_outputs,
    ),
    Command(
      "chat",
      "glmjax.cli.chat.chat",
      "talk with a model in the terminal, or a line a turn from a pipe",
      "glmjax chat --checkpoint=runs/mine-int4",
      (
        CHECKPOINT,
        Flag("--max_length", "most tokens of prompt and answer together", int, least=4),
        Flag("--answer_tokens", "tokens that old rounds leave to the answer", int, least=1),
        *_of(DRAWING, *SAMPLING),
        *DRAFTS,
        *KV_CACHE,
        *SHARED,
      ),
      groups={"drawing": DRAWING, "drafting": DRAFTING, "devices": DEVICES},
      prepare=hosts.check_mesh,
      within=hosts.sharing,
      show=inference.show_nothing,
    ),  # they were shown as they came
    Command(
      "score",
      "glmjax.cli.inference.score",
      "how likely a model finds a text, or each of some choices",
      "glmjax score --checkpoint=runs/mine --context='The sky is [MASK].' --choice=blue --choice=green",
      (
        CHECKPOINT,
        Flag("--text", "text to score (repeatable)", repeatable=True, kind="prepared"),
        Flag("--context", "what stands before the texts, or around the [MASK] that the choices fill", kind="prepared"),
        Flag("--choice", "what may fill the context's blank (repeatable)", repeatable=True, kind="prepared"),
        Flag(
          "--file",
          'file of texts, one a line, or JSON lines with a "text" (and a "context"), or a '
          '"context" and "choices"; - is standard input',
          Path,
          kind="prepared",
        ),
        *SHARED,
      ),
      groups={"devices": DEVICES},
      prepare=inputs.check_texts,
      reads={"texts": inputs.texts},
      within=hosts.sharing,
    ),
    Command(
      "serve",
      "glmjax.cli.serve.serve",
      "serve a model over HTTP as OpenAI does, with a page to chat with it",
      "glmjax serve --checkpoint=runs/mine-int4",
      (
        CHECKPOINT,
        Flag("--host", "address to listen at (127.0.0.1: only this machine reaches it)"),
        Flag("--port", "of it (8000); 0: any that is free", int, least=0, most=65535),
        Flag("--name", "what requests call the model (the folder's name)"),
        Flag("--api_keys", "file of keys, one a line, of which a request must send one", Path),
        Flag("--log_prompts", "have what is asked in the log, not only how much", bool),
        *_of(
          LIMITS,
          Flag("--lanes", "requests in one program (8)", int, least=1, most=1024),
          Flag("--requests", "requests that are answered at the same time (64)", int, least=1, most=4096),
          Flag("--queue", "requests that wait beside those (256)", int, least=1),
          Flag("--cache_gib", "memory for the answers' caches, in GiB (half of what is free)", float, above=0),
          Flag("--body_bytes", "most bytes of a request (1048576)", int, least=1),
          Flag("--drain_seconds", "what running answers have once a signal has come (60)", float, least=0),
        ),
        *DRAFTS,
        *KV_CACHE,
        *DEVICE_FLAGS,
      ),
      groups={"limits": LIMITS, "drafting": DRAFTING, "devices": DEVICES},
      show=inference.show_nothing,
    ),
    Command(
      "plan",
      "glmjax.plan.planner.plan",
      "compile for hardware that is elsewhere, and say what it takes",
      "glmjax plan --gin_file=plans/glm_130b_int4_rtx3090_4.gin --target=rtx3090:8 --gin.TENSOR=8",
      (
        Flag("--target", "devices, as a100-40:768 or v5p:4x8x8"),
        Flag("--token_budget", "tokens of a whole training or evaluation: days, energy", int, least=1, most=1 << 60),
        Flag("--search", "rank meshes, micro-batches and remats for the target", bool, kind="passed"),
        Flag("--tries", "most programs to compile in a search (8)", int, least=1, kind="passed"),
      ),
      prepare=plans.prepare,
      show=plans.show,
      modes=(
        Command(
          "plan --fits",
          "glmjax.plan.fits.smallest",
          "the smallest set of each GPU that runs each model",
          "glmjax plan --fits --model=130b --bits=4 --out=runs/fits.jsonl",
          (
            Flag(
              "--model", "of the models (repeatable)", choices=tuple(plans.MODELS), repeatable=True, kind="prepared"
            ),
            Flag("--bits", "16, 8 or 4 (repeatable)", int, (16, 8, 4), repeatable=True, kind="prepared"),
            Flag("--context", "512, 1024, 2048 or any (repeatable)", int, least=1, repeatable=True, kind="prepared"),
            Flag("--gpu", "a100-40, rtx3090, ... (repeatable)", repeatable=True, kind="prepared"),
            Flag("--layers", "layers of the programs that are compiled (8); 0: all", int, least=0, kind="passed"),
            Flag("--out", "JSON lines file of what was compiled; a stopped run goes on", Path, kind="passed"),
          ),
          prepare=plans.prepare_fits,
          show=plans.show_fits,
        ),
      ),
    ),
    Command(
      "doctor",
      "glmjax.doctor.examine",
      "what is installed, on which devices, and which kernel computes what there",
      "glmjax doctor",
      (Flag("--bucket", "a folder in a bucket to try instead: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER", Path),),
      show=doctor.show,
    ),
    Command(
      "launch",
      "glmjax.launch.scripts",
      "list the scripts that start training on many hosts, and copy them",
      "glmjax launch --out=launch",
      (Flag("--out", "folder to copy them to", Path),),
      show=doctor.show_scripts,
    ),
    Command(
      "report",
      "glmjax.evaluate.report.write",
      "gather a run's results into report.md and report.json",
      "glmjax report --gin_file=runs/quickstart.gin --workdir=runs/quickstart",
      (Flag("--workdir", "folder of the run", Path),),
    ),
  )
}


def targets() -> list[str]:
  """Returns full names of all functions that commands call, and of the groups of their settings."""
  every = [command for top in COMMANDS.values() for command in (top, *top.modes)]
  return [name for command in every for name in (command.target, *command.groups.values())]
