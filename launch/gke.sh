#!/usr/bin/env bash
# Writes the JobSet that trains a config on GKE's TPU slices, for kubectl:
#
#   NAME=run1 TOPOLOGY=v5p:4x4x4 SLICES=2 IMAGE=REGISTRY/dit_jax CLAIM=runs CONFIG=configs/video_1b3.py \
#       launch/gke.sh --data.source.path /runs/data/video_latents/1.0.0 \
#       --mesh.data 2 --mesh.fsdp 64 --data.packing.rows 128 | kubectl apply -f -
#
# What follows gke.sh are flags of dit_jax.train. CLAIM is a persistent volume claim that many nodes
# write (ReadWriteMany), mounted at /runs in every pod: the run is in its directory NAME, and the records
# must lie on it as well, here in data/video_latents/1.0.0. --mesh.data is a multiple of SLICES.
# Optional: SLICES (1), MAX_RESTARTS (20). The cluster has JobSet (0.6 or newer) and a node pool for
# each slice. `kubectl delete jobset NAME` stops the run, and this command resumes it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/topology.sh
source "$here/topology.sh"

explain "$@"
need NAME TOPOLOGY IMAGE CLAIM CONFIG
SLICES=${SLICES:-1} MAX_RESTARTS=${MAX_RESTARTS:-20}
slice "$TOPOLOGY"
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$ ]] ||
    fail "NAME $NAME: up to 32 lower-case letters, digits and '-', as names in Kubernetes."
for variable in SLICES MAX_RESTARTS; do
    [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || fail "$variable ${!variable}: a whole number, at least 1."
done

json() { # a string as JSON has it
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    printf '"%s"' "${text//$'\n'/\\n}"
}

ARGUMENTS='["dit_jax.train"'
for argument in --config "$CONFIG" --output "/runs/$NAME" "$@"; do
    ARGUMENTS+=", $(json "$argument")"
done
ARGUMENTS+=']'

manifest=$(<"$here/gke_jobset.yaml")
for variable in NAME MAX_RESTARTS SLICES HOSTS GKE_ACCELERATOR GKE_SHAPE IMAGE ARGUMENTS CHIPS_PER_HOST CLAIM; do
    manifest=${manifest//"\${$variable}"/"${!variable}"}
done
printf '%s\n' "$manifest"
