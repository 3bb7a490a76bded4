# shellcheck shell=bash disable=SC2034
# What a TPU slice is made of and what it is called. Sourced by tpu_vm.sh and gke.sh.

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

# explain ARGUMENT...: where -h or --help is among them, prints the head of the script and ends it.
explain() {
    local argument
    for argument in "$@"; do
        if [[ $argument == -h || $argument == --help ]]; then
            sed -nE '2,${/^#( |$)/!q; s/^# ?//p;}' "$0"
            exit 0
        fi
    done
}

# need NAME...: each must be set.
need() {
    local variable
    for variable in "$@"; do
        [[ -n "${!variable:-}" ]] || fail "$variable is not set: see --help."
    done
}

# slice v5p:4x4x8 sets
#   CHIPS, HOSTS, CHIPS_PER_HOST  of one slice
#   TPU_VM_TYPE, TPU_VM_RUNTIME   how TPU VMs call it: v4 and v5p by cores, two a chip
#   GKE_ACCELERATOR, GKE_SHAPE    the labels of GKE's nodes
slice() {
    local generation=${1%%:*} dimensions cores=1 sizes size
    GKE_SHAPE=${1#*:}
    case $generation in
        v4) dimensions=3 cores=2 GKE_ACCELERATOR=tpu-v4-podslice TPU_VM_RUNTIME=tpu-ubuntu2204-base ;;
        v5e) dimensions=2 GKE_ACCELERATOR=tpu-v5-lite-podslice TPU_VM_RUNTIME=v2-alpha-tpuv5-lite ;;
        v5p) dimensions=3 cores=2 GKE_ACCELERATOR=tpu-v5p-slice TPU_VM_RUNTIME=v2-alpha-tpuv5 ;;
        v6e) dimensions=2 GKE_ACCELERATOR=tpu-v6e-slice TPU_VM_RUNTIME=v2-alpha-tpuv6e ;;
        tpu7x) dimensions=3 GKE_ACCELERATOR=tpu7x TPU_VM_RUNTIME='' ;;
        *) fail "TOPOLOGY $1: the generation is one of v4, v5e, v5p, v6e, tpu7x, as in v5p:4x4x8." ;;
    esac
    [[ $GKE_SHAPE =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
        fail "TOPOLOGY $1: the shape is chips along each axis, as in v5p:4x4x8 or v6e:8x8."
    IFS=x read -ra sizes <<<"$GKE_SHAPE"
    ((${#sizes[@]} == dimensions)) || fail "TOPOLOGY $1: a slice of $generation has $dimensions axes."
    CHIPS=1
    for size in "${sizes[@]}"; do
        ((CHIPS *= size))
    done
    # Hosts have four chips; a flat slice of up to eight is one host.
    if ((CHIPS <= 4 || (dimensions == 2 && CHIPS == 8))); then
        CHIPS_PER_HOST=$CHIPS
    else
        CHIPS_PER_HOST=4
    fi
    ((CHIPS % CHIPS_PER_HOST == 0)) || fail "TOPOLOGY $1: its $CHIPS chips do not fill hosts of four."
    ((HOSTS = CHIPS / CHIPS_PER_HOST))
    case $generation in
        v5e) TPU_VM_TYPE=v5litepod-$CHIPS ;;
        *) TPU_VM_TYPE=$generation-$((CHIPS * cores)) ;;
    esac
}
