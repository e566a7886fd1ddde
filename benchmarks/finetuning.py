"""Tunes the quickstart's model on a small real task by each method: what it learns, costs, and forgets.

  python benchmarks/finetuning_data.py DATA
  python benchmarks/finetuning.py DATA RUNS

Needs `make quickstart`. In RUNS each method gets a run of its own, NAME, its answers to the task's questions in
NAME-evaluated and its figures on the quickstart's held-out text in NAME-heldout.json; what is there is not done again.
`before` is the model as it is, in the precision that was tuned. Writes benchmarks/results/finetuning.json.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import pathlib
import shlex
import sys
import time
from typing import Any

import loader

from glmjax.checkpoint import source as source_lib
from glmjax.harness import compare

# Blanks as the quickstart drew them, for the text that is replayed, and for the questions on held-out text, which are
# drawn as a run says that it was trained.
BLANKS = {"rows.BlankInfilling.mean_span_length": 1.0, "rows.BlankInfilling.mask_ratio": 0.25}
SMALL = {"TOTAL_SAMPLES": 6_400, "BATCH_SIZE": 32}


@dataclasses.dataclass(frozen=True)
class Method:
  """A run that tunes a model."""

  gin: str
  base: str  # of the quickstart's exports
  bindings: dict[str, Any] = dataclasses.field(default_factory=dict)
  replay: bool = False
  data: str = "train"  # the file of what is learned


PREFIX = {"trainable.PTuning.length": 16, "TOTAL_SAMPLES": 9_600}  # it learns slowly
METHODS = {
  "full": Method("finetune", "float", {"LEARNING_RATE": 5e-4} | BLANKS),
  "lora_float": Method("finetune_lora", "float"),
  "lora_int4": Method("finetune_lora", "int4"),
  "p_tuning_int4": Method("finetune_p_tuning", "int4", PREFIX),
  "projection_int4": Method(
    "finetune_p_tuning", "int4", {"LEARNING_RATE": 5e-3, "trainable.PTuning.projection": True} | PREFIX
  ),
  "dpo_int4": Method("finetune_dpo", "int4", data="preferences"),
  "orpo_int4": Method("finetune_orpo", "int4", {"trainable.LoRA.dropout": 0.05}, data="preferences"),
  "full_replay": Method("finetune", "float", {"LEARNING_RATE": 5e-4} | BLANKS, replay=True),
  "lora_int4_replay": Method("finetune_lora", "int4", BLANKS, replay=True),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("data", type=pathlib.Path, help="what finetuning_data.py wrote")
  parser.add_argument("runs", type=pathlib.Path, help="folder of the runs")
  parser.add_argument("--quickstart", type=pathlib.Path, default=pathlib.Path("runs/quickstart"))
  parser.add_argument("--task", choices=("reviews", "topics"), default="reviews")
  parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
  parser.add_argument("--limit", type=int, help="only the first so many questions")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "finetuning.json")
  options = parser.parse_args()
  runs = options.runs / options.task
  runs.mkdir(parents=True, exist_ok=True)
  result = {
    "what": f"the quickstart's model tuned on {options.task}",
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "machine": loader.machine(),
    "command": shlex.join(["python", "benchmarks/finetuning.py", *sys.argv[1:]]),
    "before": {},
    "methods": {},
  }
  for name in options.methods:
    method = METHODS[name]
    model = options.quickstart / method.base
    before = runs / method.base
    measure(before, [f"--checkpoint={model}"], options)
    result["before"][method.base] = forgotten(before)
    cost = tune(runs, name, method, options)
    run = runs / name
    whole = [f"--checkpoint={run}"]
    measure(run, whole if method.gin == "finetune" else [f"--checkpoint={model}", f"--adapter={run}"], options)
    result["methods"][name] = (
      dataclasses.asdict(method) | cost | size(run) | learned(before, run) | {"held_out": forgotten(run)}
    )
    print(name, json.dumps(result["methods"][name]), flush=True)
  options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def glmjax(*arguments: str) -> dict[str, float]:
  """Runs a command, and returns the seconds that it took, those of all cores together, and the most memory it had."""
  start = time.perf_counter()
  process = os.posix_spawn(sys.executable, [sys.executable, "-m", "glmjax", *arguments], os.environ)
  _, status, used = os.wait4(process, 0)
  if status:
    raise SystemExit(f"failed: glmjax {shlex.join(arguments)}")
  seconds, cpu = time.perf_counter() - start, used.ru_utime + used.ru_stime
  return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_megabytes": round(used.ru_maxrss / 1024)}


def tune(runs: pathlib.Path, name: str, method: Method, options: argparse.Namespace) -> dict[str, Any]:
  """Trains by a method, unless it has been done, and returns what that cost."""
  noted = runs / f"{name}-cost.json"
  if not noted.exists():
    bindings = {
      "BASE": str(options.quickstart / method.base),
      "DATA": [str(options.data / options.task / f"{method.data}.jsonl")],
      **SMALL,
      **method.bindings,
    }
    files = ["runs/" + method.gin + ".gin"]
    if method.replay:
      files.append("data/replay.gin")
      bindings["REPLAY"] = {each: str(options.quickstart / "text" / f"{each}.jsonl") for each in ("en", "zh")}
    arguments = [f"--gin_file={file}" for file in files] + [f"--workdir={runs / name}", "--overwrite"]
    arguments += [f"--gin.{key}={value!r}" for key, value in bindings.items()]
    load = os.getloadavg()[0]
    cost = glmjax("train", *arguments) | {"load_average": round(load, 1)}
    noted.write_text(json.dumps(cost), encoding="utf-8")
  return json.loads(noted.read_text(encoding="utf-8"))


def measure(folder: pathlib.Path, model: list[str], options: argparse.Namespace) -> None:
  """Puts the task and the held-out text to a model, where that has not been done."""
  evaluated, heldout = folder.with_name(f"{folder.name}-evaluated"), folder.with_name(f"{folder.name}-heldout.json")
  if not (evaluated / "report.json").exists():
    limit = [] if options.limit is None else [f"--limit={options.limit}"]
    task = options.data / "tasks" / f"{options.task}.yaml"
    glmjax("evaluate", f"--tasks={task}", f"--data={options.data}", f"--out={evaluated}", *model, *limit)
  if not heldout.exists():
    glmjax("evaluate", f"--cache={options.quickstart / 'cache'}", f"--out={heldout}", *model)


def size(run: pathlib.Path) -> dict[str, int]:
  """Returns how many parameters a run trained, and the bytes of its newest checkpoint, with Adam's averages, and of its
  export, without them.
  """
  shapes = source_lib.use(run, lambda source: [target.shape for target in source.targets().values()])
  newest = max((each for each in (run / "checkpoints").iterdir() if each.name.isdecimal()), key=lambda x: int(x.name))
  stored = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
  exported = run.with_name(f"{run.name}-exported")
  if not exported.exists():
    glmjax("export", f"--checkpoint={run}", f"--out={exported}")
  alone = sum(file.stat().st_size for file in (exported / "params").rglob("*") if file.is_file())
  return {"trained_parameters": sum(map(math.prod, shapes)), "checkpoint_bytes": stored, "exported_bytes": alone}


def learned(before: pathlib.Path, after: pathlib.Path) -> dict[str, Any]:
  """Returns accuracy in percent, before and after, with 95 % intervals, and of the difference."""
  found = compare.compare([path.with_name(f"{path.name}-evaluated") for path in (before, after)])
  [figures] = found["tasks"].values()
  [[first, second]] = figures.values()
  return {
    "before": [round(first[name], 1) for name in ("value", "low", "high")],
    "after": [round(second[name], 1) for name in ("value", "low", "high")],
    "difference": [round(x, 1) for x in second["difference"]],
  }


def forgotten(folder: pathlib.Path) -> dict[str, dict[str, float]]:
  """Returns the figures on held-out text, by language."""
  found = json.loads(folder.with_name(f"{folder.name}-heldout.json").read_text(encoding="utf-8"))
  names = ("bits_per_byte", "infill_accuracy", "infill_accuracy_se", "infill_accuracy_left_only")
  found.pop("model", None)  # whose figures they are
  return {language: {name: round(own[name], 4) for name in names} for language, own in found.items()}


if __name__ == "__main__":
  main()
