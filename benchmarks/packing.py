"""How much of the rows is padding when pairs of drawn lengths are packed: python benchmarks/packing.py

Questions have 40 tokens in the median and answers 150, half of them behind a history of 400 (log-normal, spread 0.9,
1.0 and 0.8), about what chats have. --file takes the lengths of a user's own pairs instead.
"""

import argparse
import time

import numpy as np

from glmjax import tokens
from glmjax.data import in_memory
from glmjax.data import mixtures
from glmjax.data import packing
from glmjax.data import rows


def drawn(count: int) -> np.ndarray:
  """Draws int64 [count, 2]: tokens of inputs and targets."""
  rng = np.random.default_rng(0)
  asked, answered, history = np.exp(rng.normal(np.log([40, 150, 400]), [0.9, 1.0, 0.8], [count, 3])).astype(np.int64).T
  return np.stack([asked + np.where(rng.random(count) < 0.5, history, 0), answered + 1], axis=1)


def of_file(path: str, tokenizer: str) -> np.ndarray:
  """Reads the same of a file of pairs or conversations."""
  held = in_memory.Tokens(mixtures.instruction([path], tokenizer, max_examples=10_000_000), "train")
  return np.concatenate([held.split(name, "train").document_lengths() for name in held.tasks])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--pairs", type=int, default=20_000, help="how many are drawn")
  parser.add_argument("--file", help="a .jsonl file of pairs or conversations in place of them")
  parser.add_argument("--tokenizer", help="of the file: a model's folder")
  arguments = parser.parse_args()
  lengths = of_file(arguments.file, arguments.tokenizer) if arguments.file else drawn(arguments.pairs)
  print(f"{len(lengths):,} pairs of {lengths.sum() / len(lengths):.0f} tokens in the mean")
  print("| places of a row | packing | rows | padding | tokens cut off | seconds |\n|---|---|---|---|---|---|")
  for length in (512, 1024, 2048):
    for kind in rows.PACKINGS:
      made = rows.BlankInfilling(length, tokens.icetk(0, 1000), samples_per_sequence=1, packing=kind)
      start = time.perf_counter()
      count = len(packing.pack_pairs(lengths, made))
      seconds = time.perf_counter() - start
      whole = [made.instruction_row([(np.zeros(a), np.zeros(b))]) for a, b in lengths.tolist()]
      used = sum(length - int(rows.padding(row).sum()) for row in whole)
      cut = 1 - (used - 2 * len(lengths)) / lengths.sum()
      kept = 1 - used / (count * length)
      print(f"| {length:,} | {kind} | {count:,} | {100 * kept:.1f} % | {100 * cut:.1f} % | {seconds:.2f} |")


if __name__ == "__main__":
  main()
