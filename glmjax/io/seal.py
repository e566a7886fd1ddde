"""JSON that knows its own checksum, so that a flipped bit or a hurried edit of it is noticed."""

from collections.abc import Mapping
import json
from typing import Any
import zlib

_KEY = "crc32"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `content` with its checksum, which does not depend on how the JSON is laid out."""
  return {**content, _KEY: _checksum(content)}


def unseal(content: Mapping[str, Any], required: bool = True) -> dict[str, Any]:
  """Returns what `seal` was given.

  Args:
    content: as read back.
    required: refuse content without a checksum; else (older files have none) it is taken as it is.

  Raises:
    ValueError: when it is not what was written.
  """
  if not isinstance(content, Mapping):
    raise ValueError("no JSON object")
  bare = {name: value for name, value in content.items() if name != _KEY}
  if (_KEY in content or required) and content.get(_KEY) != _checksum(bare):
    raise ValueError("its own checksum differs")
  return bare


def _checksum(content: Mapping[str, Any]) -> str:
  return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
