"""Folders and patterns of paths (*, ?, [...] and **), alike on a disk and in a bucket."""

from collections.abc import Iterator
import fnmatch
import glob
import pathlib

from glmjax.io import bucket_path
from glmjax.io import paths


def files_below(folder: paths.Path) -> Iterator[paths.Path]:
  """Yields all files in a folder and in those below it."""
  found = folder.rglob("*")
  return found if isinstance(folder, bucket_path.BucketPath) else (path for path in found if path.is_file())


def files(pattern: paths.Path) -> Iterator[paths.Path]:
  """Yields the files that a pattern fits, as glob.glob: hidden ones only where it says so, ** any number of folders."""
  if not isinstance(pattern, bucket_path.BucketPath):
    yield from filter(pathlib.Path.is_file, map(pathlib.Path, glob.glob(str(pattern), recursive=True)))
    return
  root, parts = _split(pattern)
  if "**" in parts:
    yield from (path for path in root.rglob("*") if _fits(path.relative_to(root).parts, parts))
  else:
    yield from _level(root, parts, folders=False)


def matches(pattern: paths.Path) -> Iterator[paths.Path]:
  """Yields the files and folders that a pattern fits; ** is as *."""
  if not isinstance(pattern, bucket_path.BucketPath):
    yield from map(pathlib.Path, glob.glob(str(pattern)))
  else:
    yield from _level(*_split(pattern), folders=True)


def inside(folder: paths.Path, pattern: str) -> Iterator[paths.Path]:
  """Yields the files and folders in a folder that a pattern fits, of names and slashes; the folder's name is none."""
  if not isinstance(folder, bucket_path.BucketPath):
    yield from folder.glob(pattern)
  else:
    yield from _level(folder, tuple(pattern.split("/")), folders=True)


def _split(pattern: bucket_path.BucketPath) -> tuple[bucket_path.BucketPath, tuple[str, ...]]:
  """Returns the folder that all matches are in, and the parts of the pattern behind it."""
  root = pattern
  for path in (pattern, *pattern.parents):
    root = path.parent if glob.has_magic(path.name) else root
  return root, pattern.relative_to(root).parts


def _level(folder: bucket_path.BucketPath, parts: tuple[str, ...], folders: bool) -> Iterator[bucket_path.BucketPath]:
  """Yields what fits below a folder; lists those folders alone that fit."""
  inside, objects = folder.bucket.children(folder.key)
  fitting = [path for path in map(folder.joinpath, map(_name, inside)) if _fits((path.name,), parts[:1])]
  if parts[1:]:
    for path in fitting:
      yield from _level(path, parts[1:], folders)
    return
  yield from fitting if folders else ()
  yield from (folder / _name(each.key) for each in objects if _fits((_name(each.key),), parts))


def _name(key: str) -> str:
  return key.rpartition("/")[2]


def _fits(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
  """Tells whether the names of a path fit the parts of a pattern."""
  if not parts or not names:
    return not names and set(parts) <= {"**"}
  hidden = names[0].startswith(".")
  if parts[0] == "**":
    return _fits(names, parts[1:]) or not hidden and _fits(names[1:], parts)
  fits = fnmatch.fnmatchcase(names[0], parts[0]) and (not hidden or parts[0].startswith("."))
  return fits and _fits(names[1:], parts[1:])
