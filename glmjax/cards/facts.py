"""What is known of a model: what its folder shows, what its run recorded, what it was measured to do."""

import dataclasses
import hashlib
import json
import logging
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from glmjax import errors
from glmjax.cards import about as about_lib
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import source as source_lib
from glmjax.data import shards
from glmjax.evaluate import report
from glmjax.io import paths
from glmjax.io import tokenizer_folder
from glmjax.io import user_json
from glmjax.io import user_text
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib

_RUN_JSON, _REPORT_JSON = "run.json", "report.json"  # of `glmjax evaluate --tasks`
_log = logging.getLogger("glmjax")


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
class Evaluation:
  """What a model was measured to do: a file of held-out figures, or a folder of answered tasks."""

  path: str
  weights: str | None  # fingerprint of the model that was measured; None: the file does not say
  figures: Mapping[str, Mapping[str, Mapping[str, float]]]  # task, then metric: value, and low, high, items if known
  limit: int | None = None  # only the first items of each file
  version: str | None = None  # of glmjax


@dataclasses.dataclass(frozen=True)
class Sources:
  """Where the facts beside the folder's own are: paths as the user named them."""

  run: paths.Named | None = None  # that made an export
  cache: paths.Named | None = None  # that the run read
  text: paths.Named | None = None  # what `glmjax data` reported of the text, report.json
  evaluations: Sequence[paths.Named] = ()


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
  text: Mapping[str, Any] | None  # what glmjax data reported
  evaluations: Sequence[Evaluation]
  license_file: str | None


def gather(folder: paths.Path, about: about_lib.About, sources: Sources) -> tuple[Facts, paths.Path | None]:
  """Returns the facts of a model's folder, and the folder of the run that made it.

  Raises:
    errors.InputError: where the folder is no model's, or something named belongs to another model.
  """
  config = folder_lib.read_config(folder)
  weights = source_lib.use(folder, _weights)
  is_run = not config.export
  run = folder if is_run else None if sources.run is None else paths.named(sources.run, "--run")
  if run is not None and not is_run:
    _check_made_it(run, config)
  training, interventions = (None, None) if run is None else (_training(run, weights.step), _interventions(run))
  cache = None if sources.cache is None else _manifest(sources.cache, config)
  facts = Facts(
    folder=folder.name,
    kind=_kind(config),
    config=config,
    weights=weights,
    tokenizer=_tokenizer(folder),
    files=_files(folder),
    about=about,
    training=training,
    interventions=interventions,
    manifest=cache,
    text=None if sources.text is None else user_json.read(sources.text, expected="give report.json of glmjax data"),
    evaluations=[_evaluation(paths.named(each, "--evaluation"), weights) for each in sources.evaluations],
    license_file=next((name for name in ("LICENSE", "LICENSE.txt", "LICENSE.md") if (folder / name).is_file()), None),
  )
  return facts, run


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
  return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in there}


def _check_made_it(run: paths.Path, config: folder_lib.FolderConfig) -> None:
  """Checks that an export is of this run: of its model, data and tokenizer."""
  its = folder_lib.read_config(run)
  if its.export:
    raise errors.InputError(f"--run: {run} is an export: give the folder of the training run that it was made from")
  same = dataclasses.replace(its.model, dtype=config.model.dtype, param_dtype=config.model.param_dtype)
  other = [
    name
    for name, mine, theirs in (
      ("model", config.model, same),
      ("data", config.data, its.data),
      ("tokenizer", config.tokenizer.get("fingerprint"), its.tokenizer.get("fingerprint")),
    )
    if mine != theirs
  ]
  if other:
    raise errors.InputError(f"--run: {run} is of another {' and '.join(other)}: give the run that this was made from")


def _training(run: paths.Path, step: int | None) -> dict[str, Any] | None:
  """Returns figures of a run's metrics up to a step; None where it has none."""
  path = run / "metrics.jsonl"
  if not path.is_file():
    return None
  lines = [line for line in report.read_metrics(path, tell=False) if step is None or line["step"] <= step]
  if not lines:
    return None
  losses = {name: lines[-1][name] for name in lines[-1] if name.startswith("eval_loss")}
  return report.train_figures(lines) | {"restarts": len(report.resumed_at(lines)), **losses}


def _interventions(run: paths.Path) -> dict[str, int] | None:
  """Counts what was done about spikes, by kind; None where nobody watched."""
  path = run / "interventions.jsonl"
  if not path.is_file():
    return None
  found: dict[str, int] = {}
  for number, line in user_text.lines(path):
    if line.strip():
      kind = str(user_json.parse(line, f"{path}, line {number}").get("action", "other"))
      found[kind] = found.get(kind, 0) + 1
  return found


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


def _evaluation(path: paths.Path, weights: Weights) -> Evaluation:
  found = _tasks(path) if path.is_dir() else _held_out(path)
  if found.weights not in (None, weights.fingerprint):
    raise errors.InputError(
      f"--evaluation: {path} is of weights {found.weights[:8]}, and these are {weights.fingerprint[:8]}: evaluate these"
    )
  return found


def _tasks(folder: paths.Path) -> Evaluation:
  """Reads what `glmjax evaluate --tasks` wrote."""
  again = "give a folder of glmjax evaluate --tasks"
  run = user_json.read(folder / _RUN_JSON, expected=again)
  tasks = user_json.read(folder / _REPORT_JSON, expected=again)
  try:
    figures = {str(task): dict(own["figures"]) for task, own in tasks.items()}
    return Evaluation(str(folder), run.get("weights"), figures, run.get("limit"), run.get("glmjax"))
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise errors.InputError(f"{folder / _REPORT_JSON} is damaged ({errors.one_line(error)}); {again}") from None


def _held_out(path: paths.Path) -> Evaluation:
  """Reads what `glmjax evaluate` wrote."""
  weights = report.evaluated_weights(path)
  figures = {
    f"held-out text, {language}": {
      shown: {"value": own[name], **_interval(own, name)} for name, shown in _SHOWN.items() if name in own
    }
    for language, own in report.read_evaluation(path).items()
  }
  return Evaluation(str(path), weights, figures)


_OWN = {"bits_per_byte": "bits per byte", "infill_accuracy": "blanks' tokens right (share)"}
_BASELINES = {"unigram_bits_per_byte": "bits per byte of a unigram model", "xz_bits_per_byte": "bits per byte of xz"}
BASELINES = tuple(_BASELINES.values())  # figures that are not the model's own
_SHOWN = _OWN | _BASELINES


def _interval(own: Mapping[str, float], name: str) -> dict[str, float]:
  """Returns the 95 % interval of a figure that has a standard error: 1.96 of them either side."""
  error = own.get(f"{name}_se")
  return {} if error is None else {"low": own[name] - 1.96 * error, "high": own[name] + 1.96 * error}


def plain(value: Any) -> Any:
  """Returns a value as JSON has it."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = dataclasses.asdict(value)
  return json.loads(json.dumps(value, default=str))


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
