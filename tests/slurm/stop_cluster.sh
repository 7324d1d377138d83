#!/bin/sh
# End the daemons that start_cluster.sh DIR started, by the process ids that they wrote.
dir=$(realpath "$1")
for file in "$dir/node1/slurmd.pid" "$dir/node2/slurmd.pid" "$dir/slurmctld.pid" "$dir/munge/pid"; do
    if [ -f "$file" ]; then
        kill "$(cat "$file")" 2>/dev/null || true
    fi
done
