"""Several processes as one run: how they find each other (jax.distributed), what they say to each other, how they end.

JAX's own answer to a process that is gone is to abort with messages of its own: 100 s after its last heartbeat, or at
once when it is process 0, whose service all need. parallel/peers.py sees sooner who else is gone, in a line.
"""

import contextlib
import glob
import importlib.util
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from glmjax import errors
from glmjax.parallel import clusters

MESSAGES = "glmjax/process/"  # of the coordination service's keys: what each process says about itself
_LEFT = "left with status "  # begins what a process says that has ended before its time
_TPU_VM = "TPU VM"

_log = logging.getLogger("glmjax")
_meeting = False  # whether `join` waits for the others


def join(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  connect_seconds: float = 300,
) -> int:
  """Makes this process one of a run's, before JAX computes anything; one that is alone stays as it is.

  Args:
    coordinator: HOST:PORT of process 0. None: as TPU pods, SLURM, Open MPI and Kubernetes tell it.
    num_processes: of the whole run; given with the coordinator.
    process_id: 0 to num_processes - 1; given with the coordinator.
    connect_seconds: after which a process that has not found all others ends, with one line and status 1.

  Returns:
    How many processes there are.

  Raises:
    errors.InputError: when the cluster's description cannot be used.
  """
  where = coordinator or _cluster()
  if where is None or num_processes == 1:
    return 1
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which train/stopping.py answers
  found: dict[str, Any] = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
  if coordinator:
    found["cluster_detection_method"] = "deactivate"
  elif where == "SLURM":
    found["local_device_ids"] = _slurm_gpus()
  elif where == "MPI":
    found["cluster_detection_method"] = "mpi4py"
  global _meeting
  late = threading.Timer(connect_seconds, _give_up, (where, coordinator, process_id, connect_seconds))
  late.daemon = True
  late.start()
  _meeting = True
  try:
    jax.distributed.initialize(**found, initialization_timeout=int(connect_seconds) + 60, shutdown_timeout_seconds=60)
  except (ValueError, TypeError, KeyError, RuntimeError, OSError, ImportError) as error:  # JAX's words, any of them
    if where == _TPU_VM:  # one in a container without metadata
      _log.warning("running on this host alone: no metadata of a TPU pod (%s)", errors.one_line(error))
      return 1
    raise errors.InputError(f"cannot join the other processes ({where}): {errors.one_line(error)}") from error
  finally:
    late.cancel()
    _meeting = False
  return _state().num_processes


def joined() -> bool:
  """Tells whether this process is one of several that have met."""
  return not _meeting and jax.distributed.is_initialized() and _state().num_processes > 1


def is_first() -> bool:
  """Tells whether this process is the one that reads, writes and prints for all."""
  return not joined() or process_id() == 0


def process_id() -> int:
  """Returns this process's number, without starting JAX's backend."""
  return _state().process_id


def process_count() -> int:
  """Counts the processes that have met, without starting JAX's backend."""
  return _state().num_processes


def leave(status: int, message: str, gone: int = 0, seconds: float = 10) -> NoReturn:
  """Ends this process without waiting for the others to finish, and tells them why.

  Process 0 goes last, at most `seconds` later: with it ends the service whose loss aborts the others. It does not
  wait for those that are `gone`, so many.
  """
  state = _state()

  def say() -> None:
    state.client.key_value_set(f"{MESSAGES}{state.process_id}", f"{_LEFT}{status}: {message}", allow_overwrite=True)
    while state.process_id == 0 and state.num_processes - 1 - gone > sum(
      left(said) is not None for name, said in state.client.key_value_dir_get(MESSAGES) if name != f"{MESSAGES}0"
    ):
      time.sleep(0.1)

  within(seconds, say)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def left(said: str) -> tuple[int, str] | None:
  """Returns the exit status and the reason of a process that says that it has ended; None: it lives."""
  if not said.startswith(_LEFT):
    return None
  status, _, message = said.removeprefix(_LEFT).partition(": ")
  return int(status), message


def within(seconds: float, action: Callable[[], None]) -> None:
  """Calls `action` in a thread that is given up after that long; what it raises is dropped."""

  def act() -> None:
    with contextlib.suppress(Exception):
      action()

  thread = threading.Thread(target=act, daemon=True)
  thread.start()
  thread.join(seconds)


def client() -> Any:
  """Returns JAX's connection to its coordination service, where processes leave each other messages under keys."""
  return _state().client


def _state() -> Any:
  """Returns what jax.distributed knows; it shows it nowhere else. Orbax takes the client from there as well."""
  from jax._src import distributed  # pylint: disable=g-import-not-at-top

  return distributed.global_state


def _cluster() -> str | None:
  """Returns what has started this process as one of several, as JAX can read it too."""
  where = clusters.named()
  if where == "MPI" and importlib.util.find_spec("mpi4py") is None:
    raise errors.InputError(
      "mpirun started several processes, which JAX can only tell with mpi4py: pip install "
      "mpi4py, or give --coordinator, --num_processes and --process_id"
    )
  if where is not None:
    return where
  if _is_tpu_vm():
    return _TPU_VM
  if clusters.is_kubernetes_job():
    if importlib.util.find_spec("kubernetes") is not None:
      return "Kubernetes"
    _log.warning(
      "pod %s of a Kubernetes job runs alone; to join the others it needs pip install kubernetes, "
      "or --coordinator, --num_processes and --process_id",
      os.environ["JOB_COMPLETION_INDEX"],
    )
  return None


def _is_tpu_vm() -> bool:
  """Tells whether this is a Google Cloud VM with TPU chips, as JAX found when it was imported; its metadata tells
  the other hosts.
  """
  from jax._src import cloud_tpu_init  # pylint: disable=g-import-not-at-top

  return (
    cloud_tpu_init.running_in_cloud_tpu_vm
    and "TPU_SKIP_MDS_QUERY" not in os.environ
    and ("TPU_WORKER_HOSTNAMES" not in os.environ)
  )


def _slurm_gpus() -> list[int] | None:
  """Returns the GPUs of this task: all that it sees where it is alone on its node or has but one; None: the one of its
  rank.

  Left alone, JAX gives every task of SLURM one GPU, the one numbered as the task is on its node.
  """
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  count = len(visible.split(",")) if visible else len(glob.glob("/dev/nvidia[0-9]*"))
  alone = set(re.findall(r"(?:^|,)(\d+)", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))) == {"1"}  # as 1(x96)
  return list(range(count)) if count == 1 or (count and alone) else None


def _give_up(where: str, coordinator: str | None, process_id: int | None, seconds: float) -> None:
  """Says why the processes have not met, and ends this one: JAX would abort."""
  reason = f"process {process_id} has not met all others" if process_id is not None else "the processes have not met"
  if coordinator and process_id:
    host, _, port = coordinator.rpartition(":")
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
      reason = f"the coordinator cannot be reached from process {process_id} ({error.strerror or error})"
  _log.error(
    "%s: %s within %g s; start every process with the same coordinator and number of processes, and look at "
    "process 0's messages",
    where,
    reason,
    seconds,
  )
  os._exit(1)
