#!/usr/bin/env bash
# Trains on TPU VMs without a cluster: creates the slices, installs this folder on every host and starts all hosts.
#
#   launch/tpu_vm.sh create NAME --tpu v5litepod-256 --zone us-west4-a [--slices 2] [--spot]
#   launch/tpu_vm.sh install NAME --zone us-west4-a --nfs 10.0.0.2:/share
#   launch/tpu_vm.sh train NAME --zone us-west4-a -- configs/llava15_7b.py [OPTIONS OF mllm train]
#   launch/tpu_vm.sh delete NAME --zone us-west4-a
#
# --dry-run before the name prints the commands instead of running them. NFS is the file system that all hosts share; it
# is mounted at /shared, for run folders, data and compiled programs. Each slice is one TPU VM: NAME-0 ...
set -euo pipefail

refuse() {
    printf 'tpu_vm.sh: %s\n  expected: %s\n  to do:    see the first lines of %s\n' "$1" "$2" "$0" >&2
    exit 2
}

dry=false name='' tpu='' zone='' slices=1 spot=() nfs='' version=${TPU_VERSION:-}
action=${1:-}
[[ $action =~ ^(create|install|train|delete)$ ]] || refuse "action '$action'" "create, install, train or delete"
shift
while (($#)); do
    case $1 in
        --dry-run) dry=true ;;
        --tpu) tpu=${2:?} && shift ;;
        --zone) zone=${2:?} && shift ;;
        --slices) slices=${2:?} && shift ;;
        --nfs) nfs=${2:?} && shift ;;
        --spot) spot=(--spot) ;;
        --) shift && break ;;
        -*) refuse "option '$1'" "--tpu, --zone, --slices, --nfs, --spot or --dry-run" ;;
        *)
            [[ -z $name ]] || refuse "'$1' after the name" "options, and mllm's arguments after --"
            name=$1
            ;;
    esac
    shift
done
[[ -n $name && -n $zone ]] || refuse "no name or no zone" "NAME and --zone ZONE"
[[ $slices =~ ^[1-9][0-9]*$ ]] || refuse "--slices $slices" "a number"

run() {
    if $dry; then
        local line
        line=$(printf '%q ' "$@")
        printf '%s\n' "$line" # in one piece: the commands of several slices are printed side by side
    else
        "$@"
    fi
}

# The system image depends on the generation of the chips.
image() {
    case $tpu in
        v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) refuse "--tpu '$tpu' without TPU_VERSION" "v4-*, v5litepod-*, v5p-* or v6e-*, or TPU_VERSION=IMAGE" ;;
    esac
}

# On every host of every slice at once: no host continues before the others have started.
everywhere() {
    local slice pids=() code=0
    for ((slice = 0; slice < slices; slice++)); do
        run gcloud compute tpus tpu-vm ssh "$name-$slice" --zone "$zone" --worker=all --command "${1//@SLICE@/$slice}" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    return "$code"
}

case $action in
    create)
        version=${version:-$(image)}
        group=()
        ((slices > 1)) && group=(--node-count "$slices" --node-prefix "$name") || group=(--node-id "$name-0")
        run gcloud compute tpus queued-resources create "$name" --zone "$zone" --accelerator-type "$tpu" \
            --runtime-version "$version" "${group[@]}" "${spot[@]}"
        ;;
    install)
        [[ -n $nfs ]] || refuse "no --nfs" "--nfs SERVER:/SHARE, the file system that all hosts share"
        here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
        for ((slice = 0; slice < slices; slice++)); do
            run gcloud compute tpus tpu-vm scp --recurse "$here" "$name-$slice:mllm_jax" --zone "$zone" --worker=all
        done
        everywhere "sudo apt-get install -y -q nfs-common && sudo mkdir -p /shared && sudo mount -t nfs $nfs /shared \
&& python3 -m venv ~/venv && ~/venv/bin/pip install -q './mllm_jax[tpu,quickstart]'"
        ;;
    train)
        (($#)) || refuse "nothing to train" "-- CONFIG [OPTIONS OF mllm train]"
        quoted=$(printf '%q ' "$@")
        [[ $quoted == *--run-dir* ]] || quoted+="--run-dir /shared/runs/$name"
        everywhere "cd mllm_jax && XDG_CACHE_HOME=/shared/cache MLLM_DATA_DIR=/shared/data \
~/venv/bin/mllm train $quoted"
        ;;
    delete)
        run gcloud compute tpus queued-resources delete "$name" --zone "$zone" --force --quiet
        ;;
esac
