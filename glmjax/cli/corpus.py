"""What the tokenizer command needs beside the library: its training text, and its result in words."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def training_documents(
  files: Mapping[str, str | os.PathLike | Sequence[str | os.PathLike]], field: str = "text"
) -> Iterator[str]:
  """Yields the documents of every language's training split; `files` is what data.mixtures.pretraining takes.

  Language by language, since held-out documents are counted within a language's files.
  """
  from glmjax.data import text  # gin names this module before a command is known to be in order

  text.check_corpora(files)
  for patterns in files.values():
    yield from text.documents(patterns, split="train", field=field)


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
  """Describes a trained Tokenizer as the command prints it."""
  return {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
