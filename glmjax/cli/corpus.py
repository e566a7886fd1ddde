"""What the commands data and tokenizer need beside the library: training text, and their results in words."""

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


def show_survey(report: dict[str, Any]) -> None:
  """Prints what a report on text comes to, in a few lines."""
  shares = ", ".join(f"{name} {own['share']:.1%}" for name, own in report["languages"].items())
  print(f"{report['documents']:,} documents, {report['bytes'] / 1e6:,.1f} MB: {shares}")
  exact, near = (report["duplicates"][name] for name in ("exact", "near"))
  print(f"repeat one before them: {exact['documents']:,} exactly, {near['documents']:,} nearly")
  found = {kind: own["documents"] for kind, own in report["personal"].items() if own["documents"]}
  print("documents with personal data: " + (", ".join(f"{kind} {n:,}" for kind, n in found.items()) or "none"))
  if "words" in report:
    print(f"documents with words of {report['words']['list']}: {report['words']['documents']:,}")
  for name, own in report.get("overlap", {}).get("files", {}).items():
    print(f"{name}: {own['overlapping']:,} of {own['compared']:,} items overlap")
