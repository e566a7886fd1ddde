"""A ChatGLM-6B-shaped model in THUDM's files, imported, exported as INT4, and asked: seconds, MB/s, peak memory.

  python benchmarks/import_drill.py --folder=/tmp/drill --out=drill.json     28 layers, 13.4 GB of files
  python benchmarks/import_drill.py --folder=/tmp/drill --size=part          4 of the layers, 3.8 GB
  python benchmarks/import_drill.py --folder=/tmp/drill --size=tiny          a few seconds

The weights are random (the published ones are not needed) and the tokenizer is a list of 130,000 made-up
pieces, so the answer is nonsense of the right length. At most 41 GB of disk are used at a time: source, plain
copy, import; everything is deleted as soon as it is no longer needed, and whatever happens at the end. Each
command runs in a process of its own, whose peak memory the kernel reports; the files are dropped from the page cache
before each of them, so that all read from the disk.
"""

import argparse
import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import loader
from sentencepiece import sentencepiece_model_pb2

from glmjax import tokenizer as tokenizer_lib
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.thudm import write

sys.path.append(str(pathlib.Path(__file__).parent.parent / "tests"))
import their_files  # noqa: E402

_SIZES = {
  "full": dict(num_layers=28, embed_dim=4096, num_heads=32, mlp_dim=16_384),  # 6,173,286,400 parameters
  "part": dict(num_layers=4, embed_dim=4096, num_heads=32, mlp_dim=16_384),
  "tiny": dict(num_layers=2, embed_dim=64, num_heads=4, mlp_dim=256),
}
_PIECES = 130_000  # text pieces of ice_text.model
_PROMPT = "hello world[gMASK]"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--folder", type=pathlib.Path, required=True, help="made, and removed at the end")
  parser.add_argument("--size", choices=_SIZES, default="full")
  parser.add_argument("--max_tokens", type=int, default=16)
  parser.add_argument("--out", help="JSON file for the result")
  options = parser.parse_args()
  options.folder.mkdir(parents=True)
  try:
    result = drill(options.folder, options.size, options.max_tokens)
  finally:
    shutil.rmtree(options.folder, ignore_errors=True)
  text = json.dumps(result, indent=2)
  if options.out:
    pathlib.Path(options.out).write_text(text + "\n", encoding="utf-8")
  print(text)


def drill(folder: pathlib.Path, size: str, max_tokens: int) -> dict[str, Any]:
  """Runs the steps; returns {step: {"seconds", "megabytes_per_second", "peak_gib"}} and what the answer was."""
  model = config_lib.GLMConfig(
    vocab_size=130_528, max_length=2048, positions="rotary_2d", mlp="gelu_tanh", param_dtype="float16", **_SIZES[size]
  )
  hub, copy, ours, int4 = (folder / name for name in ("hub", "copy", "float16", "int4"))
  result: dict[str, Any] = {
    "what": "import, INT4 export and answer of a model in THUDM's files",
    "size": size,
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "machine": loader.machine(),
    "command": " ".join(["python", "benchmarks/import_drill.py", *sys.argv[1:]]),
    "parameters": params_lib.count(model),
  }
  started = time.perf_counter()
  write.write_safetensors(hub, their_files.random_items("chatglm-6b", model))
  write.write_hub_configs(hub, model, None, made_up_tokenizer())
  result["generate"] = {"seconds": round(time.perf_counter() - started, 2)}
  result["source_bytes"] = bytes_of(hub)

  forget(hub)
  started = time.perf_counter()
  shutil.copytree(hub, copy)
  os.sync()
  result["copy"] = speed(time.perf_counter() - started, result["source_bytes"])
  shutil.rmtree(copy)

  forget(hub)
  result["import"] = command(["import", "chatglm-6b", hub, ours], result["source_bytes"])
  result["import_bytes"] = bytes_of(ours)
  shutil.rmtree(hub)

  forget(ours)
  result["export_int4"] = command(
    ["export", f"--checkpoint={ours}", f"--out={int4}", "--bits=4"], result["import_bytes"]
  )
  result["int4_bytes"] = bytes_of(int4)
  shutil.rmtree(ours)

  result["answer"] = command(
    ["generate", f"--checkpoint={int4}", f"--prompt={_PROMPT}", f"--max_tokens={max_tokens}"], None
  )
  result["import_speed_of_copy"] = round(
    result["import"]["megabytes_per_second"] / result["copy"]["megabytes_per_second"], 2
  )
  return result


def made_up_tokenizer() -> tokenizer_lib.Tokenizer:
  """Makes as many pieces as ice_text.model has: the letters, and words that are numbers."""
  proto = sentencepiece_model_pb2.ModelProto()
  kind = proto.SentencePiece
  for name, type_ in (
    ("<unk>", kind.UNKNOWN),
    ("<s>", kind.CONTROL),
    ("</s>", kind.CONTROL),
    ("<pad>", kind.CONTROL),
    ("<n>", kind.USER_DEFINED),
  ):
    proto.pieces.add(piece=name, score=0.0, type=type_)
  letters = [chr(i) for i in range(33, 127)] + ["\u2581"]
  for i in range(_PIECES - len(proto.pieces)):
    name = letters[i] if i < len(letters) else f"\u2581w{i}"
    proto.pieces.add(piece=name, score=-float(i) / _PIECES, type=kind.NORMAL)
  proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
  proto.trainer_spec.vocab_size = len(proto.pieces)
  proto.normalizer_spec.name = "identity"
  proto.normalizer_spec.remove_extra_whitespaces = False
  return tokenizer_lib.Tokenizer(proto.SerializeToString())


def bytes_of(folder: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forget(folder: pathlib.Path) -> None:
  """Writes the files to the disk and drops them from the page cache."""
  os.sync()
  for path in folder.rglob("*"):
    if path.is_file() and hasattr(os, "posix_fadvise"):
      with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def speed(seconds: float, size: int | None) -> dict[str, float]:
  found = {"seconds": round(seconds, 2)}
  if size is not None:
    found["megabytes_per_second"] = round(size / seconds / 1e6, 1)
  return found


def command(arguments: list[Any], size: int | None) -> dict[str, Any]:
  """Runs a glmjax command; returns its seconds, speed, peak memory, and output."""
  started = time.perf_counter()
  process = subprocess.Popen([sys.executable, "-m", "glmjax", *map(str, arguments)], stdout=subprocess.PIPE)
  output = process.stdout.read().decode()
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise SystemExit(f"glmjax {arguments[0]} failed with {process.returncode}")
  os.sync()
  found: dict[str, Any] = speed(time.perf_counter() - started, size)
  return found | {"peak_gib": round(usage.ru_maxrss / 2**20, 3), "output": output.strip()[-500:]}


if __name__ == "__main__":
  main()
