#!/usr/bin/env bash
# Starts a Slurm of this machine alone, runs a command beside it and stops it. The exit code is the
# command's. Run it as root; a container will do:
#   apt-get install slurm-wlm munge slurmdbd mariadb-server
#   pip install -r sweeps/requirements-slurm.txt
#   tests/slurm_loopback.sh                         # the tests of sweeps and runs on Slurm
#   tests/slurm_loopback.sh python launch.py -m lora.rank=16,64 hydra/launcher=submitit_slurm
# Everything lies in a temporary folder, nothing in /etc. The accounting (slurmdbd over a MariaDB)
# is there because submitit asks sacct what became of a job that was killed. Without an answer it
# would wait for ever.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- python -m pytest -n0 -rs tests/runs -k slurm
at=$(mktemp -d) host=$(hostname -s) started=()
chmod 755 "$at"
stop() {
    scancel --quiet --user=root 2>>"$at/log" || true
    for ((i = ${#started[@]} - 1; i >= 0; i--)); do
        kill "${started[i]}" 2>>"$at/log" || true
        wait "${started[i]}" 2>>"$at/log" || true
    done
    rm -rf "$at"
}
trap stop EXIT
start() { # in the background, its output in a log
    "$@" >>"$at/log" 2>&1 </dev/null &
    started+=($!)
}
until_it_works() {
    for _ in $(seq 120); do
        "$@" >>"$at/log" 2>&1 && return
        sleep 0.5
    done
    tail -n 40 "$at/log" >&2
    echo "error: no answer within a minute: $*" >&2
    return 1
}

mkdir -p "$at"/{munge,database,state,spool}
dd if=/dev/urandom of="$at/munge/key" bs=1024 count=1 status=none
chmod 600 "$at/munge/key"
start munged --foreground --force --key-file="$at/munge/key" --socket="$at/munge/socket" \
    --pid-file="$at/munge/pid" --log-file="$at/munge/log" --seed-file="$at/munge/seed"
until_it_works munge --no-input --socket="$at/munge/socket"

mariadb-install-db --no-defaults --user=root --datadir="$at/database" \
    --auth-root-authentication-method=normal >>"$at/log" 2>&1
start mariadbd --no-defaults --user=root --datadir="$at/database" \
    --socket="$at/database/socket" --pid-file="$at/database/pid" \
    --bind-address=127.0.0.1 --port=16815
until_it_works mariadb --no-defaults --socket="$at/database/socket" \
    --execute="create user slurm@'127.0.0.1' identified by 'slurm';
               grant all on slurm.* to slurm@'127.0.0.1'"

cat >"$at/slurmdbd.conf" <<C
AuthType=auth/munge
AuthInfo=socket=$at/munge/socket
DbdHost=localhost
DbdPort=16819
SlurmUser=root
PidFile=$at/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=16815
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
C
chmod 600 "$at/slurmdbd.conf"
cat >"$at/slurm.conf" <<C
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$at/munge/socket
SlurmUser=root
StateSaveLocation=$at/state
SlurmdSpoolDir=$at/spool
SlurmctldPidFile=$at/slurmctld.pid
SlurmdPidFile=$at/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=16819
AccountingStoragePass=$at/munge/socket
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,sched_min_interval=0
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc --all) State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
C
export SLURM_CONF=$at/slurm.conf
start slurmdbd -D
until_it_works sacctmgr --immediate show cluster
sacctmgr --immediate add cluster loopback >>"$at/log" 2>&1 || true
start slurmctld -D
until_it_works scontrol ping
start slurmd -D
until_it_works sh -c "sinfo --noheader --states=idle --format=%T | grep --quiet idle"
sinfo
"$@" || { code=$? && tail -n 40 "$at/log" >&2 && exit $code; }
