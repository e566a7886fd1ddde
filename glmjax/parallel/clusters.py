"""What has started this process as one of several, as its environment tells."""

import os


def named() -> str | None:
  """Names what has started the process: SLURM, Open MPI, MPI or TPU pod; None where the environment names none of
  them.
  """
  environ = os.environ
  if _count("SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environ:  # within srun
    return "SLURM"
  if max(_count("OMPI_COMM_WORLD_SIZE"), _count("PMI_SIZE")) > 1:
    return "Open MPI" if "OMPI_MCA_orte_hnp_uri" in environ else "MPI"
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
  if "," in hosts or _count("MEGASCALE_NUM_SLICES") > 1:
    return "TPU pod"
  return None


def _count(name: str) -> int:
  value = os.environ.get(name, "")
  return int(value) if value.isdecimal() else 1


def is_kubernetes_job() -> bool:
  """Tells whether this is a pod of an indexed Job, which may have others."""
  return "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
