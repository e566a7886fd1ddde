"""What the weights of models look like, and what rounding them costs on held-out text; docs/evaluation.md has it of
a GLM and a GPT.

The kernels are read block by block (kernels.py). The loss is computed with the whole model in memory, and once more of
it with its kernels rounded.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any

import jax
import numpy as np

import glmjax
from glmjax import display
from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load
from glmjax.data import shards
from glmjax.evaluate import heldout
from glmjax.harness import statistics
from glmjax.infer import placement
from glmjax.infer import runner
from glmjax.io import folders
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import tokenizer_folder
from glmjax.io import user_json
from glmjax.models import params as params_lib
from glmjax.study import kernels as kernels_lib
from glmjax.study import weights_plot
from glmjax.study import weights_table

FLOAT = "float"  # the scheme that rounds nothing
_JSON, _PAGE, _PICTURE = "weights.json", "weights.md", "weights.png"


@dataclasses.dataclass(frozen=True)
class Losses:
  """What a model finds of the windows of one language, in each scheme.

  W windows.
  """

  targets: list[tuple[int, ...]]  # of each window: what two models must share to be compared
  bytes: int  # of all of their text
  bits_W: dict[str, np.ndarray]  # float64, by scheme

  @property
  def tokens_W(self) -> np.ndarray:
    """How many targets each window has, float64."""
    return np.array([len(each) for each in self.targets], np.float64)

  def sample(self, bits_W: np.ndarray) -> statistics.Sample:
    """Returns bits of the windows as a figure in bits per byte, whose units are the windows.

    The bytes of a window are not known: each token counts for as many as all have on average.
    """
    per_byte = self.tokens_W.sum() / self.bytes
    return statistics.Sample(np.stack([bits_W * per_byte, self.tokens_W], axis=-1), _ratio)

  def change(self, scheme: str) -> np.ndarray:
    """Returns how many bits more each window takes than with the floats."""
    return self.bits_W[scheme] - self.bits_W[FLOAT]


def _ratio(sums: np.ndarray) -> np.ndarray:
  return sums[..., 0] / sums[..., 1]


def measure(
  checkpoints: Sequence[paths.Named],
  out: paths.Named,
  cache: paths.Named | None = None,
  label: Sequence[str] = (),
  *,
  seed: int = 0,
  max_tokens: int = 100_000,
  seq_length: int | None = None,
) -> dict[str, Any]:
  """Measures how kernels are spread and what rounding changes of them, and draws models over one another.

  Args:
    checkpoints: folders of training runs and float exports.
    out: folder for weights.json, weights.md and weights.png.
    cache: token cache, made with the tokenizer of all: its held-out text is read left to right by each model in
      float32, with its kernels as they are and rounded; None: the kernels alone are looked at.
    label: what to call each checkpoint; none: as its folder, or by the whole path where two folders have one name.
    seed, max_tokens, seq_length: of the held-out text, as heldout.Settings has them.

  Returns:
    What weights.json holds: "kernels" and "kinds" of each checkpoint, and with a cache "held_out", for each language,
    checkpoint and scheme "bits_per_byte", from the second scheme on its "change" from the floats and, from the second
    checkpoint on, "beside_first": how much larger that is than the first checkpoint's; both with their 95 % intervals
    (bootstrap over windows, the same for all).

  Raises:
    errors.InputError: for what is wrong with folders and cache; for a model that is quantized already.
  """
  names, out = _names(checkpoints, label), paths.named(out, "--out")
  _check_out(out)
  settings = heldout.Settings(seed, max_tokens, 0, seq_length)
  opened = None if cache is None else shards.TokenCache.open(cache)
  if opened is not None:
    heldout.text_tasks(opened)
  for folder in checkpoints:  # what is wrong with the last is said before the work on the first
    folder = paths.named(folder, "checkpoints")
    folder_lib.read_config(folder)
    if opened is not None:
      tokenizer = folder / folder_lib.TOKENIZER
      heldout.check_tokenizer(opened, tokenizer_folder.read(tokenizer)["fingerprint"], tokenizer)
  display.figure(1, 1)  # raises before the work where there is no matplotlib
  with publish.parent(out / _JSON):
    result: dict[str, Any] = {
      "glmjax": glmjax.__version__,
      "schemes": {name: scheme.label for name, scheme in kernels_lib.SCHEMES.items()},
      "checkpoints": {name: _described(folder) for name, folder in zip(names, checkpoints)},
    }
    if opened is not None:
      losses = {name: _losses(folder, opened, settings) for name, folder in zip(names, checkpoints)}
      result["held_out"] = {language: compared(names, losses, language) for language in heldout.text_tasks(opened)}
    _write(out, result)
  return result


def _names(checkpoints: Sequence[paths.Named], label: Sequence[str]) -> list[str]:
  """Returns what to call the checkpoints."""
  if not 1 <= len(checkpoints) <= weights_plot.MOST:
    raise errors.InputError(f"{len(checkpoints)} checkpoints: a picture has room for 1 to {weights_plot.MOST}")
  if label and len(label) != len(checkpoints):
    raise errors.InputError(
      f"--label is given {len(label)} times for {len(checkpoints)} checkpoints: give one for each"
    )
  found = label or [folders.called(folder, "checkpoints") for folder in checkpoints]
  if len({*found}) == len(found):
    return list(found)
  if label:
    raise errors.InputError("--label: two checkpoints have the same one; give each its own")
  found = [str(folder) for folder in checkpoints]
  if len({*found}) < len(found):
    raise errors.InputError("checkpoints: one is named twice; name each once")
  return found


def _check_out(out: paths.Path) -> None:
  """Finds out before the work whether the result has a place, and takes the place of an earlier one at most."""
  for name in (_JSON, _PAGE, _PICTURE):
    folders.claim_file(out / name, "--out")
  if (out / _JSON).exists() and "checkpoints" not in user_json.read(out / _JSON):
    raise errors.InputError(f"{out / _JSON} is not of glmjax weights, and would be lost: name another --out")
  for name in (_PAGE, _PICTURE):
    if (out / name).exists() and not (out / _JSON).exists():
      raise errors.InputError(f"{out / name} is not of glmjax weights, and would be lost: name another --out")


def _described(folder: paths.Named) -> dict[str, Any]:
  """Reads a model's kernels, and returns their figures as plain values."""
  step, found = kernels_lib.measure(folder)
  kinds = {kind: [each for each in found if each.kind == kind] for kind in kernels_lib.KINDS}
  return {
    "checkpoint": str(folder),
    "step": step,
    "kinds": {kind: kernels_lib.of_kind(each) for kind, each in kinds.items() if each},
    "kernels": {
      kernel.path: {
        field.name: getattr(kernel, field.name)
        for field in dataclasses.fields(kernel)
        if field.name not in ("path", "kind", "histogram")
      }
      for kernel in found
    },
  }


def rounded(params: Mapping[str, Any], scheme: kernels_lib.Scheme) -> dict[str, Any]:
  """Returns a model's parameters with the blocks' kernels as a scheme makes them, float32; the rest as it is.

  Layers are stacked or apart.
  """

  def one(path: str, x: jax.Array) -> jax.Array:
    inputs = params_lib.quantized_inputs(path)
    if inputs is None:
      return x
    if x.ndim == -inputs[0]:
      return kernels_lib.rounded(x, scheme, inputs)
    return jax.lax.map(lambda layer: kernels_lib.rounded(layer, scheme, inputs), x)

  return params_lib.nest({path: one(path, x) for path, x in params_lib.flatten(params).items()})


def _losses(folder: paths.Named, cache: shards.TokenCache, settings: heldout.Settings) -> dict[str, Losses]:
  """Has a model read the held-out text in every scheme; returns what it found, by language.

  It computes in float32: bfloat16 would round the kernels once more, by as much as INT8 does.
  """
  model = load.load(folder)
  config = placement.Precision(dtype="float32").of(model.config)
  tokenizer = tokenizer_lib.Tokenizer.load(model.tokenizer_dir)
  asked = heldout.ask_all(model, cache, tokenizer, settings)
  rows = [row for questions in asked.values() for row in questions.rows]
  bits: dict[str, dict[str, np.ndarray]] = {language: {} for language in asked}
  for name, scheme in {FLOAT: None, **kernels_lib.SCHEMES}.items():
    # No name for what was rounded: once it lies as rows it goes.
    ready = runner.Runner(config, model.params if scheme is None else rounded(model.params, scheme))
    scores = iter(heldout.score_rows(ready, rows, tokenizer))
    for language, questions in asked.items():
      own = itertools.islice(scores, len(questions.rows))
      bits[language][name] = np.array([-each.total / math.log(2) for each in own])
  return {
    language: Losses(
      [tuple(map(int, row.targets)) for row in questions.rows], questions.held_out.utf8_bytes, bits[language]
    )
    for language, questions in asked.items()
  }


def compared(
  names: Iterable[str], losses: Mapping[str, Mapping[str, Losses]], language: str
) -> dict[str, dict[str, dict[str, Any]]]:
  """Returns the figures of each model and scheme on the text of one language.

  Raises:
    errors.InputError: where the models were asked for other windows, as models of other lengths are.
  """
  found: dict[str, dict[str, dict[str, Any]]] = {}
  first, *others = names
  own = losses[first][language]
  for name in (first, *others):
    each = losses[name][language]
    if each.targets != own.targets:
      raise errors.InputError(
        f"{first} and {name} read the {language} text in other windows: give seq_length, the same for all, "
        "with --gin.glmjax.study.weights.measure.seq_length=..."
      )
    found[name] = {FLOAT: {"bits_per_byte": each.sample(each.bits_W[FLOAT]).value}}
    for scheme in kernels_lib.SCHEMES:
      figures = {
        "bits_per_byte": each.sample(each.bits_W[scheme]).value,
        "change": _with_interval(each.sample(each.change(scheme))),
      }
      if name != first:
        figures["beside_first"] = _with_interval(each.sample(each.change(scheme) - own.change(scheme)))
      found[name][scheme] = figures
  return found


def _with_interval(sample: statistics.Sample) -> list[float]:
  return [sample.value, *statistics.bootstrap(sample)]


def _write(out: paths.Path, result: Mapping[str, Any]) -> None:
  """Writes the figures, by which the next call knows the other files for its own, then the page and the picture.

  Raises:
    errors.InputError: where the system refuses.
  """
  picture = weights_plot.draw(result)
  try:
    publish.write_json(out / _JSON, result)
    publish.write_text(out / _PAGE, weights_table.page(result, _PICTURE))
    picture.save(out / _PICTURE)
  except OSError as error:
    raise errors.InputError(f"{out} cannot be written: {errors.reason(error)}; write --out elsewhere") from error
