"""What `glmjax data` reported of a text, checked to be of the text that a cache was made of; counts alone.

The report has beginnings of lines and paths, which are nobody's but the owner's.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

from glmjax import errors
from glmjax.io import paths
from glmjax.io import user_json

_EXPECTED = "give report.json of glmjax data"


def read(path: paths.Named, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the counts of a report.

  Args:
    path: report.json.
    manifest: of the token cache of the same text.

  Returns:
    `documents`, `bytes`, and by name of documents: `languages`, `duplicates`, `personal`; `words` where
    there was a list; `overlap`: `n`, and by name of the evaluation set `items`, `compared`, `overlapping`.

  Raises:
    errors.InputError: where it is no such report, or one of other text.
  """
  content = user_json.read(path, expected=_EXPECTED)
  if content.get("report") != "text":
    raise errors.InputError(f"--text: {path} is no report on a text: {_EXPECTED}")
  try:
    found = _counts(content)
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise errors.InputError(f"--text: {path} is damaged ({errors.one_line(error)}): {_EXPECTED}") from None
  documents, size = _of_cache(manifest)
  if (found["documents"], found["bytes"]) != (documents, size):
    raise errors.InputError(
      f"--text: {path} is of {found['documents']:,} documents and {found['bytes']:,} bytes, and the cache was made "
      f"of {documents:,} and {size:,}: report on the same files"
    )
  return found


def _counts(content: Mapping[str, Any]) -> dict[str, Any]:
  found: dict[str, Any] = {name: int(content[name]) for name in ("documents", "bytes")}
  for name in ("languages", "duplicates", "personal"):
    found[name] = {str(each): int(own["documents"]) for each, own in content[name].items()}
  if "words" in content:
    found["words"] = int(content["words"]["documents"])
  if "overlap" in content:
    files = {
      pathlib.PurePath(str(file)).name: {name: int(own[name]) for name in ("items", "compared", "overlapping")}
      for file, own in content["overlap"]["files"].items()
    }
    found["overlap"] = {"n": int(content["overlap"]["n"]), "files": files}
  return found


def _of_cache(manifest: Mapping[str, Any]) -> tuple[int, int]:
  """Returns the documents and bytes of text that a cache was made of, before any filter."""
  documents = size = 0
  for task in manifest["tasks"].values():
    if task["kind"] != "text":
      continue
    if task.get("filters"):
      documents, size = documents + task["filters"][0]["documents_in"], size + task["filters"][0]["bytes_in"]
    else:
      documents += sum(split["documents"] for split in task["splits"].values())
      size += sum(split["utf8_bytes"] for split in task["splits"].values())
  return documents, size
