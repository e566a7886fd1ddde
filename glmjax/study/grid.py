"""The grid of a study: axes, and the points that are a choice from each of them."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmjax import errors
from glmjax import ranges

Key = tuple[str, ...]  # a choice from some axes

_LONGEST_NAME = 120  # characters; a file's name may have 255 bytes
_MOST_POINTS = 100_000


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of a study."""

  labels: Mapping[str, Any]  # what each axis has here, in the order of the axes
  bindings: tuple[str, ...]  # what gin is to bind for it, as "NAME=value"

  @property
  def name(self) -> str:
    """The name of its folder: what its axes have; where that is too long, or no name, with a hash behind it."""
    text = ",".join(f"{short(axis).replace(' ', '_')}={label}" for axis, label in self.labels.items())
    name = re.sub(r"[^\w.+=,-]+", "-", text, flags=re.ASCII)[:_LONGEST_NAME]
    if name == text:
      return name
    return f"{name}-{hashlib.sha256(repr(sorted(self.labels.items())).encode()).hexdigest()[:8]}"

  def __str__(self) -> str:
    return described(self.labels)


@dataclasses.dataclass(frozen=True)
class Grid:
  """What is tried together with what.

  An axis is a gin macro or parameter with its values, or a name of its own with what each of its labels binds:

    {"LEARNING_RATE": [1e-3, 1e-2], "norm": {"Pre-LN": {"config.GLMConfig.norm": "pre"}, "Post-LN": {...}}}

  Text that begins with @ or % is a reference of gin's. Pictures have `over` from left to right, a line for each value
  of the first other axis, and a panel for each choice from those that remain.
  """

  axes: Mapping[str, Any]
  over: str  # the axis of numbers whose effect is studied, as the learning rate
  repeats: str | None = None  # the axis whose values are repeats of one another, as the seed; None: there are none

  def __post_init__(self) -> None:
    if not isinstance(self.axes, Mapping) or not self.axes:
      raise errors.InputError(f"Grid.axes is {self.axes!r}: give a dict of axes and their values")
    self._check_texts()
    for axis, values in self.axes.items():
      if isinstance(values, Mapping):
        wrong = [label for label, bound in values.items() if not isinstance(bound, Mapping)]
        if wrong:
          raise errors.InputError(
            f"Grid.axes[{axis!r}][{wrong[0]!r}] is no dict of what it binds, as {{'NORM': 'pre'}}"
          )
      elif len({*map(repr, ranges.several(f"Grid.axes[{axis!r}]", values))}) < len(values):
        raise errors.InputError(f"Grid.axes[{axis!r}] is {list(values)}: give each value once")
      if not values:
        raise errors.InputError(f"Grid.axes[{axis!r}] has no values: give one or more")
    for name in ("over", "repeats"):
      axis = getattr(self, name)
      if axis not in self.axes and (name, axis) != ("repeats", None):
        raise errors.InputError(f"Grid.{name} is {axis!r}: give one of the axes, {', '.join(self.axes)}")
    if self.repeats == self.over:
      raise errors.InputError(f"Grid: over and repeats are both {self.over}: give two axes")
    for i, value in enumerate(self.axes[self.over]):
      ranges.number(f"Grid.axes[{self.over!r}][{i}]", value, above=0)
    names = [name for axis in self.axes for name in self._bound(axis)]
    if twice := [name for name in names if names.count(name) > 1]:
      raise errors.InputError(f"Grid.axes: two axes bind {twice[0]}: bind it in one")
    if len(self) > _MOST_POINTS:
      raise errors.InputError(f"Grid.axes have {len(self):,} points: give at most {_MOST_POINTS:,}")

  def _check_texts(self) -> None:
    """Checks that what names an axis, or something that gin binds, is text."""
    named = [("Grid.axes", "an axis", axis) for axis in self.axes]
    for axis, values in self.axes.items():
      for label, bound in values.items() if isinstance(values, Mapping) else ():
        names = bound if isinstance(bound, Mapping) else ()
        named += [(f"Grid.axes[{axis!r}][{label!r}]", "what it binds", name) for name in names]
    for where, what, name in named:
      if not isinstance(name, str):
        raise errors.InputError(f"{where} has {name!r} for the name of {what}: give text, as 'PEAK_LEARNING_RATE'")
    for name in ("over", "repeats"):
      axis = getattr(self, name)
      if not isinstance(axis, str) and (name, axis) != ("repeats", None):
        raise errors.InputError(f"Grid.{name} is {axis!r}: give the name of one axis, {', '.join(self.axes)}")

  def __len__(self) -> int:
    count = 1
    for values in self.axes.values():
      count *= len(values)
    return count

  @property
  def others(self) -> tuple[str, ...]:
    """The axes besides `over` and `repeats`: lines, and behind them panels."""
    return tuple(axis for axis in self.axes if axis not in (self.over, self.repeats))

  def points(self) -> Iterator[Point]:
    """Yields every point; repeats are the outermost, so that a study that is cut short has all of the first ones."""
    order = sorted(self.axes, key=lambda axis: axis != self.repeats)
    for labels in itertools.product(*(self.axes[axis] for axis in order)):
      found = dict(zip(order, labels))
      bindings = [each for axis in self.axes for each in self._bindings(axis, found[axis])]
      yield Point({axis: found[axis] for axis in self.axes}, tuple(bindings))

  def _bound(self, axis: str) -> list[str]:
    """Returns the names that an axis binds, in any of its labels."""
    values = self.axes[axis]
    return (
      list(dict.fromkeys(name for bound in values.values() for name in bound))
      if isinstance(values, Mapping)
      else [axis]
    )

  def _bindings(self, axis: str, label: Any) -> Iterator[str]:
    values = self.axes[axis]
    bound = values[label] if isinstance(values, Mapping) else {axis: label}
    for name, value in bound.items():
      yield f"{name}={value if _is_reference(value) else repr(value)}"


def _is_reference(value: Any) -> bool:
  return isinstance(value, str) and value.startswith(("@", "%"))


def short(axis: str) -> str:
  """Returns an axis's name for people: the last part of it, in words."""
  return axis.rpartition(".")[2].replace("_", " ").lower()


def described(labels: Mapping[str, Any]) -> str:
  """Returns what some axes have, in words."""
  return ", ".join(f"{short(axis)} {label}" for axis, label in labels.items())


def choices(grid: Grid, axes: Sequence[str]) -> dict[Key, tuple[Any, ...]]:
  """Returns every choice from some of the axes, in their order, by its key."""
  return {_key(choice): choice for choice in itertools.product(*(grid.axes[axis] for axis in axes))}


def key(point: Point, axes: Sequence[str]) -> Key:
  """Returns the key of what a point has of some axes."""
  return _key([point.labels[axis] for axis in axes])


def _key(choice: Sequence[Any]) -> Key:
  return tuple(map(repr, choice))  # labels may be lists, which no dict takes as keys
