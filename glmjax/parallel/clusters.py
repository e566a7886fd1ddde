"""What has started this process as one of several, as its environment tells."""

import os


def named() -> str | None:
  """SLURM, Open MPI, MPI or TPU pod; None where the environment names none of them."""
  environ = os.environ
  if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in environ:  # within srun
    return "SLURM"
  if max(int(environ.get(name, "1")) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")) > 1:
    return "Open MPI" if "OMPI_MCA_orte_hnp_uri" in environ else "MPI"
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
  if "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES", "1")) > 1:
    return "TPU pod"
  return None


def is_kubernetes_job() -> bool:
  """Whether this is a pod of an indexed Job, which may have others."""
  return "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
