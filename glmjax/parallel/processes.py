"""What the processes of a run on several hosts must agree on."""

from collections.abc import Callable, Mapping
import hashlib
import itertools
import json
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from glmjax import errors
from glmjax.parallel import distributed

_FIRST = "glmjax/first/"  # of the coordination service's keys: what process 0 tells the others
_PIECE = 1 << 20  # bytes of a message to the service
_WAIT_MS = 2000  # within which a process that waits hears that the service has gone
_SAME = "glmjax/same/"  # ... of what all tell, to be compared
_TOLD = "glmjax/told/"  # ... and of what each tells the others of its work in the background
_numbers = itertools.count()  # of what was told and compared, the same in every process


def on_first(action: Callable[[], None]) -> None:
  """Runs `action` in process 0 alone; the others wait for it, and stop where it failed.

  Raises:
    errors.InputError: in the other processes, when process 0 raised anything.
  """
  failure, first = None, jax.process_index() == 0  # which starts JAX in all
  if first:
    try:
      action()
    except Exception as error:  # the others must hear of it before it goes on
      failure = error
  if distributed.joined():  # by the coordination service: it may take longer than collectives wait, as a lock's lease
    where, client = f"{_FIRST}{next(_numbers)}", distributed.client()
    if first:
      said = "done" if failure is None else "failed" if not errors.may_pass(failure) else "failed for now"
      client.key_value_set_bytes(where, said.encode())
    elif (said := _wait(client, where).decode()) != "done":
      raise errors.InputError("process 0 could not begin: its own message says why", passes=said != "failed")
  if failure is not None:
    raise failure


def from_first(action: Callable[[], Any]) -> Any:
  """Returns in every process what `action`, called in process 0 alone, returns; something that JSON can say.

  The others wait as long as it takes: it may read what a person types. Where it raises they wait for peers.Watch to
  end them, with process 0's own words.
  """
  if not distributed.joined():
    return action()
  where, client = f"{_FIRST}{next(_numbers)}", distributed.client()
  if distributed.process_id() == 0:
    result = action()
    said = json.dumps(result).encode()
    pieces = [said[i : i + _PIECE] for i in range(0, len(said), _PIECE)]
    for i, piece in enumerate(pieces):
      client.key_value_set_bytes(f"{where}/{i}", piece)
    client.key_value_set_bytes(where, str(len(pieces)).encode())
    return result
  count = int(_wait(client, where))
  return json.loads(b"".join(_wait(client, f"{where}/{i}") for i in range(count)))


def check_same(texts: Mapping[str, str]) -> None:
  """Returns where all processes give the same texts, named by what they are about, without asking for devices.

  Raises:
    errors.InputError: in all processes, when one gives another text than process 0.
  """
  if not distributed.joined():
    return
  where, client = f"{_SAME}{next(_numbers)}", distributed.client()
  sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
  if distributed.process_id() == 0:  # it alone looks at all: a thousand hosts ask for as many keys, not a million
    others = {i: json.loads(_wait(client, f"{where}/{i}")) for i in range(1, distributed.process_count())}
    wrong = [f"{name}: process {i}" for i, other in others.items() for name in sums if other.get(name) != sums[name]]
    client.key_value_set_bytes(where, json.dumps(wrong[:1]).encode())
  else:
    client.key_value_set_bytes(f"{where}/{distributed.process_id()}", json.dumps(sums).encode())
    wrong = json.loads(_wait(client, where))
  if wrong:
    raise errors.InputError(f"{wrong[0]} has another one than process 0: give all the same")


def tell(name: str, text: str) -> None:
  """Leaves a text for the other processes, one of a name; from any thread."""
  distributed.client().key_value_set_bytes(f"{_TOLD}{name}/{distributed.process_id()}", text.encode())


def told(name: str, process: int, seconds: float) -> str | None:
  """Returns the text that a process has left, waiting for it; None: there is none in time. From any thread."""
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    try:
      return distributed.client().blocking_key_value_get_bytes(f"{_TOLD}{name}/{process}", _WAIT_MS).decode()
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
  return None


def _wait(client: Any, key: str) -> bytes:
  """Waits for the value of a key of the coordination service, and returns it."""
  while True:
    try:
      return client.blocking_key_value_get_bytes(key, _WAIT_MS)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


def flag_of_first(flag: bool) -> bool:
  """Returns process 0's flag, in every process, which must all come here at once."""
  return bool(multihost_utils.broadcast_one_to_all(np.bool_(flag))) if distributed.joined() else flag


def check_same_filesystem(look: Callable[[], int], what: str, seconds: float = 20) -> None:
  """Returns when `look`, at a folder, gives every process the 32 bits that it gives process 0.

  A network file system may take a while to show one host what another wrote.

  Raises:
    errors.InputError: in all processes, when one of them does not see it within that time.
  """
  if jax.process_count() == 1:
    return
  wanted = int(multihost_utils.broadcast_one_to_all(np.uint32(look())))
  ends = time.monotonic() + seconds
  while look() != wanted and time.monotonic() < ends:
    time.sleep(0.5)
  others = np.flatnonzero(multihost_utils.process_allgather(np.int32(look() != wanted)))
  if others.size:
    raise errors.InputError(
      f"{what}: process {others[0]} does not see there what process 0 has written; use a folder that all hosts share"
    )
