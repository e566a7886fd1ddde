"""A mixture of text files tokenized when a run begins: for fine-tuning on a file or two, without a step of its own."""

import array
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import hashlib
import json
import logging
import time
from typing import Any

import numpy as np

from glmjax import errors
from glmjax import ranges
from glmjax.data import loader
from glmjax.data import mixtures
from glmjax.data import preference_rows
from glmjax.data import rows
from glmjax.data import sampler
from glmjax.data import shards
from glmjax.data import tokenized
from glmjax.io import paths

MOST_TOKENS = 1 << 28  # of a mixture's split: 1 GiB as int32, some GB of text
_log = logging.getLogger("glmjax")


class Split:
  """The split of the task `name`, read as shards.SplitReader reads it."""

  def __init__(self, name: str, documents: Iterable[shards.Document], room: int) -> None:
    """Takes in all documents, of `room` tokens at most.

    Raises:
      errors.InputError: when they have more.
    """
    tokens, table = array.array("i"), array.array("q")
    for document in documents:
      tokens.frombytes(np.asarray(document.tokens, np.int32).tobytes())
      table.extend((len(tokens), document.input_length))
      if len(tokens) > room:
        raise errors.InputError(
          f"with task {name} there are more than {MOST_TOKENS:,} tokens, which are not kept in memory: cache them with "
          "glmjax cache, and train from that (loop.train.data = @loader.CachedMixture())"
        )
    self.tokens = np.frombuffer(tokens, np.int32) if tokens else np.zeros(0, np.int32)
    self.table = np.array(table, np.int64).reshape(-1, 2)  # [documents, 2]: end, input tokens
    self.num_tokens = len(tokens)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Reads token ids [start, stop) of the split's stream."""
    return self.tokens[start:stop]

  def documents_between(self, first: int, last: int) -> list[shards.Document]:
    """Reads documents [first, last)."""
    begin = int(self.table[first - 1, 0]) if first else 0
    found = []
    for end, input_length in self.table[first:last].tolist():
      found.append(shards.Document(self.tokens[begin:end], input_length=input_length))
      begin = end
    return found

  def document_lengths(self) -> np.ndarray:
    """Returns int64 [documents, 2]: input tokens and the rest of every document."""
    ends, input_lengths = self.table.T
    return np.stack([input_lengths, np.diff(ends, prepend=0) - input_lengths], axis=1)


class Tokens:
  """The tokens of one split of a mixture's tasks, in the files' order."""

  def __init__(self, mixture: mixtures.Mixture, split: str) -> None:
    start = time.monotonic()
    self.directory = f"the mixture {mixture.name}"
    self._splits: dict[str, Split] = {}
    room = MOST_TOKENS
    for task in sorted(mixture.tasks, key=lambda task: task.name):
      if split in task.splits:
        made = Split(task.name, task.documents(mixture.tokenizer, split, 0, 1), room)
        self._splits[task.name], room = made, room - made.num_tokens
    self.tasks = {
      task.name: {
        "kind": task.kind,
        "rate": mixture.rates[task.name],
        "splits": {split: {"documents": len(self._splits[task.name].table)}},
      }
      for task in mixture.tasks
      if task.name in self._splits
    }
    self._seconds = time.monotonic() - start

  @property
  def num_examples(self) -> int:
    """How many documents and pairs there are, of answers as well, each of which is two documents."""
    return sum(
      len(split.table) // (2 if self.tasks[name]["kind"] == tokenized.PREFERENCE else 1)
      for name, split in self._splits.items()
    )

  def split(self, task: str, split: str) -> Split:
    """Returns one task's tokens; `split` is the one that all are of."""
    assert split in self.tasks[task]["splits"], split
    return self._splits[task]

  @functools.cached_property
  def fingerprint(self) -> str:
    """The fingerprint of all tokens, and of which document each belongs to."""
    digest = hashlib.sha256()
    for name, split in self._splits.items():
      digest.update(f"{name} {split.num_tokens} {len(split.table)}\n".encode())
      digest.update(split.tokens)
      digest.update(split.table)
    return digest.hexdigest()

  def __str__(self) -> str:
    tokens = sum(split.num_tokens for split in self._splits.values())
    return f"{self.num_examples:,} examples, {tokens:,} tokens, in {self._seconds:.1f} s"


@dataclasses.dataclass(frozen=True)
class InMemoryMixture:
  """A DataSource over text files: sample i is a function of the text, tokenizer, infilling, seed and i alone.

  Every process reads and tokenizes all of the split, before the first step of a run and when it is taken up again.
  """

  mixture: mixtures.Mixture  # as mixtures.instruction, pretraining and joined make it
  infilling: sampler.Infilling | Callable[..., sampler.Infilling]  # or what makes one from `specials`
  seed: int = 0
  split: str = "train"

  def __post_init__(self) -> None:
    if not isinstance(self.mixture, mixtures.Mixture):
      raise errors.InputError(
        f"InMemoryMixture.mixture is {str(self.mixture)[:60]}: give what mixtures.instruction(...) or another function "
        "of mixtures returns (in a gin file with () at its end)"
      )
    ranges.whole("InMemoryMixture.seed", self.seed, -(2**63), 2**64 - 1)

  @property
  def seq_length(self) -> int:
    return self._infilling.seq_length

  @functools.cached_property
  def _infilling(self) -> sampler.Infilling:
    if callable(self.infilling):
      return self.infilling(specials=self.mixture.tokenizer.specials)
    if self.infilling.specials != self.mixture.tokenizer.specials:
      raise errors.InputError("InMemoryMixture: its infilling has other special tokens than the mixture's tokenizer")
    return self.infilling

  @functools.cached_property
  def _tokens(self) -> Tokens:
    tokens = Tokens(self.mixture, self.split)
    if not tokens.num_examples:
      raise errors.InputError(
        f"{tokens.directory} has nothing in the split {self.split!r}: of pairs and conversations every 50th is held "
        "out; give more of them, or do without that split (loop.train.validation = None)"
      )
    return tokens

  @functools.cached_property
  def sampler(self) -> sampler.MixtureSampler:
    """What gives rows by their numbers, made when it is first asked for."""
    made = sampler.MixtureSampler(self._tokens, self._infilling, self.seed, self.split)
    sizes = ", ".join(f"{name} {size:,}" for name, size in made.describe()["rows_per_epoch"].items())
    _log.info("%s, %s: %s; rows of an epoch: %s", self.mixture.name, self.split, self._tokens, sizes)
    self._say_what_is_cut()
    for name, count in made.left_out().items():
      _log.warning(
        "task %s, %s: %s pairs of answers are left out, as what a row of %s places has room for is the same of both "
        "(BlankInfilling.seq_length)",
        *(name, self.split, f"{count:,}", f"{self.seq_length:,}"),
      )
    return made

  def _say_what_is_cut(self) -> None:
    """Tells how many pairs lose tokens, for want of room in a row."""
    if not isinstance(self._infilling, rows.BlankInfilling):
      return
    keeps_whole = self._infilling.keeps_answers_whole if self.mixture.prefers else self._infilling.keeps_whole
    for name in (name for name, task in self._tokens.tasks.items() if task["kind"] != "text"):
      split = self._tokens.split(name, self.split)
      lengths = preference_rows.lengths(split) if self.mixture.prefers else split.document_lengths()
      distinct, counts = np.unique(lengths, axis=0, return_counts=True)
      cut = sum(n for pair, n in zip(distinct.tolist(), counts.tolist()) if not keeps_whole(*pair))
      if cut:
        _log.warning(
          "task %s, %s: %s of %s pairs are longer than a row of %s places has room for: their questions are cut at the "
          "%s, their answers at the end (BlankInfilling.seq_length, instruction_cut)",
          *(name, self.split, f"{cut:,}", f"{len(lengths):,}", f"{self.seq_length:,}"),
          self._infilling.instruction_cut,
        )

  def describe(self) -> dict[str, Any]:
    """Describes all that decides the rows: a run resumed with another description would see other data."""
    described = {
      "source": "memory",
      "mixture": self.mixture.name,
      "text": self._tokens.fingerprint,
      "tokenizer": self.mixture.tokenizer.fingerprint,
      "seed": self.seed,
      "split": self.split,
      "infilling": rows.described(self._infilling),
      **self.sampler.describe(),
      **({"preference": True} if self.mixture.prefers else {}),
    }
    return json.loads(json.dumps(described))  # as a checkpoint will give it back: lists for tuples

  def samples_once(self) -> int:
    """Counts the first samples of which none is there twice."""
    return self.sampler.samples_once()

  def save_tokenizer(self, folder: paths.Named) -> None:
    """Writes the mixture's tokenizer into the folder."""
    self.mixture.tokenizer.save(folder)

  def check(self) -> None:
    """Says before anything is computed what `batches` would come to later.

    Raises:
      errors.InputError: when a file is not in order, or the mixture gives no rows.
    """
    self.sampler  # noqa: B018  (made once, and kept)

  def batches(
    self, plan: Iterable[tuple[int, int]], process_index: int = 0, process_count: int = 1
  ) -> Iterator[loader.Batch]:
    """Yields batches of this host's rows, one for each (first sample index, batch size) of the plan."""
    for first, size in plan:
      yield loader.make_batch(self.sampler, False, loader.local_rows(first, size, process_index, process_count))
