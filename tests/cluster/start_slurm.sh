#!/usr/bin/env bash
# A real Slurm of one node on this machine, for the tests in this folder: no systemd, nothing outside DIR.
#
#     apt-get install slurm-wlm munge
#     tests/cluster/start_slurm.sh DIR [GPUS]     # up to 4 GPUs that are only pretended, to try scheduling
#     source DIR/env                              # sbatch, squeue, ... of this shell speak to it
#     tests/cluster/start_slurm.sh --stop DIR
#
# Run as root (slurmd starts jobs). Accounting is off, as on many small clusters; memory limits are enforced by
# polling (OverMemoryKill), which needs no control groups.
set -euo pipefail

stop() {
    local dir=$1 name pid
    # The daemons that DIR's own pid files name; no others.
    for name in slurmd slurmctld munged; do
        pid=$(cat "$dir/run/$name.pid" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    done
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

if [ "${1:-}" = --stop ]; then stop "${2:?--stop needs DIR}"; exit 0; fi
DIR=$(realpath -m "${1:?usage: start_slurm.sh DIR [GPUS] | --stop DIR}")
GPUS=${2:-0}
for program in munged slurmctld slurmd scontrol sinfo; do
    command -v "$program" >/dev/null || PATH=$PATH:/usr/sbin
    command -v "$program" >/dev/null || { echo "$program is missing: apt-get install slurm-wlm munge" >&2; exit 1; }
done

HOST=$(hostname -s)
mkdir -p "$DIR"/{state,spool,log,run}
chmod 755 "$DIR" "$DIR"/run
[ -f "$DIR/munge.key" ] || (umask 077; head -c 1024 /dev/urandom > "$DIR/munge.key")
MEMORY=$(( $(slurmd -C | sed -n 's/.*RealMemory=\([0-9]*\).*/\1/p') - 500 ))

cat > "$DIR/slurm.conf" <<CONF
ClusterName=odyssey-test
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobRequeue=1
KillWait=5
MinJobAge=300
ReturnToService=2
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.pid
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.log
$([ "$GPUS" -gt 0 ] && echo "GresTypes=gpu")
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=4 RealMemory=$MEMORY $([ "$GPUS" -gt 0 ] && echo "Gres=gpu:$GPUS") State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=ALL MaxTime=INFINITE State=UP
CONF
PRETENDED=(/dev/zero /dev/full /dev/random /dev/urandom)
: > "$DIR/gres.conf"
for index in $(seq 0 $((GPUS - 1))); do
    echo "NodeName=$HOST Name=gpu File=${PRETENDED[$index]}" >> "$DIR/gres.conf"
done

export SLURM_CONF=$DIR/slurm.conf
cat > "$DIR/env" <<ENV
export SLURM_CONF=$DIR/slurm.conf
export PATH=\$PATH:/usr/sbin
ENV

munged --force --num-threads=2 --key-file="$DIR/munge.key" --socket="$DIR/run/munge.socket" \
    --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munged.seed"
slurmctld -c -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
for _ in $(seq 60); do
    [ "$(sinfo --noheader --partition=cpu --format=%T 2>/dev/null)" = idle ] && exit 0
    sleep 0.5
done
echo "Slurm did not come up; its logs are in $DIR/log" >&2
stop "$DIR"
exit 1
