#!/usr/bin/env bash
# Writes the JobSet that trains a config on GKE's TPU slices, for kubectl:
#
#   NAME=run1 TOPOLOGY=v5p:4x4x4 SLICES=2 IMAGE=REGISTRY/dit_jax CONFIG=configs/video_1b3.py \
#       OUTPUT=gs://my-bucket/runs/run1 DATA_BUCKET=my-bucket/data SERVICE_ACCOUNT=trainer \
#       launch/gke.sh --data.source.path /data/video_latents/1.0.0 \
#       --mesh.data 2 --mesh.fsdp 64 --data.packing.rows 128 | kubectl apply -f -
#
# What follows gke.sh are flags of dit_jax.train. OUTPUT is on Cloud Storage. DATA_BUCKET is
# BUCKET[/DIR], with the training data: the Cloud Storage FUSE CSI driver mounts it at /data in every pod,
# with DATA_CACHE_MB (0) of the node's disk for what was read. SERVICE_ACCOUNT (default) is Kubernetes'
# account that may use both buckets. In place of buckets, or beside them, CLAIM is a persistent volume
# claim that many nodes write (ReadWriteMany), mounted at /runs; OUTPUT is then /runs/NAME if unset.
# --mesh.data is a multiple of SLICES. Optional: SLICES (1), MAX_RESTARTS (20). The cluster has JobSet
# (0.6 or newer) and a node pool for each slice. `kubectl delete jobset NAME` stops the run, and this
# command resumes it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/topology.sh
source "$here/topology.sh"

explain "$@"
OUTPUT=${OUTPUT:-${CLAIM:+/runs/${NAME:-}}}
need NAME TOPOLOGY IMAGE CONFIG OUTPUT
SLICES=${SLICES:-1} MAX_RESTARTS=${MAX_RESTARTS:-20} SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
DATA_CACHE_MB=${DATA_CACHE_MB:-0} BUCKET=${DATA_BUCKET:-} ONLY_DIR=''
if [[ $BUCKET == */* ]]; then
    # shellcheck disable=SC2034 # filled in by its name
    ONLY_DIR=,only-dir=${BUCKET#*/} BUCKET=${BUCKET%%/*}
fi
slice "$TOPOLOGY"
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$ ]] ||
    fail "NAME $NAME: up to 32 lower-case letters, digits and '-', as names in Kubernetes."
for variable in SLICES MAX_RESTARTS; do
    [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || fail "$variable ${!variable}: a whole number, at least 1."
done
[[ $DATA_CACHE_MB =~ ^[0-9]+$ ]] || fail "DATA_CACHE_MB $DATA_CACHE_MB: a whole number."
[[ ${DATA_BUCKET:-x} =~ ^[-_.a-z0-9]+(/[-_./A-Za-z0-9]+)?$ ]] ||
    fail "DATA_BUCKET $DATA_BUCKET: give BUCKET or BUCKET/DIR, without gs://."

json() { # a string as JSON has it
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    printf '"%s"' "${text//$'\n'/\\n}"
}

ARGUMENTS='["dit_jax.train"'
for argument in --config "$CONFIG" --output "$OUTPUT" "$@"; do
    ARGUMENTS+=", $(json "$argument")"
done
ARGUMENTS+=']'

manifest=$(<"$here/gke_jobset.yaml")
for optional in CLAIM DATA_BUCKET; do
    [[ -n ${!optional:-} ]] || manifest=$(sed "/# if $optional/,/# end $optional/d" <<<"$manifest")
done
for variable in NAME MAX_RESTARTS SLICES HOSTS GKE_ACCELERATOR GKE_SHAPE IMAGE ARGUMENTS CHIPS_PER_HOST \
    SERVICE_ACCOUNT BUCKET ONLY_DIR DATA_CACHE_MB CLAIM; do
    manifest=${manifest//"\${$variable}"/"${!variable:-}"}
done
printf '%s\n' "$manifest"
