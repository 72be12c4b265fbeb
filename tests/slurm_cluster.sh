#!/usr/bin/env bash
# Runs a real SLURM cluster on this machine: slurmctld, munged and two slurmd as nodes 127.0.0.1 and 127.0.0.2, with all
# files in one folder and on free ports. Needs root on Debian or Ubuntu and installs their packages if they are missing.
#
#   tests/slurm_cluster.sh start DIR      then run: export SLURM_CONF=DIR/slurm.conf
#   tests/slurm_cluster.sh stop DIR       also cancels its jobs
#
# Each node claims to have two GPUs, so that tests can check the number of processes per node; the GPUs do not exist.
set -euo pipefail

action=${1:?start or stop}
mkdir -p "${2:?a folder}"
folder=$(cd "$2" && pwd)
export SLURM_CONF=$folder/slurm.conf

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

wait_until() { # until a command succeeds, at most 30 s
    for _ in $(seq 300); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    echo "slurm_cluster.sh: gave up waiting for: $*" >&2
    tail -n 20 "$folder"/log/* >&2
    return 1
}

nodes_are_idle() { [ "$(sinfo --noheader --Node --format %T)" = $'idle\nidle' ]; }
no_jobs() { [ -z "$(squeue --noheader)" ]; }
has_ended() { ! [ -e "/proc/$1" ] || grep -q '^State:.Z' "/proc/$1/status"; }

start() {
    if ! command -v slurmctld slurmd srun munged >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            slurmctld slurmd slurm-client munge >/dev/null
    fi
    mkdir -p "$folder"/{state,log,spool.127.0.0.1,spool.127.0.0.2}
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmdSpoolDir=$folder/spool.%n
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobRequeue=1
GresTypes=gpu
NodeName=127.0.0.1 NodeHostname=$(hostname -s) Port=$(free_port) CPUs=1 Gres=gpu:2
NodeName=127.0.0.2 NodeHostname=$(hostname -s) Port=$(free_port) CPUs=1 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    touch "$folder"/gpu{0,1}
    echo "Name=gpu File=$folder/gpu[0-1]" >"$folder/gres.conf"
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    munged --force --socket "$folder/munge.socket" --key-file "$folder/munge.key" --pid-file "$folder/munged.pid" \
        --log-file "$folder/log/munged.log" --seed-file "$folder/munge.seed"
    slurmctld
    slurmd -N 127.0.0.1
    slurmd -N 127.0.0.2
    wait_until nodes_are_idle
}

stop() {
    scancel --user root
    wait_until no_jobs
    for file in "$folder"/{slurmd.*,slurmctld,munged}.pid; do
        pid=$(cat "$file")
        kill "$pid"
        wait_until has_ended "$pid"
    done
}

"$action"
