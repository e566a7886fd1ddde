"""Operations that can be computed in several ways, and how one of these is chosen for a target."""

from collections.abc import Callable
import dataclasses
from typing import Any

from glmjax import target as target_lib


def always(target: target_lib.Target, *arguments: Any) -> bool:
  """Returns True whatever the arguments are."""
  del target, arguments
  return True


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to compute an operation.

  Args:
    name: what `glmjax doctor` calls it.
    takes: in words, the arguments that fit.
    run: computes, of (target, *arguments).
    needs: features of the target (target.FEATURES).
    fits: whether it takes these (target, *arguments), of a target that has what it needs.
  """

  name: str
  takes: str
  run: Callable[..., Any]
  needs: tuple[str, ...] = ()
  fits: Callable[..., bool] = always

  def lacks(self, target: target_lib.Target) -> str | None:
    """Says in words why it does not run on a target whatever the arguments; None where it does."""
    return next(filter(None, map(target.lacks, self.needs)), None)


@dataclasses.dataclass(frozen=True)
class Operation:
  """What is computed, and the ways to do it, the best first; the last takes everything everywhere."""

  computes: str
  implementations: tuple[Implementation, ...]

  def choose(self, target: target_lib.Target, *arguments: Any) -> Implementation:
    """Returns the first implementation that runs on the target and takes the arguments."""
    return next(way for way in self.implementations if not way.lacks(target) and way.fits(target, *arguments))

  def explain(self, target: target_lib.Target) -> list[tuple[str, str]]:
    """Returns each implementation's name, and for which arguments it is chosen on this target or why it never is."""
    lines, chosen = [], False
    for way in self.implementations:
      role = "for the rest" if chosen else "chosen"
      lines.append((way.name, way.lacks(target) or f"{role}: takes {way.takes}"))
      chosen = chosen or not way.lacks(target)
    return lines

  def run(self, target: target_lib.Target, *arguments: Any) -> Any:
    """Computes the operation by the chosen implementation."""
    return self.choose(target, *arguments).run(target, *arguments)
