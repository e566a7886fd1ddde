"""Held-out evaluation: bits per byte left to right, and accuracy of filling blanks, beside simple baselines.

docs/evaluation.md says what each figure means.
"""

import dataclasses
import itertools
import json
import logging
import math
import tempfile
from collections.abc import Sequence

import numpy as np

import glmjax
from glmjax.io import bucket_path
from glmjax.io import folders
from glmjax.io import paths
from glmjax.io import progress
from glmjax.io import publish
from glmjax.io import user_json
from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax import tokens as tokens_lib
from glmjax.checkpoint import load
from glmjax.data import shards
from glmjax.evaluate import baselines
from glmjax.evaluate import report
from glmjax.evaluate import windows
from glmjax.infer import placement
from glmjax.infer import runner
from glmjax.infer import score
from glmjax.infer import scoring
from glmjax.infer import vocabulary
from glmjax.parallel import distributed
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import processes

_log = logging.getLogger("glmjax")

SPLIT = "validation"
TASK_PREFIX = "pretrain_"


@dataclasses.dataclass(frozen=True)
class Settings:
  """How much is evaluated, on which text; the same seed gives every checkpoint the same text and spans."""

  seed: int = 0
  max_tokens: int = 100_000  # of each language, left to right
  max_fills: int = 500  # spans to fill in each language; 0 leaves filling out
  seq_length: int | None = None  # places in the longest window; None: what the model was trained on

  def __post_init__(self) -> None:
    if self.max_tokens < 1 or self.max_fills < 0 or (self.seq_length is not None and self.seq_length < 8):
      raise errors.InputError(
        f"evaluation of max_tokens={self.max_tokens}, max_fills={self.max_fills}, "
        f"seq_length={self.seq_length}: use at least 1, 0 and 8"
      )


@dataclasses.dataclass(frozen=True)
class Questions:
  """All that a model is asked in one language."""

  held_out: windows.HeldOut
  left_to_right: list[score.Row]
  fills: list[windows.Fill]

  @property
  def rows(self) -> list[score.Row]:
    """The rows of all questions: left to right, then the spans with both sides in view, then with the left one only."""
    both, left = [fill.both_sides for fill in self.fills], [fill.left_only for fill in self.fills]
    return [*self.left_to_right, *both, *left]


def evaluate(
  checkpoint: paths.Named,
  cache: paths.Named,
  out: paths.Named | None = None,
  *,
  seed: int = 0,
  max_tokens: int = 100_000,
  max_fills: int = 500,
  seq_length: int | None = None,
  mesh: mesh_lib.MeshConfig | str | None = None,
  adapter: paths.Named | None = None,
) -> dict[str, dict]:
  """Evaluates a training folder or an export on the held-out documents of a token cache.

  Args:
    checkpoint: folder of a training run or of an export.
    cache: token cache, made with the checkpoint's tokenizer.
    out: JSON file for the result.
    seed, max_tokens, max_fills, seq_length: see Settings.
    mesh: devices to split the model over, as "tensor=4"; None: the first alone. Of several processes every one reads
      model and cache, and the first writes.

  Returns:
    For each language of the cache (of task pretrain_en: "en") its figures by name.
  """
  settings = Settings(seed, max_tokens, max_fills, seq_length)
  opened = shards.TokenCache.open(cache)
  text_tasks(opened)  # what is wrong with cache and out is said before the long work
  first = distributed.is_first()  # the one that writes
  if out is not None and first:
    out = folders.claim_file(out, "--out")
    _check_out(out)
  place = placement.on_mesh(mesh)
  manifest = json.dumps(opened.manifest, sort_keys=True)
  processes.check_same({f"the cache {opened.directory}": manifest, "how much is evaluated": repr(settings)})
  model = runner.read(checkpoint, place, adapter=adapter)
  result = evaluate_model(model, opened, settings, place, given_away=True)
  if out is not None and first:
    try:
      publish.write_json(out, result | {report.MODEL: _identity(model, adapter)})
    except OSError as error:
      raise errors.InputError(f"{out} cannot be written: {errors.reason(error)}; write --out elsewhere") from error
  return result


def _identity(model: load.LoadedModel, adapter: paths.Named | None) -> dict[str, str | None]:
  """Returns whose figures they are, for the file that holds them: fingerprints, and glmjax's version."""
  adapted = {} if adapter is None else {"adapter": load.fingerprint(adapter)}
  return {"weights": model.metadata.get("weights"), **adapted, "glmjax": glmjax.__version__}


def _check_out(out: paths.Path) -> None:
  """Finds out before the work whether its result can be written, and takes the place of such a result at most."""
  if out.exists() and out.stat().st_size:
    try:
      results = [each for name, each in user_json.read(out).items() if name != report.MODEL]
    except errors.InputError as error:
      if errors.may_pass(error):
        raise
      results = [None]
    if not all(isinstance(result, dict) and "bits_per_byte" in result for result in results):
      raise errors.InputError(f"{out} holds other things than an evaluation, which would be lost: name another --out")
  try:
    if isinstance(out, bucket_path.BucketPath):
      (probe := out.with_name(f".{out.name}.probe")).write_bytes(b"")
      probe.unlink()
      return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):
      pass
  except OSError as error:
    raise errors.InputError(f"{out} cannot be written: {errors.reason(error)}; write --out elsewhere") from error


def evaluate_model(
  model: load.LoadedModel,
  cache: shards.TokenCache,
  settings: Settings = Settings(),
  place: placement.Placement | None = None,
  given_away: bool = False,
) -> dict[str, dict]:
  """Does what `evaluate` does with a model and a cache that are open already; without a placement on the first
  device. `given_away`: the model's parameters may be deleted, so that there is none twice.
  """
  tasks, tokenizer = text_tasks(cache), tokenizer_lib.Tokenizer.load(model.tokenizer_dir)
  asked = ask_all(model, cache, tokenizer, settings)
  for language, questions in asked.items():
    if settings.max_fills and not questions.fills:
      _log.warning(
        "task %s: its held-out documents are too short to fill blanks in; these figures are left out", tasks[language]
      )
  rows = [row for questions in asked.values() for row in questions.rows]
  ready = runner.Runner(model.config, model.params, place, given_away=given_away)
  answers = iter(score_rows(ready, rows, tokenizer))
  result = {}
  for language, questions in asked.items():
    train, whole = (cache.split(tasks[language], split) for split in ("train", SPLIT))
    unigram = baselines.count_unigrams(train, cache.vocab_size, questions.held_out.end)
    scores = list(itertools.islice(answers, len(questions.rows)))
    split_tokens = whole.num_tokens - whole.num_documents  # as in "tokens", without those that end documents
    result[language] = baseline_figures(questions, unigram) | {"split_tokens": split_tokens}
    result[language] |= model_figures(questions, scores)
  return result


def ask_all(
  model: load.LoadedModel, cache: shards.TokenCache, tokenizer: tokenizer_lib.Tokenizer, settings: Settings
) -> dict[str, Questions]:
  """Returns what a model is asked in each language of a cache.

  Raises:
    errors.InputError: where the cache was made with another tokenizer than the model's, or holds nothing out.
  """
  check_tokenizer(cache, tokenizer.fingerprint, model.tokenizer_dir)
  asked = {}
  for language, task in text_tasks(cache).items():
    held_out = windows.choose_documents(
      cache.split(task, SPLIT), tokenizer.specials, tokenizer.decode_bytes, settings.max_tokens, settings.seed
    )
    if not held_out.num_tokens or not held_out.utf8_bytes:
      raise _nothing_held_out(cache, task)
    asked[language] = ask(held_out, model, tokenizer.specials, settings)
  return asked


def check_tokenizer(cache: shards.TokenCache, fingerprint: str, folder: paths.Path) -> None:
  """Raises InputError where a cache was made with another tokenizer than a model's, which is in `folder`."""
  made_with = cache.manifest["tokenizer"]["fingerprint"]
  if fingerprint != made_with:
    raise errors.InputError(
      f"{cache.directory}: made with tokenizer {made_with[:8]}, the checkpoint's is "
      f"{fingerprint[:8]}; make the cache with {folder}"
    )


def score_rows(model: runner.Runner, rows: list[score.Row], tokenizer: vocabulary.Tokenizer) -> list[score.Score]:
  """Scores all languages in one go: rows of like length share batches.

  A guess is a text token: that a span ends here (eop) is no answer to what it goes on with, nor is what is no text.
  How far it is a bar says, or where that is not shown a line a minute.
  """
  total, read = sum(len(row.prompt.tokens) for row in rows), 0
  first, told = distributed.is_first(), progress.Progress(total, "tokens evaluated", seconds=60)
  with progress.bar(
    total=total, unit=" tokens", unit_scale=True, desc="evaluate", disable=None if first else True
  ) as bar:

    def add(tokens: int) -> None:
      nonlocal read
      read += tokens
      bar.update(tokens)
      if bar.disable and first:
        told.at(read)

    unguessed = vocabulary.not_text(tokenizer, model.config.vocab_size)
    return scoring.score_rows(model, rows, tokenizer.specials.pad, progress=add, unguessed=unguessed)


def text_tasks(cache: shards.TokenCache) -> dict[str, str]:
  """Maps each language to the text task of the cache; each must have held-out text."""
  names = [name for name, task in sorted(cache.tasks.items()) if task["kind"] == "text"]
  tasks = {name.removeprefix(TASK_PREFIX): name for name in names}
  if not tasks:
    raise errors.InputError(
      f"{cache.directory}: no text task to evaluate on, only {', '.join(sorted(cache.tasks))}; make a cache of text"
    )
  for name in tasks.values():
    if not cache.split(name, SPLIT).num_tokens:
      raise _nothing_held_out(cache, name)
  return tasks


def _nothing_held_out(cache: shards.TokenCache, task: str) -> errors.InputError:
  return errors.InputError(
    f"{cache.directory}: task {task} has no text in its {SPLIT} split; make the cache "
    "again (glmjax cache --overwrite), which holds out a part of any text"
  )


def ask(
  held_out: windows.HeldOut, model: load.LoadedModel, specials: tokens_lib.SpecialTokens, settings: Settings
) -> Questions:
  """Makes windows and blanks of the lengths that the model was trained on.

  A causal model sees of a blank the left side alone, both times.
  """
  trained = {
    "seq_length": model.config.max_length,
    "samples_per_sequence": 4,
    "mean_span_length": 3.0,
    "max_span_length": 39,
  }  # GLM-130B's, where the checkpoint does not tell
  trained |= (model.metadata.get("data") or {}).get("infilling", {})
  length, positions = settings.seq_length or trained["seq_length"], model.config.position_kind
  fills = windows.fills(
    held_out,
    length // trained["samples_per_sequence"],
    settings.max_fills,
    settings.seed,
    specials,
    positions,
    trained["mean_span_length"],
    trained["max_span_length"],
  )
  rows = windows.left_to_right(held_out, length, specials, positions)
  if model.config.causal:
    rows = [windows.causal(row, specials, positions) for row in rows]
    left_only = [windows.causal(fill.left_only, specials, positions) for fill in fills]
    fills = [windows.Fill(row, row) for row in left_only]
  return Questions(held_out, rows, fills)


def baseline_figures(questions: Questions, unigram: baselines.Unigram) -> dict[str, float]:
  """Returns sizes, and what the unigram model and xz make of the same text."""
  held_out, targets = questions.held_out, [fill.targets for fill in questions.fills]
  figures = {
    "documents": len(held_out.documents),
    "tokens": held_out.num_tokens,
    "bytes": held_out.utf8_bytes,
    "unigram_bits_per_byte": unigram.bits(held_out.documents) / held_out.utf8_bytes,
    "xz_bits_per_byte": baselines.xz_bits(held_out.text) / len(held_out.text),
  }
  if targets:
    num_targets = sum(map(len, targets))
    figures |= {
      "infill_samples": len(targets),
      "infill_tokens": num_targets,
      "unigram_accuracy": unigram.num_right(targets) / num_targets,
    }
  return figures


def model_figures(questions: Questions, scores: Sequence[score.Score]) -> dict[str, float]:
  """Returns the model's own figures, from the scores of `questions.rows`."""
  num_windows, num_fills = len(questions.left_to_right), len(questions.fills)
  read = score.join(scores[:num_windows])
  assert read.count == questions.held_out.num_tokens, (read.count, questions.held_out.num_tokens)
  bits = -read.total / math.log(2)
  figures = {"bits_per_byte": bits / questions.held_out.utf8_bytes, "bits_per_token": bits / read.count}
  if not num_fills:
    return figures
  right = np.array([int(answer.correct.sum()) for answer in scores[num_windows:]])
  both, left = right[:num_fills], right[num_fills:]
  lengths = np.array([len(fill.targets) for fill in questions.fills])
  for name, number in (("accuracy", both), ("accuracy_left_only", left), ("gain", both - left)):
    figures[f"infill_{name}"], figures[f"infill_{name}_se"] = ratio_and_error(number, lengths)
  return figures


def ratio_and_error(numbers: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
  """Returns sum(numbers) / sum(sizes) and its standard error; samples are independent, the tokens in one are not."""
  ratio = numbers.sum() / sizes.sum()
  return float(ratio), float(np.sqrt(np.square(numbers - ratio * sizes).sum()) / sizes.sum())
