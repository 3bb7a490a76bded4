#!/usr/bin/env bash
# Trains a config on TPU VMs: makes the slices, installs this commit on every worker, starts every
# worker, and starts again what failed, until the run is complete. Give the same command again to go on.
#
#   NAME=run1 ZONE=us-east5-a TOPOLOGY=v5p:4x4x4 CONFIG=configs/video_1b3.py \
#       OUTPUT=gs://my-bucket/runs/run1 DATA_BUCKET=my-bucket/data \
#       launch/tpu_vm.sh --data.source.path /data/video_latents/1.0.0
#
# What follows tpu_vm.sh are flags of dit_jax.train. OUTPUT is on Cloud Storage, or on a disk that every
# worker has under this path. DATA_BUCKET is BUCKET[/DIR], with the training data: it is mounted on every
# worker at DATA_MOUNT (/data) by launch/data.sh, with DATA_CACHE_MB (0) of local disk for what was read;
# with DATA_COPY=1 it is copied there instead. Optional: SLICES (1), SPOT=1, SERVICE_ACCOUNT (of the VMs),
# SETUP (a command for every worker before training), EXTRAS (tpu,gcs), MAX_RESTARTS (20; a slice that
# cannot be made counts as well), PAUSE (30, seconds), RUNTIME (the image of the VMs), KEEP=1 (keeps the
# slices when the run is done). With SLICES=2 add --mesh.data 2 --mesh.fsdp 64 --data.packing.rows 128: data is
# a multiple of SLICES. gcloud knows the project. Exit status: 0, complete; 2, wrong input; else the
# restarts are used up.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/topology.sh
source "$here/topology.sh"

explain "$@"
need NAME ZONE TOPOLOGY CONFIG OUTPUT
mount=${DATA_MOUNT:-/data}
slices=${SLICES:-1} pause=${PAUSE:-30} max_restarts=${MAX_RESTARTS:-20}
slice "$TOPOLOGY"
runtime=${RUNTIME:-$TPU_VM_RUNTIME}
[[ -n $runtime ]] || fail "TOPOLOGY $TOPOLOGY: no VM image is known for it; set RUNTIME, or use gke.sh."
command -v gcloud >/dev/null || fail "there is no gcloud: install the Google Cloud CLI."
log=$(mktemp)
trap 'rm -f "$log"' EXIT

tpus() { # VERB ARGUMENT...: on this run's queued resource
    local verb=$1
    shift
    gcloud compute tpus queued-resources "$verb" "$@" --zone="$ZONE" --quiet
}

everywhere() { # COMMAND: on all workers of all slices at once, for none can begin without the others
    tpus ssh "$NAME" --worker=all --node=all --batch-size=all --command="$1"
}

state() { # what gcloud says where it knows no such resource, or no answer, is in the log
    tpus describe "$NAME" --format='value(state.state)' 2>"$log" || echo ABSENT
}

create() {
    local nodes=(--node-id="$NAME")
    ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$NAME")
    tpus create "$NAME" "${nodes[@]}" --accelerator-type="$TPU_VM_TYPE" \
        --runtime-version="$runtime" --scopes=cloud-platform ${SPOT:+--spot} \
        ${SERVICE_ACCOUNT:+--service-account="$SERVICE_ACCOUNT"}
}

# Returns when all slices are there, made anew if need be; 1 where they cannot be made.
ready() {
    local now
    while now=$(state) && [[ $now != ACTIVE ]]; do
        echo "$NAME: $slices x $TPU_VM_TYPE: $now"
        case $now in
            ABSENT)
                if ! create && [[ $(state) == ABSENT ]]; then
                    cat "$log" >&2
                    return 1
                fi
                ;;
            SUSPENDED) tpus delete "$NAME" --force || return 1 ;;
            FAILED)
                tpus describe "$NAME" --format='yaml(state)' >&2 || true
                tpus delete "$NAME" --force || true
                return 1
                ;;
        esac
        sleep "$pause"
    done
}

# The images have an older Python than dit_jax needs; uv brings one.
install() {
    local archive data=true verb=mount
    [[ -z ${DATA_COPY:-} ]] || verb=copy
    [[ -z ${DATA_BUCKET:-} ]] || data=$(printf '%q ' launch/data.sh "$verb" \
        "$DATA_BUCKET" "$mount" "${DATA_CACHE_MB:-0}")
    archive=$(mktemp --suffix=.tar.gz)
    # Where this fails the workers may still have the archive of another commit.
    if ! git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD ||
        ! tpus scp "$archive" "$NAME:dit_jax.tar.gz" --worker=all --node=all --batch-size=all; then
        rm "$archive"
        return 1
    fi
    rm "$archive"
    everywhere "set -e; mkdir -p dit_jax; tar -xzf dit_jax.tar.gz -C dit_jax; cd dit_jax
python3 -m pip install --quiet --user uv
[ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12
~/.local/bin/uv pip install --quiet '.[${EXTRAS:-tpu,gcs}]'
$data
${SETUP:-true}" || return 1 # 2 is train's for wrong input
}

# Stops what a lost connection left running (it saves first), trains, and says how each worker ended.
train() {
    local command
    command=$(printf '%q ' .venv/bin/python -m dit_jax.train --config "$CONFIG" --output "$OUTPUT" "$@")
    everywhere "cd dit_jax
if [ -f run.pid ]; then for signal in TERM KILL; do
kill -s \$signal \$(cat run.pid) && timeout 120 sh -c 'while kill -0 \$(cat run.pid); do sleep 1; done'
done; fi 2>/dev/null
sh -c 'echo \$\$ > run.pid; exec \"\$@\"' sh $command
status=\$?; rm run.pid; echo \"dit_jax: exit status \$status\"" 2>&1 | tee "$log" || true
    local statuses
    statuses=$(sed -n 's/^.*dit_jax: exit status //p' "$log" | sort -u | tr '\n' ' ')
    case " $statuses" in
        ' 0 ') (($(grep -c 'dit_jax: exit status 0' "$log") == HOSTS * slices)) || return 1 ;;
        *' 2 '*) return 2 ;;
        *) return 1 ;;
    esac
}

for ((attempt = 0; attempt <= max_restarts; attempt++)); do
    status=0
    { ready && install && train "$@"; } || status=$?
    case $status in
        0)
            echo "$NAME: complete"
            [[ -n ${KEEP:-} ]] || tpus delete "$NAME" --force
            exit 0
            ;;
        2) fail "$NAME: the workers say what is wrong with the input; it is not started again." ;;
    esac
    ((attempt == max_restarts)) && break
    echo "$NAME: not complete; restart $((attempt + 1)) of $max_restarts"
    sleep "$pause"
done
echo "$NAME: given up after $max_restarts restarts: see above" >&2
exit 1
