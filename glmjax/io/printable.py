"""The one door for names and texts of others on their way to a terminal."""

import unicodedata


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
