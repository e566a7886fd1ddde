"""What is other in one checkpoint than in another: a changelog, and by how much a version is to rise."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.checkpoint import blocks
from glmjax.checkpoint import recorded
from glmjax.checkpoint import source as source_lib
from glmjax.checkpoint import stored_weights
from glmjax.io import paths
from glmjax.io import progress
from glmjax.models import params as params_lib

# Which part of MAJOR.MINOR.PATCH rises: what reads the model must change; what it says changes; or nothing but form.
MAJOR, MINOR, PATCH, NOTHING = "major", "minor", "patch", "nothing"
_FORM = ("param_dtype", *recorded.FREE)  # of the model's settings: how it is computed, not what it is
_ROUNDING = 0.3  # |after - before| / |before| of a part: INT4 rounds by half of that, other weights differ by more


def compare(runs: Sequence[paths.Named]) -> dict[str, Any]:
  """Returns what is other in the second of two models than in the first.

  Args:
    runs: two folders, each of a training run, an export or an import.

  Returns:
    {"model", "data", "tokenizer", "form": fields with [before, after], "step": [before, after], "parts": {part:
    {"parameters", "arrays", "changed" arrays, "distance": |after - before| / |before|, null where shapes differ}},
    "raises": which part of a version's number}.

  Raises:
    errors.InputError: for other than two folders, and where one is no model's or damaged.
  """
  if len(runs) != 2:
    raise errors.InputError(f"{len(runs)} folders: name the model before, and the one after")
  return source_lib.use(runs[0], lambda before: source_lib.use(runs[1], lambda after: _between(before, after)))


def _between(before: source_lib.Source, after: source_lib.Source) -> dict[str, Any]:
  mine, its = (dataclasses.asdict(each.config.model) for each in (before, after))
  fields = _other(mine, its)
  form = {name: fields.pop(name) for name in _FORM if name in fields}
  if before.bits != after.bits:
    form["bits"] = [before.bits, after.bits]
  found = {
    "model": fields,
    "form": form,
    "tokenizer": _other(before.config.tokenizer, after.config.tokenizer),
    "data": _other(before.config.data, after.config.data),
    "step": [before.step, after.step],
    "parts": _parts(before, after),
  }
  return found | {"raises": _raises(before, after, found)}


def _other(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
  """Returns what two tables have of one name that is not the same."""
  names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
  return {name: [before.get(name), after.get(name)] for name in names}


def _raises(before: source_lib.Source, after: source_lib.Source, found: Mapping[str, Any]) -> str:
  tokenizers = {each.config.tokenizer.get("fingerprint") for each in (before, after)} - {None}
  if found["model"] or len(tokenizers) > 1:
    return MAJOR
  if before.fingerprint == after.fingerprint:
    return NOTHING
  distances = [own["distance"] for own in found["parts"].values()]
  rounded = all(each is not None and each < _ROUNDING for each in distances)
  same_origin = before.step == after.step and not found["data"]
  return PATCH if found["form"] and same_origin and rounded else MINOR


def _parts(before: source_lib.Source, after: source_lib.Source) -> dict[str, dict[str, Any]]:
  """Returns how far the weights of each part have moved, read block by block."""
  mine, its = ({weight.name: weight for weight in each.weights()} for each in (before, after))
  readers = [blocks.Reader(each.arrays, each.records) for each in (before, after)]
  parts: dict[str, _Part] = {}
  total = sum(math.prod(weight.shape) for weight in its.values())
  with progress.bar(total=total, unit=" weights", unit_scale=True, desc="compare", disable=None) as bar:
    for name in {**mine, **its}:
      part = parts.setdefault(params_lib.known(name).part, _Part())
      pair = (mine.get(name), its.get(name))
      if pair[0] is None or pair[1] is None or pair[0].shape != pair[1].shape:
        part.count(pair, None)
        continue
      part.count(pair, _squares((before, after), readers, pair))
      bar.update(math.prod(pair[1].shape))
  return {name: part.figures() for name, part in sorted(parts.items())}


def _squares(
  sources: Sequence[source_lib.Source], readers: Sequence[blocks.Reader], weights: Sequence[stored_weights.StoredWeight]
) -> tuple[float, float]:
  """Returns the sums of squares of a weight's change, and of what it was."""
  changed = whole = 0.0
  for region in weights[0].regions():
    old, new = (
      weight.floats(source.read_block(reader, weight, region))
      for source, reader, weight in zip(sources, readers, weights)
    )
    changed += float(np.square(new - old, dtype=np.float64).sum())
    whole += float(np.square(old, dtype=np.float64).sum())
  for source, reader, weight in zip(sources, readers, weights):
    reader.verify([source.prefix + name for name in weight.stored(weight.shape)])
  return changed, whole


@dataclasses.dataclass
class _Part:
  """Sums over the weights of a part."""

  parameters: int = 0
  arrays: int = 0
  changed: int = 0
  comparable: bool = True
  squares: tuple[float, float] = (0.0, 0.0)

  def count(
    self,
    weights: tuple[stored_weights.StoredWeight | None, stored_weights.StoredWeight | None],
    squares: tuple[float, float] | None,
  ) -> None:
    """Adds a weight, before and after; squares: None where it is there once only, or in another shape."""
    self.arrays += 1
    self.parameters += 0 if weights[1] is None else math.prod(weights[1].shape)
    self.changed += squares is None or squares[0] != 0  # NaN too
    self.comparable &= squares is not None
    if squares is not None:
      self.squares = (self.squares[0] + squares[0], self.squares[1] + squares[1])

  def figures(self) -> dict[str, Any]:
    """Returns them as the result has them."""
    changed, whole = self.squares
    distance = math.sqrt(changed / whole) if whole else 0.0 if not changed else None
    return {
      "parameters": self.parameters,
      "arrays": self.arrays,
      "changed": self.changed,
      "distance": distance if self.comparable else None,
    }


def table(found: Mapping[str, Any]) -> str:
  """Returns the changes as Markdown."""
  lines = [f"Raises the {found['raises']} part of the version's number." if found["raises"] != NOTHING else "The same."]
  for what in ("model", "tokenizer", "data", "form"):
    for name, (before, after) in found[what].items():
      lines.append(f"- {what}: {name}: {_cut(before)} -> {_cut(after)}")
  if found["step"][0] != found["step"][1]:
    lines.append(f"- training step: {found['step'][0]} -> {found['step'][1]}")
  lines += ["", "| weights | parameters | arrays | changed | distance |", "|---|---:|---:|---:|---:|"]
  for name, own in found["parts"].items():
    moved = "-" if own["distance"] is None else f"{own['distance']:.3g}"
    lines.append(f"| {name} | {own['parameters']:,} | {own['arrays']} | {own['changed']} | {moved} |")
  return "\n".join(lines)


def _cut(value: Any) -> str:
  text = str(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
