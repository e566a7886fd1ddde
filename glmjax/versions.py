"""Which versions of what compute here: Python, packages, and glmjax's own commit where it is a checkout."""

import functools
import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Iterable

_PACKAGE = pathlib.Path(__file__).resolve().parent
_SECONDS = 10  # that git may take


def installed(package: str) -> str | None:
  """Returns the version of a package; None: it is not installed."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def of(packages: Iterable[str]) -> dict[str, str]:
  """Returns the versions of Python and of those packages that are installed, by their names."""
  found = {name: installed(name) for name in packages}
  return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


@functools.cache
def commit() -> str | None:
  """Returns the commit of the checkout that glmjax is imported from, "-dirty" behind it where files of its are changed.

  None: glmjax is installed, or git cannot tell.
  """
  checkout = _PACKAGE.parent
  if not (checkout / ".git").exists():
    return None
  # No optional locks: a git that the user runs there at the same time must not find the index locked.
  words = ["git", "--no-optional-locks", "-C", str(checkout), "describe"]
  words += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
  try:
    said = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=True)
  except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
    return None
  return said.stdout.strip() or None
