"""What is known of a model: what its folder shows, what its run recorded, what it was measured to do."""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from glmjax import errors
from glmjax.cards import about as about_lib
from glmjax.cards import evaluations
from glmjax.cards import surveyed
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import recorded
from glmjax.checkpoint import source as source_lib
from glmjax.data import shards
from glmjax.evaluate import report
from glmjax.io import folders
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import tokenizer_folder
from glmjax.io import user_json
from glmjax.io import user_text
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.train import probe
from glmjax.train import workdir


Step = dict[str, Any]  # a line of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Weights:
  """The model's arrays, as they are stored."""

  fingerprint: str  # of all that decides what the model says
  step: int | None
  bits: int | None  # of the kernels; None: float
  parameters: Mapping[str, int]  # by part
  nbytes: Mapping[str, int]  # by dtype
  arrays: int


@dataclasses.dataclass(frozen=True)
class Sources:
  """Where the facts beside the folder's own are: paths as the user named them."""

  run: paths.Named | None = None  # that made an export
  cache: paths.Named | None = None  # that the run read
  text: paths.Named | None = None  # what `glmjax data` reported of the text, report.json
  evaluations: Sequence[paths.Named] = ()
  beside: Sequence[paths.Path] = ()  # folders in which the licence's text may be, as well as in the model's


@dataclasses.dataclass(frozen=True)
class Facts:
  """All that is known; None and empty: not known."""

  folder: str
  kind: str  # a training run, an export, an import, an adapter
  config: folder_lib.FolderConfig
  weights: Weights
  tokenizer: Mapping[str, Any] | None  # what tokenizer/ is
  files: Mapping[str, str]  # SHA-256 of the small files that are evidence, by name
  about: about_lib.About
  training: Mapping[str, Any] | None  # figures of the run's metrics
  interventions: Mapping[str, int] | None  # how many of each kind
  manifest: Mapping[str, Any] | None  # of the token cache
  text: Mapping[str, Any] | None  # counts of what glmjax data reported
  evaluations: Sequence[evaluations.Evaluation]
  run: str | None  # id of the run that made it, which is the one that was named; None: the export does not say
  probe: Mapping[str, Any] | None  # what the run made the model forget
  license_file: str | None


def gather(folder: paths.Path, about: about_lib.About, sources: Sources) -> tuple[Facts, paths.Path | None, list[Step]]:
  """Returns the facts of a model's folder, the folder of the run that made it, and that run's steps up to its weights.

  Raises:
    errors.InputError: where the folder is no model's, or something named belongs to another model.
  """
  config = folder_lib.read_config(folder)
  weights = source_lib.use(folder, _weights)
  is_run = not config.export
  run = folder if is_run else None if sources.run is None else paths.named(sources.run, "--run")
  if is_run and sources.run is not None and folders.real(sources.run, "--run") != folders.real(folder, "the folder"):
    raise errors.InputError(f"--run: {folder} is a training run itself: leave --run out")
  if run is not None and not is_run:
    _check_made_it(run, config)
  if sources.text is not None and sources.cache is None:
    raise errors.InputError("--text: give --cache too: a report is compared with the text that the cache was made of")
  terms = _license(folder, *sources.beside)
  run_id = None if run is None else folder_lib.run_id(run)
  steps = [] if run is None else _steps(run, weights.step)
  cache = None if sources.cache is None else _manifest(sources.cache, config)
  facts = Facts(
    folder=folders.called(folder, "the model's folder"),
    kind=_kind(config),
    config=config,
    weights=weights,
    tokenizer=_tokenizer(folder),
    files=_files(folder) | ({} if terms is None else {terms.name: file_hash(terms)}),
    about=about,
    training=_training(steps) if steps else None,
    interventions=None if run is None else _interventions(run, weights.step),
    manifest=cache,
    text=None if sources.text is None or cache is None else surveyed.read(sources.text, cache),
    evaluations=[
      evaluations.read(paths.named(each, "--evaluation"), weights.fingerprint) for each in sources.evaluations
    ],
    run=run_id if is_run or config.export.get("run") == run_id else None,
    probe=None if run is None else _probe(workdir.Workdir(run).probe, weights.step),
    license_file=None if terms is None else terms.name,
  )
  return facts, run, steps


def _kind(config: folder_lib.FolderConfig) -> str:
  if config.base:
    return "an adapter"
  if not config.export:
    return "a training run"
  return "an import" if config.export.get("family") else "an export"


def _weights(source: source_lib.Source) -> Weights:
  if not source.config.base:
    source.check_size()
  parameters: dict[str, int] = {}
  for weight in source.weights():
    part = params_lib.known(weight.name).part
    parameters[part] = parameters.get(part, 0) + math.prod(weight.shape)
  nbytes: dict[str, int] = {}
  for target in source.targets().values():
    name = str(target.dtype)
    nbytes[name] = nbytes.get(name, 0) + math.prod(target.shape) * target.dtype.itemsize
  return Weights(source.fingerprint, source.step, source.bits, parameters, nbytes, len(source.records))


def _tokenizer(folder: paths.Path) -> Mapping[str, Any] | None:
  where = folder / folder_lib.TOKENIZER
  return tokenizer_folder.read(where) if where.is_dir() else None


def _files(folder: paths.Path) -> dict[str, str]:
  """Returns the hashes of the folder's small files: what it says of itself, and the seal on its arrays."""
  names = ("config.json", "config.gin", "checksums.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer.model")
  there = [name for name in names if (folder / name).is_file()]
  return {name: file_hash(folder / name) for name in there}


def file_hash(path: paths.Path) -> str:
  """Returns the SHA-256 of what a file holds."""
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _license(*folders_of: paths.Path) -> paths.Path | None:
  """Returns the file that has the licence's text; None where there is none."""
  names = ("LICENSE", "LICENSE.txt", "LICENSE.md")
  return next((path for folder in folders_of for name in names if (path := folder / name).is_file()), None)


def _check_made_it(run: paths.Path, config: folder_lib.FolderConfig) -> None:
  """Checks that an export is of this run: of its model, data and tokenizer, and of no other with the same."""
  its = folder_lib.read_config(run)
  if its.export:
    raise errors.InputError(f"--run: {run} is an export: give the folder of the training run that it was made from")
  other = [
    name
    for name, mine, theirs in (
      ("model", _settings(config), _settings(its)),
      ("data", config.data, its.data),
      ("tokenizer", config.tokenizer.get("fingerprint"), its.tokenizer.get("fingerprint")),
    )
    if mine != theirs
  ]
  if other:
    raise errors.InputError(f"--run: {run} is of another {' and '.join(other)}: give the run that this was made from")
  ids = config.export.get("run"), folder_lib.run_id(run)
  if None not in ids and ids[0] != ids[1]:
    raise errors.InputError(
      f"--run: {run} is run {ids[1][:8]}, and this was made from {str(ids[0])[:8]}, of equal settings: give that one"
    )


def _settings(config: folder_lib.FolderConfig) -> dict[str, Any]:
  """Returns what an export's model has as its run's: all but its form, and what merging an adapter changed."""
  fields = dataclasses.asdict(config.model)
  changed = ("param_dtype", *recorded.FREE)
  return {name: value for name, value in fields.items() if name not in changed and not name.startswith("prefix_")}


def _steps(run: paths.Path, step: int | None) -> list[Step]:
  """Returns the steps of a run's metrics up to one; [] where it has none.

  Raises:
    errors.InputError: where the run has not come so far.
  """
  path = run / "metrics.jsonl"
  if not path.is_file():
    return []
  try:
    every = report.read_metrics(path, tell=False)
  except errors.InputError as error:
    if errors.may_pass(error):
      raise
    return []
  if step is not None and every[-1]["step"] < step:
    raise errors.InputError(f"--run: {run} ends at step {every[-1]['step']:,}, and this is of step {step:,}")
  return [each for each in every if step is None or each["step"] <= step]


def _training(steps: list[Step]) -> dict[str, Any]:
  """Returns figures of a run."""
  return report.train_figures(steps) | {"restarts": len(report.resumed_at(steps))}


def _interventions(run: paths.Path, step: int | None) -> dict[str, int] | None:
  """Counts what was done about spikes up to a step, by kind; None where nothing is noted.

  A way back counts where it led to a step of these weights' past. A torn last line counts for nothing.
  """
  path = run / "interventions.jsonl"
  if not path.is_file():
    return None
  found: dict[str, int] = {}
  for number, line in user_text.lines(path):
    with contextlib.suppress(errors.InputError):
      told = user_json.parse(line, f"{path}, line {number}")
      at = told.get("back_to_step", told.get("step"))
      if step is None or not isinstance(at, int) or at <= step:
        kind = str(told.get("action", "other"))
        found[kind] = found.get(kind, 0) + 1
  return found


def _probe(path: paths.Path, step: int | None) -> dict[str, Any] | None:
  """Returns what a run made its model forget, without the rows; None where that was not measured of these weights."""
  found = probe.read(path)
  if "difference" not in found or found["after"]["step"] != step:
    return None
  losses = {name: found[name]["loss"] for name in ("before", "after")}
  return losses | {"samples": found["samples"], "difference": found["difference"]}


def _manifest(cache: paths.Named, config: folder_lib.FolderConfig) -> dict[str, Any]:
  """Returns the manifest of the cache that the model was trained on."""
  opened = shards.TokenCache.open(cache)
  recorded = config.data.get("cache")
  if recorded != opened.fingerprint:
    raise errors.InputError(
      f"--cache: {opened.directory} is cache {opened.fingerprint[:8]}, and the model was trained on "
      f"{str(recorded)[:8] if recorded else 'none that it knows of'}: give the one that it was trained on"
    )
  return opened.manifest


def plain(value: Any) -> Any:
  """Returns a value as JSON has it."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = dataclasses.asdict(value)
  return publish.finite(json.loads(json.dumps(value, default=str)))


def rows_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns of each task and split of a cache its counts."""
  return [
    {"task": task, "split": split, "kind": own["kind"], "rate": own["rate"]}
    | {name: counted.get(name) for name in ("source", "documents", "tokens", "utf8_bytes")}
    for task, own in sorted(manifest["tasks"].items())
    for split, counted in own["splits"].items()
  ]


def describe_model(config: config_lib.GLMConfig) -> list[tuple[str, str]]:
  """Returns the architecture in words: name and value."""
  heads = f"{config.num_heads} of {config.head_dim}"
  return [
    ("family", "GLM (causal)" if config.causal else "GLM: reads its context from both sides, fills blanks"),
    ("layers", f"{config.num_layers:,}"),
    ("width", f"{config.embed_dim:,}"),
    ("attention heads", heads),
    ("feed-forward", f"{config.mlp}, {config.mlp_dim:,}"),
    ("norm", config.norm),
    ("positions", config.positions),
    ("vocabulary", f"{config.vocab_size:,}"),
    ("longest row", f"{config.max_length:,} tokens"),
    ("head", "the embedding's table" if config.tie_embeddings else "of its own"),
    ("computes in", config.dtype),
  ]


def local(folder: paths.Named, what: str) -> pathlib.Path:
  """Returns a folder on a disk.

  Raises:
    errors.InputError: for one in a bucket.
  """
  found = paths.named(folder, what)
  if not isinstance(found, pathlib.Path):
    raise errors.InputError(f"{folder}: a card is made on a disk: copy the folder, or its export, there first")
  return found
