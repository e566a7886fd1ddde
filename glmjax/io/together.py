"""Work that waits for a bucket, done side by side so that its requests overlap."""

from collections.abc import Callable, Sequence
import threading
from typing import TypeVar

MOST = 32  # requests under way in one process

A = TypeVar("A")
B = TypeVar("B")


def each(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
  """Returns the function of every item, in their order, computed in threads.

  Raises:
    Exception: what the function raised of the first item of which it raised anything.
  """
  results: dict[int, B] = {}
  failed: dict[int, BaseException] = {}
  numbered = iter(enumerate(items))
  lock = threading.Lock()

  def work() -> None:
    while not failed:
      with lock:
        number, item = next(numbered, (-1, None))
      if number < 0:
        return
      try:
        results[number] = function(item)
      except BaseException as error:  # raised where it is waited for
        failed[number] = error

  # Daemons: Ctrl-C in the thread that waits ends the process, whatever a request is waiting for.
  threads = [threading.Thread(target=work, daemon=True) for _ in range(min(len(items), MOST))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if failed:
    raise failed[min(failed)]
  return [results[number] for number in range(len(items))]
