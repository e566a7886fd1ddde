"""Instruction sets: which files are which set, and how many pairs of each are taken."""

from collections.abc import Mapping
import fnmatch
import glob
import re

from glmjax import errors
from glmjax import ranges
from glmjax.data import text
from glmjax.io import globs
from glmjax.io import paths as paths_lib

# GLM-130B cut each T0 data set to so many samples (paper, appendix C.1); one set must not drown the others.
MAX_EXAMPLES = 100_000

Sets = Mapping[str, text.Patterns] | text.Patterns


def named_sets(files: Sets) -> dict[str, text.Patterns]:
  """Returns the data sets by name.

  Args:
    files: for each name its .jsonl files, folders or globs; or a list of files and folders, each a set that
      bears its name (a glob: each of its matches); or one folder, each file and folder in it a set.

  Raises:
    errors.InputError: when there is none, or two of one name; when one that is named (no glob's match) is not there.
  """
  advice = "give .jsonl files, one JSON object a line (a .json file that is that: rename it), or folders of them"
  if isinstance(files, Mapping):
    for name, patterns in files.items():
      if not isinstance(name, str) or not re.fullmatch(r"[\w.]{1,100}", name):
        raise errors.InputError(
          f"instruction set {str(name)[:60]!r}: use up to 100 letters, digits, _ and . in its name"
        )
      if not text.are_patterns(patterns):
        raise errors.InputError(f"instruction set {name}: its files are {str(patterns)[:60]!r}: {advice}")
    return dict(files)
  if not text.are_patterns(files):
    raise errors.InputError(f"the instruction sets are {str(files)[:60]!r}: {advice}")
  if isinstance(files, paths_lib.Named):
    folder = paths_lib.named(files, "the folder of the instruction sets")
    files = [folder / "*"] if folder.is_dir() else [folder]
  paths: list[paths_lib.Path] = []
  for pattern in (paths_lib.named(each, "the path of an instruction set") for each in files):
    if glob.has_magic(str(pattern)):
      paths += filter(_is_set, sorted(globs.matches(pattern)))
    elif pattern.exists() and _is_set(pattern):
      paths.append(pattern)
    else:
      wrong = "is neither" if pattern.exists() else "does not exist"
      raise errors.InputError(f"instruction set {pattern} {wrong}: {advice}")
  if not paths:
    raise errors.InputError(f"no instruction set among {', '.join(map(str, files))[:200] or 'no files'}: {advice}")
  sets: dict[str, text.Patterns] = {}
  for path in paths:
    name = re.sub(r"\W", "_", path.stem if path.suffix == ".jsonl" else path.name)[:100]
    if sets.setdefault(name, str(path)) != str(path):
      raise errors.InputError(f"two instruction sets have the name {name}: {sets[name]} and {path}; rename one")
  return sets


def _is_set(path: paths_lib.Path) -> bool:
  return path.is_dir() or path.suffix == ".jsonl"


def caps(names: list[str], max_examples: Mapping[str, int] | int) -> dict[str, int]:
  """Returns how many examples of each set are taken at most, by a number for all or by name and pattern."""
  if not isinstance(max_examples, Mapping):
    ranges.whole("max_examples", max_examples, 1)
    max_examples = {"*": max_examples}
  for name, cap in max_examples.items():
    if not isinstance(name, str):
      raise errors.InputError(f"max_examples are given for {str(name)[:60]}: give names of sets, or patterns of names")
    ranges.whole(f"max_examples of {name[:100]}", cap, 1)
  fits = {name: [cap for pattern, cap in max_examples.items() if fnmatch.fnmatchcase(name, pattern)] for name in names}
  without = [name for name, caps in fits.items() if not caps]
  unknown = [name for name in max_examples if name not in names and not glob.has_magic(name)]
  if without or unknown:
    what = f"there is no set {unknown[0]!r}" if unknown else f"none fits {without[0]!r}"
    raise errors.InputError(
      f"max_examples are given for {sorted(max_examples)}, and {what}; the sets are {sorted(names)}"
    )
  return {name: caps[0] for name, caps in fits.items()}
