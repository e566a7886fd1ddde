"""Contexts that were read already: what a prompt left in the cache, for whoever asks with the same prompt again.

Only a whole context is shared: of a prompt that is seen from both sides, what each token leaves in the cache from the
second layer on depends on all the others, those behind it too. A prompt with the same beginning shares nothing.
"""

import collections

import jax

from glmjax.infer import decode
from glmjax.infer import prompt as prompt_lib


class Contexts:
  """States behind prompts, the least lately asked first out; in all they take no more than so many bytes."""

  def __init__(self, most_bytes: int) -> None:
    """Begins with none."""
    self._most = most_bytes
    self._states: collections.OrderedDict[bytes, decode.State] = collections.OrderedDict()
    self.bytes = 0  # that they take

  def find(self, prompt: prompt_lib.Prompt) -> decode.State | None:
    """Returns the state of one row that has read all but the prompt's last token; None: it is not there."""
    state = self._states.get(key := _key(prompt))
    if state is not None:
      self._states.move_to_end(key)
    return state

  def add(self, prompt: prompt_lib.Prompt, state: decode.State) -> None:
    """Keeps a state, in place of those that were not asked for lately; one that is too large is not kept."""
    size = _bytes(state)
    if size > self._most or _key(prompt) in self._states:
      return
    while self.bytes + size > self._most:
      _, old = self._states.popitem(last=False)
      self.bytes -= _bytes(old)
    self._states[_key(prompt)] = state
    self.bytes += size


def _key(prompt: prompt_lib.Prompt) -> bytes:
  """Returns all that the state depends on: the tokens and positions that were read, how far they see, the adapter."""
  numbers = [prompt.adapter, prompt.context_length, *prompt.tokens[:-1]]
  return repr(numbers).encode() + prompt.positions[:, :-1].tobytes()


def _bytes(state: decode.State) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(state))
