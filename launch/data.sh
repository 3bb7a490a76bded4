#!/usr/bin/env bash
# Puts training data of Cloud Storage where this host reads it as files (docs/storage.md):
#
#   launch/data.sh mount my-bucket/data /data 200000
#   launch/data.sh copy my-bucket/data /data
#
# mount BUCKET[/DIR] PATH [CACHE_MB]: by gcsfuse, which is installed if it is not there (Debian, Ubuntu).
# CACHE_MB (0) of local disk, in CACHE_DIR (PATH.cache), keep what was read: give the size of the data
# set, or as much as there is room. copy BUCKET[/DIR] PATH: to a local disk. Both may be given again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/topology.sh
source "$here/topology.sh"

explain "$@"
(($# == 3 || $# == 4)) || fail "usage: data.sh mount|copy BUCKET[/DIR] PATH [CACHE_MB]; see --help."
verb=$1 bucket=${2#gs://} path=$3 cache_mb=${4:-0}
[[ $verb == mount || $verb == copy ]] || fail "$verb: it is mount or copy."
[[ $bucket =~ ^[a-z0-9][-_.a-z0-9]+(/.*)?$ ]] || fail "$2: give BUCKET or BUCKET/DIR."
[[ $path == /* ]] || fail "$path: give an absolute path."
[[ $cache_mb =~ ^[0-9]+$ ]] || fail "CACHE_MB $cache_mb: a whole number."
bucket=${bucket%/}

directory() { # PATH: makes it, and makes it this user's
    [[ -w $1 ]] || { sudo mkdir -p "$1" && sudo chown "$(id -un)" "$1"; }
}

install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
}

if [[ $verb == copy ]]; then
    directory "$path"
    exec gcloud storage rsync --recursive "gs://$bucket" "$path"
fi
if mountpoint -q "$path"; then
    exit 0
fi
command -v gcsfuse >/dev/null || install_gcsfuse
fusermount -uz "$path" 2>/dev/null || true # what a gcsfuse that died left there
directory "$path"
# Nothing else writes the data: names, sizes and lists are asked for once and kept.
options=(-o ro --implicit-dirs --metadata-cache-ttl-secs=-1 --stat-cache-max-size-mb=-1
    --type-cache-max-size-mb=-1 --kernel-list-cache-ttl-secs=-1)
if ((cache_mb)); then
    # Records are read in random order: one of them brings its whole file into the cache.
    cache=${CACHE_DIR:-$path.cache}
    directory "$cache"
    options+=(--cache-dir="$cache" --file-cache-max-size-mb="$cache_mb"
        --file-cache-cache-file-for-range-read)
fi
[[ $bucket == */* ]] && options+=(--only-dir="${bucket#*/}")
exec gcsfuse "${options[@]}" "${bucket%%/*}" "$path"
