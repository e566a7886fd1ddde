"""A run's folder: what it says about the run, and whether a new start may use it.

  WORKDIR/  config.json   config.gin   tokenizer/   metrics.jsonl   checkpoints/   tensorboard/   profile/
            interventions.jsonl   interventions.gin   layers.jsonl   probe.json   compute.jsonl

io/folders.py knows these names: all else in the folder is the user's, and stays.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import tempfile
from typing import Any
import zlib

from glmjax import errors
from glmjax.checkpoint import folder
from glmjax.checkpoint import in_bucket
from glmjax.checkpoint import manager as manager_lib
from glmjax.checkpoint import recorded
from glmjax.io import bucket_path
from glmjax.io import folders
from glmjax.io import lock
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import tokenizer_folder
from glmjax.models import config as config_lib
from glmjax.parallel import processes
from glmjax.train import feed

REPLAY_MARK = "# Written by glmjax train:"  # begins the interventions.gin of a run


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of a run's folder."""

  root: paths.Path

  @classmethod
  def named(cls, path: paths.Named, weights: paths.Named | None = None) -> "Workdir":
    """Returns the folder that the user named; changes nothing.

    Args:
      path: as the user wrote it.
      weights: what the run begins with.

    Raises:
      errors.InputError: when it is no folder for a run (`io/folders.py`).
    """
    sources = () if weights is None else (weights,)
    return cls(folders.claim(path, folders.Kind.RUN, "workdir", sources=sources))

  @property
  def config(self) -> paths.Path:
    return self.root / folder.CONFIG

  @property
  def metrics(self) -> paths.Path:
    return self.root / "metrics.jsonl"

  @property
  def layers(self) -> paths.Path:
    """How each layer fared, where the run was asked."""
    return self.root / "layers.jsonl"

  def compute(self, process: int = 0) -> paths.Path:
    """Returns the file of what the run has cost, as one of its processes has it."""
    return self.root / (f"compute-{process}.jsonl" if process else folder.RECORD)

  @property
  def computes(self) -> list[paths.Path]:
    """These files, of all processes that there were, the first one's in front."""
    if not self.root.is_dir():
      return []
    found = {path.name: path for path in self.root.iterdir() if folders.COMPUTE.fullmatch(path.name)}
    return [found[name] for name in sorted(found, key=lambda name: (len(name), name))]

  @property
  def probe(self) -> paths.Path:
    """What was forgotten, where the run was asked."""
    return self.root / "probe.json"

  @property
  def interventions(self) -> paths.Path:
    """What was done about spikes."""
    return self.root / "interventions.jsonl"

  @property
  def replay(self) -> paths.Path:
    """A gin file by which another run does the same about them."""
    return self.root / "interventions.gin"

  def owns_replay(self) -> bool:
    """Tells whether interventions.gin may be replaced: a run wrote it, or there is none."""
    try:
      with self.replay.open("rb") as file:
        return file.read(len(REPLAY_MARK)) == REPLAY_MARK.encode()
    except FileNotFoundError:
      return True
    except OSError:
      return False

  @property
  def checkpoints(self) -> paths.Path:
    return self.root / folder.CHECKPOINTS

  @property
  def tensorboard(self) -> paths.Path:
    return self.root / "tensorboard"

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Keeps the folder from other processes within it; a killed one leaves no lock behind.

    Raises:
      errors.InputError: when another process trains there, or it is no folder for a run.
    """
    folders.claim(self.root, folders.Kind.RUN, "workdir")
    with publish.parent(self.root / ".lock"):
      with lock.held(self.root / ".lock", f"{self.root} is in use: another process is training there"):
        yield

  def open(
    self,
    model: config_lib.GLMConfig,
    data: feed.DataSource,
    overwrite: bool,
    base: Mapping[str, Any] | None = None,
    preference: str = "",
  ) -> None:
    """Makes the folder this run's own: writes config.json, or finds that it is this run's already.

    Args:
      model: the run's, with an adapter.
      data: what it is trained on.
      overwrite: delete the run that is there.
      base: what config.json says of the model that an adapter adapts.
      preference: the name of the loss of pairs of answers.

    Raises:
      errors.InputError: when another run's checkpoints are there and overwrite is False, or it cannot be written.
    """
    described = json.loads(json.dumps(data.describe()))
    config = folder.FolderConfig(model, described, base=dict(base or {}), preference=preference)
    try:
      with tempfile.TemporaryDirectory() as scratch:
        tokenizer = {}
        if hasattr(data, "save_tokenizer"):
          data.save_tokenizer(scratch)
          tokenizer = tokenizer_folder.read(scratch)
        if tokenizer.get("vocab_size", 0) > model.vocab_size:  # before anything is deleted
          raise errors.InputError(
            f"the data's tokenizer has {tokenizer['vocab_size']} ids, the model's vocab_size is "
            f"{model.vocab_size}: give the model as many or more"
          )
        if overwrite:
          self._clear(tokenizer)
        elif manager_lib.steps(self.checkpoints):  # without: killed before its first checkpoint, nothing to lose
          self._check_same(config)
        publish.sweep(self.root / folder.TOKENIZER)
        if tokenizer and (self.root / folder.TOKENIZER).exists():
          tokenizer_folder.copy(scratch, self.root / folder.TOKENIZER)  # copies nothing: raises where it is another one
        self.root.mkdir(parents=True, exist_ok=True)
        if isinstance(self.checkpoints, bucket_path.BucketPath):  # what is unfinished there is paid for
          in_bucket.clean(self.checkpoints)
        # config.json first: it makes the folder a run's, wherever this is killed.
        folder.write_config(self.root, dataclasses.replace(config, tokenizer=tokenizer))
        if tokenizer:
          tokenizer_folder.copy(scratch, self.root / folder.TOKENIZER)
    except OSError as error:
      raise errors.InputError(f"{self.root} cannot be written: {errors.reason(error)}") from error

  def check_shared(self) -> None:
    """Raises InputError, in all processes, unless they all see the folder that the first has opened."""
    if isinstance(self.root, bucket_path.BucketPath):  # which is the same one to all who name it so
      processes.check_same({"workdir": str(self.root)})
    else:
      processes.check_same_filesystem(self._seen, str(self.root))

  def _seen(self) -> int:
    """Returns a sum of what a run begins with: config.json and the names of the checkpoints."""
    text = self.config.read_bytes() if self.config.exists() else b""
    return zlib.crc32(text + repr(manager_lib.steps(self.checkpoints)).encode())

  def _clear(self, tokenizer: dict[str, Any]) -> None:
    """Deletes a run's checkpoints, the oldest first (none is half there), and its records.

    config.json stays until it is replaced, and a tokenizer that is the next run's stays. A folder that holds no run
    keeps what it has.
    """
    if not self.config.exists() and not manager_lib.steps(self.checkpoints):
      return
    publish.remove(self.root / "checkpoints.deleting")  # of earlier versions
    manager_lib.delete_all(self.checkpoints)
    own = (
      self.metrics,
      self.layers,
      *self.computes,
      self.probe,
      self.interventions,
      self.tensorboard,
      self.root / "profile",
      *folders.card(self.root),  # of the model that goes
    )
    for path in (*own, self.replay) if self.owns_replay() else own:
      publish.remove(path)
    if not self._has(tokenizer):
      publish.remove(self.root / folder.TOKENIZER)

  def _has(self, tokenizer: dict[str, Any]) -> bool:
    try:
      return tokenizer_folder.read(self.root / folder.TOKENIZER) == tokenizer
    except errors.InputError as error:
      if errors.may_pass(error):
        raise
      return False

  def _check_same(self, config: folder.FolderConfig) -> None:
    """Compares the run with what config.json and the checkpoints say; these alone where config.json is gone."""
    advice = "choose another workdir, or --overwrite to delete that run"
    metadata, base = manager_lib.newest_metadata(self.checkpoints), config.base
    preference = config.preference
    if "model" in metadata and not (self.config.exists() or self.config.is_symlink()):
      model, data = metadata["model"], metadata["data"]  # and what it adapts is not known
    else:
      found = self._read_config("remove it, and it is written anew" if "model" in metadata else advice)
      if changed := recorded.difference(found.model, metadata):
        raise errors.InputError(f"{self.config} is not the one of this run: {changed}: set it back, or restore a copy")
      model, data = dataclasses.asdict(found.model), metadata.get("data", found.data)
      base, preference = found.base, found.preference or preference  # earlier versions did not say it
    ours = dataclasses.asdict(config.model)
    theirs = {name: model.get(name, ours[name]) for name in ours} | {name: ours[name] for name in recorded.FREE}
    seen = metadata.get("samples_seen", 0)
    fingerprints = ({"fingerprint": each.get("fingerprint")} for each in (base, config.base))
    difference = (
      _difference(*fingerprints, "base")
      or _difference(preference, config.preference, "preference")
      or _difference(theirs, ours, "model")
      or _difference(_before(data, seen), _before(config.data, seen), "data")
    )
    if difference:
      raise errors.InputError(f"{self.root} holds another run: {difference}; {advice}")

  def _read_config(self, advice: str) -> folder.FolderConfig:
    try:
      return folder.read_config(self.root)
    except errors.InputError as error:
      raise errors.InputError(
        f"{self.root} holds checkpoints of a run that cannot be told: {error}; {advice}"
      ) from error


def _before(data: dict[str, Any], samples: int) -> dict[str, Any]:
  """Returns a data description without the changes of rates still to come: those may be made anew."""
  return data | {"changes": [change for change in data.get("changes", ()) if change["first_sample"] < samples]}


def _difference(theirs: Any, ours: Any, name: str) -> str | None:
  """Says in words the first place where two trees of dicts differ."""
  if isinstance(theirs, dict) and isinstance(ours, dict):
    for key in dict.fromkeys([*theirs, *ours]):
      found = _difference(theirs.get(key), ours.get(key), f"{name}.{key}")
      if found:
        return found
    return None
  return None if theirs == ours else f"{name} is {_short(theirs)} there and {_short(ours)} here"


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
