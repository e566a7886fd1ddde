"""The launch scripts that come with glmjax: what there is, and copies of them (docs/launch.md)."""

import os
import pathlib
import re

from glmjax import errors
from glmjax.io import paths, publish

_SCRIPTS = ("Dockerfile", "*.sh", "*.sbatch", "*.service", "*.yaml")  # also in setup.cfg, for the wheel


def scripts(out: str | os.PathLike | None = None) -> dict[str, str]:
  """Tells what each launch script does, in its own first sentence, by its path; `out` names a folder for copies.

  Raises:
    errors.InputError: where another file has a script's name in that folder; then nothing is copied.
  """
  found = sorted(path for pattern in _SCRIPTS for path in paths.shipped("launch_scripts", "launch").glob(pattern))
  if out is not None:
    found = _copy(found, paths.local(out, "--out"))
  return {str(path): _purpose(path.read_text(encoding="utf-8")) for path in found}


def _copy(sources: list[pathlib.Path], folder: pathlib.Path) -> list[pathlib.Path]:
  copies = [folder / source.name for source in sources]
  for source, copy in zip(sources, copies):
    if copy.exists() and not (copy.is_file() and copy.read_bytes() == source.read_bytes()):
      raise errors.InputError(f"{copy}: another file of that name is there; move it away, or choose another --out")
  with publish.parent(copies[0]):
    for source, copy in zip(sources, copies):
      with publish.file(copy) as file:
        file.write(source.read_bytes())
        if source.suffix in (".sh", ".sbatch"):
          os.fchmod(file.fileno(), 0o755)  # new files are made without it
  return copies


def _purpose(script: str) -> str:
  """Returns the first sentence of the comment that a script begins with."""
  comment = re.search(r"^# (.*(?:\n# .*)*)", script, re.MULTILINE)
  return re.split(r"(?<=[.:])\s", comment[1].replace("\n# ", " "))[0].rstrip(".:")
