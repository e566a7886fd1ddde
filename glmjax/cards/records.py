"""The one reader of what runs recorded: a JSON object a line, of which any may be damaged."""

import functools
from collections.abc import Iterator
from typing import Any

from glmjax import errors
from glmjax.io import paths
from glmjax.io import user_json
from glmjax.io import user_text

_LONGEST = 1 << 20  # bytes of a line


def read(path: paths.Path) -> Iterator[dict[str, Any] | None]:
  """Yields the objects of a file's lines; None for a line that is none, but for the last, which may be being written.

  One line at a time is in memory, and of longer ones than a megabyte a part of that length.

  Raises:
    errors.InputError: when the file cannot be read.
  """
  user_text.check_regular(path)
  try:
    with path.open("rb") as file:
      is_new = True
      for part in iter(functools.partial(file.readline, _LONGEST), b""):
        if is_new:
          try:
            yield user_json.parse(part, "")
          except errors.InputError:
            if part.endswith(b"\n") or len(part) == _LONGEST:
              yield None
        is_new = part.endswith(b"\n")
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error
