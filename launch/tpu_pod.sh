#!/usr/bin/env bash
# Trains, or answers prompts, on all workers of a Cloud TPU VM slice, and starts again after preemptions and crashes.
#
#   TPU=my-slice ZONE=us-central2-b launch/tpu_pod.sh --gin_file=runs/pretrain.gin ... --workdir=gs://mine/run
#   COMMAND=generate TPU=... ZONE=... launch/tpu_pod.sh --checkpoint=gs://mine/m --mesh=tensor=16 --file=... --out=...
#   DRY_RUN=1 TPU=... launch/tpu_pod.sh ...     prints what it would do, and does nothing
#
# Arguments go to `glmjax train` on every worker; the workers find each other by the slice's metadata.
#   COMMAND            in place of train: generate, score or evaluate, with --mesh
#   TPU, ZONE          the slice                        PROJECT      gcloud's project (as configured)
#   SETUP              run on every worker before the first start, such as "gcloud storage cp gs://mine/WHEEL /tmp &&
#                      pip install -q '/tmp/WHEEL[gcs]' 'jax[tpu]'" (docs/launch.md)
#   TPU_TYPE, RUNTIME  make the slice when it is missing or was preempted, e.g. v4-512 and tpu-ubuntu2204-base
#   SPOT=1             of spot capacity                 GLMJAX       the command there (glmjax)
#   MAX_RESTARTS       starts after the first (100)
#   WAIT               seconds between tries (60)
set -euo pipefail

fail() { echo "tpu_pod.sh: $1" >&2; exit 2; }

[ -n "${TPU:-}" ] || fail "TPU is not set: the name of the slice"
[ -n "${ZONE:-}" ] || fail "ZONE is not set: where the slice is, such as us-central2-b"
[ -z "${TPU_TYPE:-}" ] || [ -n "${RUNTIME:-}" ] || fail "TPU_TYPE is set and RUNTIME is not: give both to have the slice made"
[ $# -gt 0 ] || fail "no arguments for glmjax ${COMMAND:-train}: give --gin_file=... --workdir=..., or what it takes"
[ -n "${DRY_RUN:-}" ] || command -v gcloud >/dev/null || fail "gcloud is not installed here"
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})

run() {  # or prints, in a dry run
  if [ -n "${DRY_RUN:-}" ]; then
    printf '+'; printf ' %q' "$@"; echo
  else
    "$@"
  fi
}

on_all() { run gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker=all --command="$1"; }

state() {
  if [ -n "${DRY_RUN:-}" ]; then echo "${DRY_STATE:-READY}"; return; fi
  if gcloud compute tpus tpu-vm describe "$TPU" "${where[@]}" --format='value(state)' 2>"$log"; then return; fi
  cat "$log" >&2
  if grep -q NOT_FOUND "$log"; then echo MISSING; else echo UNKNOWN; fi  # no answer says nothing about the slice
}

make_ready() {  # the slice, where it was preempted or is not there
  local found
  found=$(state)
  case "$found" in
    READY) return ;;
    CREATING | STARTING | RESTARTING | REPAIRING | UNKNOWN) return 1 ;;
  esac
  [ -n "${TPU_TYPE:-}" ] || fail "$TPU is $found: make it anew, or set TPU_TYPE and RUNTIME to have that done"
  [ "$found" = MISSING ] || run gcloud compute tpus tpu-vm delete "$TPU" "${where[@]}" --quiet || return 1
  run gcloud compute tpus tpu-vm create "$TPU" "${where[@]}" --accelerator-type="$TPU_TYPE" --version="$RUNTIME" \
    ${SPOT:+--spot} || return 1
  is_set_up=
}

# What a lost connection left running holds the chips: it is told to save and end. Status 2 is a mistake, which no
# restart mends, 126 and 127 no glmjax there, 3 a run that diverged, 130 Ctrl-C; gcloud does not hand them on, so they
# are written.
work=$(printf ' %q' "${GLMJAX:-glmjax}" "${COMMAND:-train}" "$@")
remote="pkill -x glmjax && sleep 30;$work || echo \"glmjax ended with status \$?\""
log=$(mktemp)
trap 'rm -f "$log"' EXIT
is_set_up=
for ((try = 0; try <= ${MAX_RESTARTS:-100}; try++)); do
  if [ "$try" -gt 0 ]; then
    echo "tpu_pod.sh: start $((try + 1)) in ${WAIT:-60} s" >&2
    sleep "${WAIT:-60}"
  fi
  make_ready || continue
  if [ -n "${SETUP:-}" ] && [ -z "$is_set_up" ]; then
    on_all "$SETUP" || continue
    is_set_up=1
  fi
  if on_all "$remote" 2>&1 | tee "$log" && ! grep -q '^glmjax ended with status' "$log"; then
    exit 0
  fi
  if grep -q '^glmjax ended with status 2$' "$log"; then
    fail "glmjax found a mistake, as its message says"
  fi
  if grep -qE '^glmjax ended with status 12[67]$' "$log"; then
    fail "${GLMJAX:-glmjax} is not installed there, or cannot be run: SETUP installs it, GLMJAX names it"
  fi
  if grep -q '^glmjax ended with status 3$' "$log"; then
    echo "tpu_pod.sh: the run diverged, as glmjax's message says" >&2
    exit 3
  fi
  if grep -q '^glmjax ended with status 130$' "$log"; then
    echo "tpu_pod.sh: glmjax was interrupted" >&2
    exit 130
  fi
done
echo "tpu_pod.sh: gave up after ${MAX_RESTARTS:-100} restarts" >&2
exit 1
