"""Who drafts what: the tokens that requests may say next, and the free lanes that read them (infer/drafts.py)."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from glmjax.infer import decode
from glmjax.infer import drafts as drafts_lib

if TYPE_CHECKING:
  from glmjax.infer import lanes as lanes_lib

_LATELY = 8  # tokens, of which half must have been what would have been drafted, for drafts to be worth their passes
_LONGEST = 3  # tokens that must have come before in the same order, for what followed them to be a draft


class NGrams:
  """A text that drafts its own next tokens: those that followed where its last ones have stood before."""

  def __init__(self, tokens: Sequence[int]) -> None:
    """Begins with a prompt."""
    self._tokens: list[int] = []
    self._behind: dict[tuple[int, ...], int] = {}  # where what follows an n-gram begins: its last place but the end
    self._right: collections.deque[bool] = collections.deque(maxlen=_LATELY)
    self.add(tokens)
    self._right.extend([True] * _LATELY)  # it may be about to repeat its prompt

  @property
  def repeats(self) -> bool:
    """Whether what it drafts has come, lately, as often as not."""
    return 2 * sum(self._right) >= _LATELY

  def add(self, tokens: Sequence[int]) -> None:
    """Adds what was generated."""
    for token in tokens:
      self._right.append(self.draft(1) == [token])
      for size in range(1, min(_LONGEST, len(self._tokens)) + 1):
        self._behind[tuple(self._tokens[-size:])] = len(self._tokens)
      self._tokens.append(token)

  def draft(self, count: int) -> list[int]:
    """Returns so many next tokens, those behind the longest n-gram that came before; none where none came."""
    for size in range(min(_LONGEST, len(self._tokens)), 0, -1):
      at = self._behind.get(tuple(self._tokens[-size:]))
      if at is not None:
        period = len(self._tokens) - at  # what follows goes round, if it reaches the end
        return [self._tokens[at + i % period] for i in range(count)]
    return []


class Source(Protocol):
  """Who drafts what a set of lanes may say next."""

  def begin(self, lane: int, request: "lanes_lib.Request") -> None:
    """Notes that a request has the lane."""

  def add(self, lane: int, tokens: Sequence[int]) -> None:
    """Notes what it has said."""

  def end(self, lane: int) -> None:
    """Forgets the request of a lane."""

  def draft(self, state: decode.State, most: int, free: int) -> dict[int, list[int]]:
    """Returns up to so many next tokens of each lane that is worth it, whose `state` is that of the set, in which so
    many lanes are free to read them.
    """


class Texts:
  """Texts that draft themselves."""

  def __init__(self) -> None:
    """Begins with none."""
    self._texts: dict[int, NGrams] = {}

  def begin(self, lane: int, request: "lanes_lib.Request") -> None:
    """Notes that a request has the lane."""
    self._texts[lane] = NGrams(request.prompt.tokens)

  def add(self, lane: int, tokens: Sequence[int]) -> None:
    """Notes what it has said."""
    self._texts[lane].add(tokens)

  def end(self, lane: int) -> None:
    """Forgets the request of a lane."""
    del self._texts[lane]

  def draft(self, state: decode.State, most: int, free: int) -> dict[int, list[int]]:
    """Returns so many next tokens of each lane whose text repeats itself."""
    del state, free
    return {lane: text.draft(most) for lane, text in self._texts.items() if text.repeats}


@dataclasses.dataclass
class Count:
  """How many tokens of drafts were read, and how many of them were right."""

  read: int = 0
  right: int = 0


class Drafting:
  """The drafts of a set of lanes, and who reads for whom.

  A free lane that reads for a request holds what the request's own lane has in its cache: it is copied there once, and
  then written along in every pass.
  """

  def __init__(self, source: Source, lanes: int, most: int, count: Count) -> None:
    """Begins with so many free lanes; drafts are of up to `most` tokens, and counted in `count`."""
    self.most = min(most, lanes - 1)
    self._source, self._count = source, count
    self._readers: dict[int, list[int]] = {}  # of each lane with drafts, in their order
    self._held = [False] * lanes

  def begin(self, lane: int, request: "lanes_lib.Request") -> None:
    """Notes that a request has a lane; one that is told how likely each token was has no drafts."""
    self._held[lane] = True
    for readers in self._readers.values():
      if lane in readers:
        readers.remove(lane)
    if request.logprobs is None:
      self._readers[lane] = []
      self._source.begin(lane, request)

  def add(self, lane: int, tokens: Sequence[int]) -> None:
    """Notes what a lane's request has said."""
    if lane in self._readers:
      self._source.add(lane, tokens)
      self._count.right += len(tokens) - 1 if self._readers[lane] else 0

  def end(self, lane: int) -> None:
    """Notes that a lane is free again, with those that read for it."""
    self._held[lane] = False
    if self._readers.pop(lane, None) is not None:
      self._source.end(lane)

  def owner(self, lane: int) -> int:
    """Returns the lane whose request it reads for: its own, or another's."""
    return next((owner for owner, readers in self._readers.items() if lane in readers), lane)

  def deal(self, drafted: dict[int, list[int]]) -> list[tuple[int, int]]:
    """Deals the free lanes out evenly to those with a draft; returns whose cache must be copied to whom before."""
    asking = [lane for lane, readers in self._readers.items() if lane in drafted and (drafted[lane] or readers)]
    share = (len(self._held) - sum(self._held)) // max(1, len(asking))
    for lane, readers in self._readers.items():
      del readers[share if lane in drafted else 0 :]
    busy = {lane for readers in self._readers.values() for lane in readers}
    idle = [lane for lane, held in enumerate(self._held) if not held and lane not in busy]
    copied = []
    for lane in asking:
      while len(self._readers[lane]) < min(share, len(drafted[lane])):
        self._readers[lane].append(idle.pop())
        copied.append((lane, self._readers[lane][-1]))
    return copied

  @property
  def reads(self) -> bool:
    """Whether any lane reads for another."""
    return any(self._readers.values())

  def drafts(self, drafted: dict[int, list[int]], pad: int) -> drafts_lib.Drafts:
    """Returns who reads what; `pad` behind a draft's end, which is judged like any."""
    size = len(self._held)
    owner_B, ahead_B = np.arange(size, dtype=np.int32), np.zeros(size, np.int32)
    token_B = np.full(size, pad, np.int32)
    lanes_BJ = np.full((size, 1 + self.most), size, np.int32)
    lanes_BJ[:, 0] = owner_B
    for lane, readers in self._readers.items():
      group = [lane, *readers]
      owner_B[readers], ahead_B[readers] = lane, np.arange(1, len(group))
      tokens = drafted.get(lane, [])[: len(readers)]
      token_B[readers[: len(tokens)]] = tokens
      lanes_BJ[group, : len(group)] = group
      self._count.read += len(tokens)
    return drafts_lib.Drafts(owner_B, ahead_B, token_B, lanes_BJ)

  def draft(self, state: decode.State) -> dict[int, list[int]]:
    """Returns the draft of each lane that has one, when some lane is free to read it."""
    free = self._held.count(False)
    return self._source.draft(state, self.most, free) if self._readers and free else {}
