#!/bin/sh
# A SLURM cluster on this machine, for tests: munge, one controller and two slurmds (node1, node2), all under DIR.
# Needs root and Debian's slurm-wlm and munge (apt-get install slurm-wlm munge). Usage: start_cluster.sh DIR; then
# SLURM_CONF=DIR/slurm.conf sbatch ...; stop_cluster.sh DIR ends what was started and nothing else.
set -eu
dir=$(realpath "$1")
mkdir -p "$dir/state" "$dir/node1" "$dir/node2" "$dir/munge"
chmod 0711 "$dir/munge"
dd if=/dev/urandom of="$dir/munge/key" bs=128 count=1 2>/dev/null
chmod 0400 "$dir/munge/key"
munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
port=${SLURM_TEST_PORT:-16817}
cores=$(nproc)
cat > "$dir/slurm.conf" <<CONF
ClusterName=iwmtest
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmctldPort=$port
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdPidFile=$dir/%n/slurmd.pid
SlurmdLogFile=$dir/%n/slurmd.log
SlurmdSpoolDir=$dir/%n
StateSaveLocation=$dir/state
SelectType=select/linear
ReturnToService=2
SlurmdTimeout=60
KillWait=20
JobRequeue=1
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$cores
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$cores
PartitionName=test Nodes=node1,node2 Default=YES State=UP MaxTime=INFINITE
CONF
export SLURM_CONF="$dir/slurm.conf"
slurmctld -f "$SLURM_CONF"
slurmd -N node1 -f "$SLURM_CONF"
slurmd -N node2 -f "$SLURM_CONF"
tries=0
until [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ]; do
    tries=$((tries + 1))
    if [ $tries -gt 60 ]; then
        sinfo >&2 || true
        echo "start_cluster.sh: the two nodes did not become idle in a minute; see $dir/*.log" >&2
        exit 1
    fi
    sleep 1
done
