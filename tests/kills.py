"""A writer killed at each change that it makes on the disk, then run again: what kills_test.py starts.

Usage: kills.py WRITER ROOT [POINTS]. Prints one JSON line a kill: {"at", "of", "left", "again", "after"}.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import sys
from collections.abc import Callable

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def die_at(count: int, root: str, tell: Callable[[int], None]) -> None:
  """SIGKILL just before the process's `count`-th change below `root`; 0: `tell` how many there were, at the end."""
  seen = 0

  def hook(event: str, arguments: tuple) -> None:
    nonlocal seen
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if not writes and event not in CHANGES or root not in os.fsdecode(str(arguments[0])):
      return
    seen += 1
    tell(seen)
    if seen == count:
      os.kill(os.getpid(), signal.SIGKILL)

  sys.addaudithook(hook)


def in_child(work: Callable[[], None]) -> int:
  """Runs `work` in a forked process; its exit status, or minus the signal that ended it."""
  process = os.fork()
  if not process:
    try:
      work()
    except BaseException as error:  # the child must not go on with the parent's work
      print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
      os._exit(1)
    os._exit(0)
  return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def listing(root: pathlib.Path) -> list[str]:
  return sorted(path.name for path in root.iterdir())


def drill(
  prepare: Callable[[pathlib.Path], None],
  write: Callable[[pathlib.Path], None],
  check: Callable[[pathlib.Path], str],
  base: pathlib.Path,
  points: int,
) -> None:
  """Kills `write` at every change, or at so many of them, and runs it again."""
  root, counted = base / "root", base / "count"

  def fresh() -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    prepare(root)

  def counting() -> None:
    die_at(0, str(root), lambda seen: counted.write_text(str(seen)) and None)
    write(root)

  assert in_child(fresh) == 0
  assert in_child(counting) == 0
  total = int(counted.read_text())
  every = range(1, total + 1)
  chosen = every if points >= total else sorted(random.Random(0).sample(every, points))
  for at in chosen:
    in_child(fresh)

    def killed(at: int = at) -> None:
      die_at(at, str(root), lambda seen: None)
      write(root)

    status = in_child(killed)
    report = {"at": at, "of": total, "status": status, "left": check(root)}
    report["again"] = in_child(lambda: write(root))
    print(json.dumps(report | {"after": check(root), "names": listing(root)}), flush=True)


class Writers:
  """What is drilled: for each writer `prepare`, `write` and `check`, each called with a folder of its own.

  `check` says what stands at the name: "none", "old" or "new", and raises where it is neither.
  """

  def __init__(self, sources: pathlib.Path):
    self.sources = sources  # tokenizer/, other-tokenizer/, run/, hub/

  def make_sources(self) -> None:
    """Writes what the writers read."""
    from glmjax import tokenizer

    texts = [
      f"On day {i} the quick brown fox jumps over {i * i} lazy dogs; 第{i}天，小河边的柳树发芽了。" for i in range(60)
    ]
    tokenizer.train(texts, self.sources / "tokenizer", 440)
    tokenizer.train(texts[:40], self.sources / "other-tokenizer", 420)

  def make_models(self) -> None:
    """Writes a run with two steps, and a model in the Hub's files."""
    import jax
    from glmjax.checkpoint import folder
    from glmjax.checkpoint import manager
    from glmjax.models import config as config_lib
    from glmjax.models import glm
    from glmjax.io import tokenizer_folder
    from glmjax.thudm import write

    import their_files
    from glmjax import tokenizer as tokenizer_lib

    run = self.sources / "run"
    config = config_lib.GLMConfig(vocab_size=448, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=88, max_length=16)
    run.mkdir()
    described = tokenizer_folder.copy(self.sources / "tokenizer", run / folder.TOKENIZER)
    folder.write_config(run, folder.FolderConfig(config, {}, described))
    saver = manager.Manager(run / "checkpoints")
    saver.save(1, {"params": glm.init_params(config, jax.random.key(0))}, {"samples_seen": 1})
    saver.close()
    (run / "metrics.jsonl").write_text("{}\n")
    hub = self.sources / "hub"
    hub.mkdir()
    config = config_lib.GLMConfig(
      vocab_size=480,
      num_layers=2,
      embed_dim=64,
      num_heads=8,
      mlp_dim=256,
      max_length=64,
      positions="rotary_2d",
      mlp="gelu_tanh",
      tie_embeddings=False,
      residual_alpha=56**0.5,
      param_dtype="float16",
    )
    write.write_safetensors(hub, their_files.random_items("chatglm-6b", config))
    write.write_hub_configs(hub, config, None, tokenizer_lib.Tokenizer.load(self.sources / "tokenizer"))

  def nothing(self, root: pathlib.Path) -> None:
    """Prepares nothing."""

  # A tokenizer.

  def write_tokenizer(self, root: pathlib.Path) -> None:
    from glmjax import tokenizer

    tokenizer.Tokenizer.load(self.sources / "tokenizer").save(root / "deep" / "out")

  def check_tokenizer(self, root: pathlib.Path) -> str:
    from glmjax import tokenizer

    if not (root / "deep" / "out").exists():
      return "none"
    assert tokenizer.Tokenizer.load(root / "deep" / "out") == tokenizer.Tokenizer.load(self.sources / "tokenizer")
    assert listing(root / "deep" / "out") == ["tokenizer.json", "tokenizer.model"]
    return "new"

  # A token cache in place of another.

  def _write_cache(self, root: pathlib.Path, mixture: str) -> None:
    from glmjax import tokens
    from glmjax.data import builder
    from glmjax.data import shards

    about = {"fingerprint": "f", "vocab_size": 1008, "specials": vars(tokens.icetk(0, 1000))}
    tasks = {"en": {"kind": "text", "rate": 1.0, "splits": {"train": {"source": "s"}}}}
    with builder.CacheBuilder(root / "out", builder.make_plan(mixture, 2, about, tasks), overwrite=True) as making:
      for shard in making.missing():
        builder.write_shard(making.partial, shard, [shards.Document([1, 2, 3], 5)] * 3, 1008)
      making.finish(self.sources / "tokenizer")

  def old_cache(self, root: pathlib.Path) -> None:
    self._write_cache(root, "old")

  def write_cache(self, root: pathlib.Path) -> None:
    self._write_cache(root, "new")

  def check_cache(self, root: pathlib.Path) -> str:
    from glmjax.data import shards
    from glmjax.io import publish

    if not (root / "out").exists():
      return "old" if publish.interrupted(root / "out") else "none"  # the next writer puts it back
    cache = shards.TokenCache.open(root / "out")
    cache.verify()
    assert set(listing(root / "out")) == {"manifest.json", "tokenizer", "en"}
    return cache.manifest["mixture"]

  # A run that starts anew over an old one.

  def old_run(self, root: pathlib.Path) -> None:
    shutil.copytree(self.sources / "run", root / "out")
    (root / "out" / "notes.txt").write_text("mine")

  def write_run(self, root: pathlib.Path) -> None:
    from glmjax.checkpoint import folder as folder_lib
    from glmjax.train import workdir

    source = _Source(self.sources / "other-tokenizer")
    config = folder_lib.read_config(self.sources / "run").model
    folder = workdir.Workdir.named(root / "out")
    with folder.locked():
      folder.open(config, source, overwrite=True)

  def check_run(self, root: pathlib.Path) -> str:
    from glmjax.checkpoint import folder

    if not (root / "out").exists():
      return "none"
    config = folder.read_config(root / "out") if (root / "out" / "config.json").exists() else None
    if (root / "out" / "checkpoints" / "1").exists():  # whole as long as it is there
      assert (root / "out" / "checkpoints" / "1" / "metadata" / "checksums.json").exists() and not config.data
      return "old"
    return "new" if config and config.data else "none"

  def check_run_over(self, root: pathlib.Path) -> str:
    assert (root / "out" / "notes.txt").read_text() == "mine"
    return self.check_run(root)

  # A run that trains an adapter, and tells what is forgotten.

  def write_adapter(self, root: pathlib.Path) -> None:
    from glmjax.checkpoint import folder as folder_lib
    from glmjax.parallel import mesh
    from glmjax.train import loop
    from glmjax.train import schedules
    from glmjax.train import trainable

    import patterns  # here, as it imports numpy

    config = folder_lib.read_config(self.sources / "run").model
    loop.train(
      config,
      patterns.Source(),
      root / "out",
      schedules.Batches(8),
      24,
      schedules.Constant(1e-2),
      mesh=mesh.MeshConfig(data=-1),
      weights=self.sources / "run",
      trainable=trainable.LoRA(rank=2, dropout=0.1),
      validation=patterns.Source(name="held out"),
      probe=patterns.Source(name="other"),
      intervals=loop.Intervals(log=0, save=1, evaluate=2, keep=5, eval_samples=8),
    )

  def write_whole(self) -> None:
    self.write_adapter(self.sources / "whole")

  def check_adapter(self, root: pathlib.Path) -> str:
    from glmjax.checkpoint import manager

    def steps(run: pathlib.Path) -> dict[int, dict]:
      folder = run / "checkpoints"
      return {step: manager.read_record(folder / str(step))["arrays"] for step in manager.steps(folder)}

    def losses(run: pathlib.Path) -> list[tuple]:
      lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
      return [tuple(line.get(name) for name in ("step", "loss", "eval_loss", "grad_norm")) for line in lines]

    def probe(run: pathlib.Path) -> dict:
      path = run / "probe.json"
      return json.loads(path.read_text()) if path.exists() else {}

    out, whole = root / "out", self.sources / "whole" / "out"
    found, wanted = steps(out), steps(whole)
    assert found.items() <= wanted.items() and probe(out).items() <= probe(whole).items()
    if found != wanted or probe(out) != probe(whole):
      return "old" if found else "none"
    assert losses(out) == losses(whole) and listing(out) == listing(whole)
    return "new"

  # An export, and an import, in place of an older one.

  def old_export(self, root: pathlib.Path) -> None:
    from glmjax.checkpoint import export

    export.export(self.sources / "run", root / "out", 8)

  def write_export(self, root: pathlib.Path) -> None:
    from glmjax.checkpoint import export

    export.export(self.sources / "run", root / "out", 4, overwrite=True)

  def write_import(self, root: pathlib.Path) -> None:
    from glmjax.thudm import load

    load.import_model("chatglm-6b", self.sources / "hub", root / "out", bits=4, overwrite=True)

  def check_export(self, root: pathlib.Path) -> str:
    from glmjax.io import folders
    from glmjax.io import publish

    out = root / "out"
    if not out.exists():
      return "old" if publish.interrupted(out) else "none"
    assert set(listing(out)) == {"config.json", "checksums.json", "params", "tokenizer"}, listing(out)
    assert not list(folders.strangers(out, folders.Kind.EXPORT)) and not list(out.rglob(".*.tmp"))
    sums = json.loads((out / "checksums.json").read_text())
    assert set(sums["files"]) == {"config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer.model"}
    return {8: "old", 4: "new"}[json.loads((out / "config.json").read_text())["export"]["bits"]]


class _Source:
  """What Workdir asks of a source."""

  def __init__(self, tokenizer: pathlib.Path):
    self._tokenizer = tokenizer

  def describe(self) -> dict:
    return {"seed": 1}

  def save_tokenizer(self, folder: str) -> None:
    shutil.copytree(self._tokenizer, folder, dirs_exist_ok=True)


def main(base: pathlib.Path, names: list[str], points: int) -> None:
  base.mkdir(parents=True)
  writers = Writers(base)
  in_child(writers.make_sources)
  cases = {
    "tokenizer": (writers.nothing, writers.write_tokenizer, writers.check_tokenizer),
    "cache": (writers.nothing, writers.write_cache, writers.check_cache),
    "cache-over": (writers.old_cache, writers.write_cache, writers.check_cache),
    "run": (writers.nothing, writers.write_run, writers.check_run),
    "run-over": (writers.old_run, writers.write_run, writers.check_run_over),
    "adapter": (writers.nothing, writers.write_adapter, writers.check_adapter),
    "export": (writers.nothing, writers.write_export, writers.check_export),
    "export-over": (writers.old_export, writers.write_export, writers.check_export),
    "import": (writers.nothing, writers.write_import, writers.check_export),
    "import-over": (writers.old_export, writers.write_import, writers.check_export),
  }
  if {"run", "run-over", "adapter", "export", "export-over", "import", "import-over"} & set(names):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(base / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    assert in_child(writers.make_models) == 0
    # Imported once, before the forks; nothing of JAX runs here.
    from glmjax.checkpoint import export  # noqa: F401
    from glmjax.thudm import load  # noqa: F401
    from glmjax.train import loop  # noqa: F401

    if "adapter" in names:
      assert in_child(writers.write_whole) == 0
  for name in names:
    print(json.dumps({"writer": name}), flush=True)
    drill(*cases[name], base, points)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]))
