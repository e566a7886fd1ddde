"""The one door for names and texts of others on their way to a terminal."""

import re
import unicodedata

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line ends


def text(shown: str) -> str:
  r"""Returns a text of any number of lines with the control characters that a terminal would obey written as \x1b."""
  return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", shown)


def line(text: object, longest: int = 1000) -> str:
  r"""Returns the text in one line: what a terminal would obey (escape sequences, line ends) written as \x1b.

  Args:
    text: of any length: names of files and tensors, words of a configuration.
    longest: characters that are kept.
  """
  text = str(text)
  cut = text[:longest] + ("..." if len(text) > longest else "")
  return "".join(
    c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode("ascii") for c in cut
  )
