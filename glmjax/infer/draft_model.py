"""A small model that drafts what a larger one may say next.

It draws as the larger one does, with the same seeds at the same steps, so that both draw the same where they find the
same tokens likely.
"""

import dataclasses
from collections.abc import Sequence

from glmjax.infer import decode
from glmjax.infer import lanes as lanes_lib
from glmjax.infer import prefill as prefill_lib
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import runner as runner_lib


class DraftModel:
  """The small model's own lanes, one beside each of the larger one's."""

  def __init__(
    self, runner: runner_lib.Runner, vocabulary: lanes_lib.Vocabulary, lanes: int, few_programs: bool = False
  ) -> None:
    """Begins with so many free lanes; the vocabulary is the larger model's, `few_programs` as its lanes have it."""
    self._runner, self._pad = runner, vocabulary.pad
    self._lanes = lanes_lib.Lanes(runner, vocabulary, lanes, few_programs=few_programs)
    self._said: dict[int, list[int]] = {}  # of each lane
    self._known: dict[int, int] = {}  # how many of these are in the cache, from the first on
    self._drafted: dict[int, list[int]] = {}  # what is in the cache behind them, until more has been said

  def begin(self, lane: int, request: lanes_lib.Request) -> None:
    """Reads a request's prompt."""
    self._said[lane] = []
    alone = dataclasses.replace(request.prompt, adapter=0)  # its number is of the larger model's
    self._catch_up(lane, request._replace(prompt=alone))

  def add(self, lane: int, tokens: Sequence[int]) -> None:
    """Notes what it has said; of what was drafted as much is right as that begins with."""
    drafted = self._drafted.pop(lane, [])
    is_right = [one == other for one, other in zip(drafted, tokens)]
    self._known[lane] += is_right.index(False) if False in is_right else len(is_right)
    self._said[lane] += tokens

  def end(self, lane: int) -> None:
    """Forgets a lane's request, and frees its lane here."""
    del self._said[lane], self._known[lane]
    self._drafted.pop(lane, None)
    self._lanes.leave(lane)

  def draft(self, state: decode.State, most: int, free: int) -> dict[int, list[int]]:
    """Returns as many next tokens of each lane as are read of it, fewer where one ends its text; none where there is no
    lane for each.
    """
    if not (most := min(most, free // max(1, len(self._said)))):
      return {}
    for lane, said in self._said.items():
      if self._known[lane] < len(said) - 1:  # others had all lanes meanwhile; the last one is read next
        self._catch_up(lane, self._lanes.requests[lane])
    # One more is drawn than is drafted, so that the last one's keys and values are there if it is right.
    drafted = self._lanes.follow(state, most + 1)
    self._known = {lane: len(said) for lane, said in self._said.items()}
    self._drafted = {lane: tokens[:most] for lane, tokens in drafted.items()}
    return self._drafted.copy()

  def _catch_up(self, lane: int, request: lanes_lib.Request) -> None:
    """Reads a request's prompt and what it has said."""
    text = prompt_lib.extend(request.prompt, self._said[lane])
    reading = prefill_lib.Prefill(self._runner, text, self._pad, self._lanes.new_tokens)
    while not reading.done:
      reading.advance()
    self._lanes.join(lane, request, reading.state())
    self._known[lane] = len(self._said[lane]) - 1
    self._drafted.pop(lane, None)
