"""One input of the fuzz test."""

import dataclasses
from collections.abc import Mapping

from fuzz import odd


@dataclasses.dataclass(frozen=True)
class Case:
  """One input."""

  about: str
  argv: tuple[str, ...]  # of glmjax; or @NAME and a path, for a reader of the library
  places: tuple[str, ...]
  verdict: str = odd.EITHER
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  copies: tuple[str, ...] = ()  # folders of the world that `files` change
  stdin: bytes | None = None
  out: str | None = None  # what must not be there after a refusal
