#!/usr/bin/env bash
# Trains, or answers prompts, on a GKE cluster through xpk (a JobSet), which starts it again after preemptions and crashes.
#
#   CLUSTER=mine IMAGE=gcr.io/me/glmjax TPU_TYPE=v5p-512 launch/gke_xpk.sh --gin_file=... --workdir=gs://mine/run
#   DRY_RUN=1 CLUSTER=... launch/gke_xpk.sh ...      prints what it would do, and does nothing
#
# Arguments go to `glmjax train` in every pod. TPU hosts find each other by what GKE tells them; GPU nodes by the flags
# made here of xpk's variables.
#   CLUSTER, ZONE, PROJECT  where                        IMAGE         with glmjax in it: launch/Dockerfile makes one
#   TPU_TYPE, NUM_SLICES    v5p-512 and how many (1)     NAME          of the workload (glmjax)
#   GPU_TYPE, NUM_NODES     h100-80gb-8 and how many     MAX_RESTARTS  of the JobSet (100)
#   XPK                     the command (xpk)            GLMJAX        the command in the image (glmjax)
#   COMMAND                 in place of train: generate (with --out), score or evaluate, with --mesh
set -euo pipefail

fail() { echo "gke_xpk.sh: $1" >&2; exit 2; }

[ -n "${CLUSTER:-}" ] || fail "CLUSTER is not set: the name of the GKE cluster"
[ -n "${IMAGE:-}" ] || fail "IMAGE is not set: a container image with glmjax in it"
[ -n "${TPU_TYPE:-}${GPU_TYPE:-}" ] || fail "neither TPU_TYPE nor GPU_TYPE is set, such as v5p-512 or h100-80gb-8"
[ -z "${TPU_TYPE:-}" ] || [ -z "${GPU_TYPE:-}" ] || fail "TPU_TYPE and GPU_TYPE are both set: give one"
[ $# -gt 0 ] || fail "no arguments for glmjax ${COMMAND:-train}: give --gin_file=... --workdir=..., or what it takes"

command=$(printf '%q ' "${GLMJAX:-glmjax}" "${COMMAND:-train}" "$@")
if [ -n "${TPU_TYPE:-}" ]; then
  hardware=(--tpu-type="$TPU_TYPE" --num-slices="${NUM_SLICES:-1}")
else
  [ -n "${NUM_NODES:-}" ] || fail "NUM_NODES is not set: how many nodes of $GPU_TYPE"
  hardware=(--device-type="$GPU_TYPE" --num-nodes="$NUM_NODES")
  # shellcheck disable=SC2016  # for the pod's shell
  command+='--coordinator=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT --num_processes=$NNODES --process_id=$NODE_RANK'
fi
# xpk itself restarts after 127 and above (signals); 1 is what glmjax ends with when another process died.
create=("${XPK:-xpk}" workload create --cluster="$CLUSTER" ${ZONE:+--zone="$ZONE"} ${PROJECT:+--project="$PROJECT"}
  --workload="${NAME:-glmjax}" "${hardware[@]}" --docker-image="$IMAGE" --max-restarts="${MAX_RESTARTS:-100}"
  --restart-on-exit-codes=1 --termination-grace-period-seconds=300 --command="$command")

if [ -n "${DRY_RUN:-}" ]; then
  printf '+'; printf ' %q' "${create[@]}"; echo
  exit 0
fi
exec "${create[@]}"
