"""The table of subcommands, and what is common to all of them: flags, gin, results."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import glmjax
from glmjax import errors, gin_files, signatures
from glmjax.io import publish
from glmjax.cli import corpus, hosts, inference, inputs, plans, process, weights

GIN_HELP = "gin file, searched here and then among glmjax's own (repeatable)"


@dataclasses.dataclass(frozen=True)
class Flag:
  """A command-line flag for one parameter of the command's function, which bears its name.

  A name without dashes is that of a positional argument.
  """

  name: str
  help: str
  type: Callable[[str], Any] = str
  choices: tuple[Any, ...] | None = None
  repeatable: bool = False
  kind: str = "bound"  # by gin, and so in config.gin; "passed": to this call alone; "prepared": for `prepare`

  @property
  def parameter(self) -> str:
    return self.name.removeprefix("--")


@dataclasses.dataclass(frozen=True)
class Command:
  """One subcommand: a function of the library under gin."""

  name: str
  target: str  # full name of the function
  help: str
  example: str
  flags: tuple[Flag, ...] = ()
  prepare: Callable[[argparse.Namespace], dict[str, Any]] | None = None  # arguments of the call
  describe: Callable[[Any], Any] | None = None  # the function's result as the command's
  show: Callable[[Any], None] | None = None  # prints the result for people
  status: Callable[[Any], int] | None = None  # the exit status that the result asks for; None: 0
  folder: str | None = None  # the parameter that names the folder which config.gin is written to
  begin: Callable[[argparse.Namespace], None] | None = None  # called before the function, when all is in order
  modes: tuple["Command", ...] = ()  # named "plan --fits": what the command is instead with that flag


CHECKPOINT = Flag("--checkpoint", "a training run's or an exported model's folder")
OFFLOAD = Flag("--offload_layers", "layers, the last, whose weights stay in the host's memory (0)", int)
SAMPLING = (
    Flag("--max_tokens", "most tokens to generate for each blank", int),
    Flag("--temperature", "0 picks the likeliest token (greedy)", float),
    Flag("--top_k", "sample among the k likeliest tokens", int),
    Flag("--top_p", "sample among the likeliest tokens that together reach probability p", float),
    Flag("--seed", "seed of the sampling", int),
)
COMMANDS = {command.name: command for command in (
    Command("text", "glmjax.data.text.fetch_sample_text", "fetch a few MB of English and Chinese text",
            "glmjax text --directory=runs/text", (Flag("--directory", "where to put the text"),)),
    Command("tokenizer", "glmjax.tokenizer.train", "train a tokenizer on the training split's text",
            "glmjax tokenizer --gin_file=runs/quickstart.gin --folder=runs/tokenizer",
            (Flag("--folder", "where to put the tokenizer"),
             Flag("--vocab_size", "number of ids, special tokens included", int)),
            describe=corpus.describe_tokenizer, folder="folder"),
    Command("cache", "glmjax.data.cache.cache_mixture", "tokenize a mixture once into shards on disk",
            "glmjax cache --gin_file=runs/quickstart.gin --directory=runs/cache",
            (Flag("--mixture_name", "name of the seqio mixture"),
             Flag("--directory", "where to put the shards"),
             Flag("--num_shards", "shards per task", int), Flag("--num_workers", "processes", int),
             Flag("--overwrite", "replace another cache there", bool, kind="passed")),
            folder="directory"),
    Command("train", "glmjax.train.loop.train", "train a model, or resume a run that was stopped",
            "glmjax train --gin_file=runs/quickstart.gin --workdir=runs/mine --gin.TOTAL_SAMPLES=3200",
            (Flag("--workdir", "folder of the run; a run found there is resumed"),
             Flag("--overwrite", "start anew over an existing run", bool, kind="passed"),
             Flag("--stop_at_step", "stop early at this step; the schedules stay as they are", int,
                  kind="passed"),
             Flag("--coordinator", "HOST:PORT of process 0, where no cluster tells it", kind="prepared"),
             Flag("--num_processes", "processes of the run, on all hosts", int, kind="prepared"),
             Flag("--process_id", "number of this one, from 0", int, kind="prepared"),
             Flag("--connect_seconds", "how long to wait for the other processes (300)", float, kind="prepared")),
            prepare=hosts.check, begin=hosts.begin, folder="workdir"),
    Command("evaluate", "glmjax.evaluate.heldout.evaluate", "measure a model on held-out text",
            "glmjax evaluate --checkpoint=runs/mine --cache=runs/cache --out=runs/mine/heldout.json",
            (CHECKPOINT, Flag("--cache", "folder of the token cache"), Flag("--out", "JSON file to write"))),
    Command("export", "glmjax.checkpoint.export.export",
            "write a float, INT8 or INT4 model from a training run, or give one back in THUDM's layout",
            "glmjax export --checkpoint=runs/mine --bits=4 --out=runs/mine-int4",
            (CHECKPOINT, Flag("--out", "folder to write"),
             Flag("--bits", "weight bits (without it: as they are)", int, choices=(8, 4)),
             Flag("--dtype", "of the float parameters: float32, bfloat16 or float16"),
             Flag("--format", "whose layout (orbax: ours)", kind="prepared",
                  choices=("orbax", "safetensors", "chatglm-hf", "glm130b-sat")),
             Flag("--tensor_parallel", "ranks of glm130b-sat (8)", int, kind="prepared"),
             Flag("--overwrite", "replace an export there", bool, kind="passed")),
            prepare=weights.export_format),
    Command("import", "glmjax.thudm.load.import_model",
            "read GLM-130B, GLM-10B or ChatGLM-6B in its own files",
            "glmjax import --bits=4 chatglm-6b models/chatglm-6b runs/chatglm-6b-int4",
            (Flag("family", "whose files they are", choices=("glm-130b", "glm-10b", "chatglm-6b")),
             Flag("source", "folder of the files"), Flag("out", "folder to write"),
             Flag("--dtype", "of the float parameters (as in the files)"),
             Flag("--bits", "weight bits (as in the files)", int, choices=(8, 4)),
             Flag("--tokenizer", "ice_text.model or a tokenizer folder (the one in the source folder)"),
             Flag("--num_heads", "attention heads of a GLM whose heads are not 64 wide", int),
             Flag("--rotary_rounding", "of cosines and sines (half_table, as the published models were run)",
                  choices=("none", "half_frequencies", "half_table")),
             Flag("--prefix", "folder or file of a P-Tuning v2 prefix of chatglm-6b"),
             Flag("--memory_limit_gib", "most memory to take, in GiB (about 1.2)", float),
             Flag("--overwrite", "replace an export there", bool, kind="passed"))),
    Command("inspect", "glmjax.thudm.inspection.inspect", "tell what a folder or file of weights holds",
            "glmjax inspect --hashes models/chatglm-6b",
            (Flag("path", "a training run, an export, a model in THUDM's files, or one file"),
             Flag("--hashes", "read everything: sha256 of their files, our checksums verified", bool, kind="passed")),
            show=weights.show_inspection, status=weights.status_of_inspection),
    Command("generate", "glmjax.cli.inference.generate", "fill [MASK]s in a text, or continue it",
            "glmjax generate --checkpoint=runs/mine-int4 --prompt='The capital of France is [MASK].'",
            (CHECKPOINT,
             Flag("--prompt", "text with [MASK] or [gMASK] (repeatable)", repeatable=True, kind="prepared"),
             Flag("--file", "file of prompts, one a line, or JSON lines with a \"prompt\"; - is standard input",
                  kind="prepared"), *SAMPLING,
             Flag("--out", "JSON lines file for the answers; - is standard output. A stopped run goes on"),
             Flag("--overwrite", "replace the answers there", bool, kind="passed"),
             Flag("--samples", "JSON lines file to add prompts and outputs to"),
             Flag("--label", "what the model is called there (the folder's name)"), OFFLOAD),
            prepare=inputs.prompts, show=inference.show_outputs),
    Command("chat", "glmjax.cli.chat.chat", "talk with a model in the terminal, or a line a turn from a pipe",
            "glmjax chat --checkpoint=runs/mine-int4",
            (CHECKPOINT, Flag("--max_length", "most tokens of prompt and answer together", int),
             Flag("--answer_tokens", "tokens that old rounds leave to the answer", int), *SAMPLING[1:], OFFLOAD),
            show=lambda rounds: None),  # they were shown as they came
    Command("score", "glmjax.cli.inference.score", "how likely a model finds a text",
            "glmjax score --checkpoint=runs/mine --text='It was a dark and stormy night.'",
            (CHECKPOINT, Flag("--text", "text to score (repeatable)", repeatable=True, kind="prepared"),
             Flag("--file", "file of texts, one a line, or JSON lines with a \"text\"; - is standard input",
                  kind="prepared"), OFFLOAD),
            prepare=inputs.texts),
    Command("plan", "glmjax.plan.planner.plan", "compile for hardware that is elsewhere, and say what it takes",
            "glmjax plan --gin_file=plans/glm_130b_int4_rtx3090_4.gin --target=rtx3090:8 --gin.TENSOR=8",
            (Flag("--target", "devices, as a100-40:768 or v5p:4x8x8"),
             Flag("--token_budget", "tokens of the whole training, for days and energy", int),
             Flag("--search", "rank meshes, micro-batches and remats for the target", bool, kind="passed"),
             Flag("--tries", "most programs to compile in a search (8)", int, kind="passed")),
            prepare=plans.prepare, show=plans.show, modes=(
                Command("plan --fits", "glmjax.plan.fits.smallest", "the smallest set of each GPU that runs each model",
                        "glmjax plan --fits --model=130b --bits=4 --out=runs/fits.jsonl",
                        (Flag("--model", f"{', '.join(plans.MODELS)} (repeatable)", repeatable=True, kind="prepared"),
                         Flag("--bits", "16, 8 or 4 (repeatable)", int, (16, 8, 4), repeatable=True, kind="prepared"),
                         Flag("--context", "512, 1024, 2048 or any (repeatable)", int, repeatable=True,
                              kind="prepared"),
                         Flag("--gpu", "a100-40, rtx3090, ... (repeatable)", repeatable=True, kind="prepared"),
                         Flag("--layers", "layers of the programs that are compiled (8); 0: all", int, kind="passed"),
                         Flag("--out", "JSON lines file of what was compiled; a stopped run goes on", kind="passed")),
                        prepare=plans.prepare_fits, show=plans.show_fits),)),
    Command("report", "glmjax.evaluate.report.write", "gather a run's results into report.md and report.json",
            "glmjax report --gin_file=runs/quickstart.gin --workdir=runs/quickstart",
            (Flag("--workdir", "folder of the run"),)),
)}


class _Parser(argparse.ArgumentParser):
  """argparse whose mistakes are InputErrors of one line."""

  def error(self, message: str) -> None:
    raise errors.InputError(f"{message}; see {self.prog} --help")


def run(arguments: list[str]) -> int:
  """Parses the command line and gin files, calls the command's function, prints what it returns."""
  overrides = [argument.removeprefix("--gin.") for argument in arguments if argument.startswith("--gin.")]
  arguments = [argument for argument in arguments if not argument.startswith("--gin.")]
  started = time.time()
  options = _parse_flags(arguments)
  if options is None:
    return 0
  command = options.command
  given = command.prepare(options) if command.prepare else {}
  for flag in command.flags:
    value = getattr(options, flag.parameter)
    if value is not None and flag.kind == "passed":
      given[flag.parameter] = value
    elif value is not None and flag.kind == "bound":
      overrides.append(f"{command.target}.{flag.parameter}={value!r}")
  with process.several() if command.begin and hosts.are_several(options) else contextlib.nullcontext():
    gin_files.parse(options.gin_file, overrides, command.target, given,
                    [each.target for top in COMMANDS.values() for each in (top, *top.modes)])
    if options.stages:
      from glmjax.evaluate import stages
      stages.prepare(options.stages)
    if command.begin:
      command.begin(options)
  with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
    result = _call(command, given)
  if not hosts.is_first():
    return 0
  _print_result(command, result, options.json)
  if options.stages:
    stages.append(options.stages, command.name, started, time.time() - started)
  return command.status(result) if command.status else 0


def _call(command: Command, given: dict[str, Any]) -> Any:
  """Calls the command's function and leaves the configuration in the folder that it wrote.

  A function that works for hours takes `on_start`, to be called once the folder is its own.
  """
  function = gin_files.configured(command.target)
  if "on_start" in inspect.signature(function).parameters:
    given = given | {"on_start": lambda: _write_config(command, function)}
  result = function(**given)  # one that fails leaves no configuration: the folder may be another run's
  _write_config(command, function)
  return command.describe(result) if command.describe else result


def _write_config(command: Command, function: Callable[..., Any]) -> None:
  """config.gin beside the result: every value used, defaults included."""
  folder = gin_files.binding(function, command.folder) if command.folder else None
  if folder is None or not os.path.isdir(folder) or not hosts.is_first():
    return
  publish.write_text(os.path.join(folder, "config.gin"), gin_files.operative_config())


def _parse_flags(arguments: list[str]) -> argparse.Namespace | None:
  """The parsed flags, or None after --help or --version."""
  parser = _Parser(prog="glmjax", description=glmjax.__doc__, allow_abbrev=False, add_help=False,
                   usage="glmjax COMMAND [FLAGS]", formatter_class=argparse.RawDescriptionHelpFormatter)
  names = "\n".join(f"  {command.name:11}{command.help}" for command in COMMANDS.values())
  parser.epilog = f"commands:\n{names}\n\nglmjax COMMAND --help shows a command's flags and an example."
  parser.add_argument("--version", action="store_true", help="print the version")
  parser.add_argument("--help", "-h", action="store_true", help="print this")
  name = arguments[0] if arguments else "--help"
  if name in COMMANDS:
    command = COMMANDS[name]
    mode = next((mode for mode in command.modes if mode.name.split()[1] in arguments), command)
    return _parse_command(mode, arguments[1:])
  if not name.startswith("-"):
    close = signatures.nearest(name, COMMANDS)
    advice = f"did you mean {close}?" if close else f"there are {', '.join(COMMANDS)}"
    raise errors.InputError(f"no command {name}; {advice}")
  if name == "--version":
    print(f"glmjax {glmjax.__version__}")
  elif name in ("--help", "-h"):
    parser.print_help()
  else:
    raise errors.InputError(f"no command before {name}; write glmjax COMMAND {name}, or see glmjax --help")
  return None


def _parse_command(command: Command, arguments: Sequence[str]) -> argparse.Namespace | None:
  parser = _Parser(prog=f"glmjax {command.name}", description=f"{command.help[0].upper()}{command.help[1:]}.",
                   epilog=f"example:\n  {command.example}", allow_abbrev=False, add_help=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
  for flag in command.flags:
    settings = {"action": "store_true", "default": None} if flag.type is bool else {
        "type": flag.type, "choices": flag.choices, "action": "append" if flag.repeatable else "store"}
    parser.add_argument(flag.name, help=flag.help, **settings)
  for mode in command.modes:
    parser.add_argument(mode.name.split()[1], action="store_true", help=f"{mode.help}; see glmjax {mode.name} --help")
  for flag in command.name.split()[1:]:
    parser.add_argument(flag, action="store_true", help="this")
  parser.add_argument("--gin_file", action="append", default=[], help=GIN_HELP)
  parser.add_argument("--gin.NAME=VALUE", action="store_true", dest="gin",
                      help="set a macro or parameter, e.g. --gin.TOTAL_SAMPLES=3200 or --gin.loop.train.seed=1")
  parser.add_argument("--json", action="store_true",
                      help="print the result as JSON; all else goes to standard error")
  parser.add_argument("--stages", metavar="FILE", help="JSON lines file to add the command's seconds to")
  parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
  parser.add_argument("--help", "-h", action="store_true", help="print this")
  if "--help" in arguments or "-h" in arguments:
    parser.print_help()
    return None
  options, unknown = parser.parse_known_args(arguments)
  if unknown:
    close = signatures.nearest(unknown[0].split("=")[0], parser._option_string_actions)
    raise errors.InputError(f"unknown argument {unknown[0]}; "
                            + (f"did you mean {close}?" if close else f"see {parser.prog} --help"))
  options.command = command
  return options


def _print_result(command: Command, result: Any, as_json: bool) -> None:
  """JSON on standard output with --json; otherwise the command's own way, or nothing for None."""
  ascii_only = not process.is_utf8(sys.stdout)  # JSON has its own spelling of what the stream lacks
  if as_json:
    print(json.dumps(result, ensure_ascii=ascii_only, default=_plain))
  elif command.show:
    command.show(result)
  elif result is not None:
    print(json.dumps(result, ensure_ascii=ascii_only, indent=2, default=_plain))
  sys.stdout.flush()


def _plain(value: Any) -> Any:
  """What json cannot write itself: numpy scalars and arrays, paths, dataclasses."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
  if hasattr(value, "tolist"):
    return value.tolist()
  return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
