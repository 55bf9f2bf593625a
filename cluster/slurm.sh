#!/usr/bin/env bash
# For: a run on 2 node(s) of a Slurm cluster: one Ray of the job's own, which ends with it.
#
# Made by: raytune-ds render --target slurm --config my.yaml --output slurm.sh
# To change, in my.yaml: cluster.slurm, cluster.shared_dir (a directory that all nodes see), cluster.gpus_per_node,
# cluster.cpus_per_node and cluster.memory_gib_per_node (what a node has).
#
#   sbatch slurm.sh                       # the run; what it says is in raytune-ds-JOB.log
#   sbatch slurm.sh train.max_steps=50    # the same, with settings of the moment
#   scancel JOB                           # ends it; `sbatch slurm.sh run.name=slurm-JOB` resumes it
#
# Two minutes before its time is up it stops, queues itself again and resumes from the newest checkpoint; it resumes too
# where Slurm preempts it and queues it again.
# Slurm hands the environment of the shell that runs sbatch on to the nodes: HF_TOKEN, WANDB_API_KEY.
#SBATCH --job-name=raytune-ds
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail
# shellcheck disable=SC1090,SC1091
source ~/raytune_ds/.venv/bin/activate

nodes=$SLURM_JOB_NUM_NODES
read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
work=$(mktemp -d)
cat > "$work/run.yaml" <<'SETTINGS'
run:
  storage: /shared/raytune_ds
SETTINGS

# Ports and directories of this job's own, below those that the system hands out, so that two jobs may share a node.
port=$((20000 + SLURM_JOB_ID % 1200 * 10))
common=(--temp-dir="/tmp/ray-$SLURM_JOB_ID" --metrics-export-port=$((port + 3)) --dashboard-agent-listen-port=0
        --num-cpus=8 --num-gpus=1 --block)
# The head is the node that this script runs on: its address as Ray sees it.
address=$(python -c 'import ray.util; print(ray.util.get_node_ip_address())'):$port
# Others on the node can't join: the key is this job's, and handed on in the environment.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_ADDRESS=$address
# When Ray ends here, nothing is left to move to other nodes; it would wait for that.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

background=()
training=
ended=
requeue=
# shellcheck disable=SC2329  # called by trap
stop() {  # by scancel or preemption, after which Slurm itself knows whether the job runs again
    trap '' TERM USR1
    ended=yes
    [ -z "$training" ] || kill -TERM "$training" 2> /dev/null || true
}
# shellcheck disable=SC2329  # called by trap
pause() {  # the time is nearly up
    requeue=yes
    echo "slurm: stopping, to resume when the job runs again"
    stop
}
# shellcheck disable=SC2329  # called by trap
finish() {
    local code=$?
    trap - EXIT
    [ -z "${background[*]}" ] || kill "${background[@]}" 2> /dev/null || true
    wait || true
    rm -rf "$work"
    if [ -n "$requeue" ] && ((code != 0)); then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$code"
}
trap stop TERM
trap pause USR1
trap finish EXIT

each=(--ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --gpus-per-node=1)
srun --nodes=1 --ntasks=1 --nodelist="$head_node" "${each[@]}" \
    ray start --head --port="$port" --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 2)) \
    "${common[@]}" &
background+=($!)
until ray health-check --address "$address" > /dev/null 2>&1; do
    [ -z "$ended" ] || exit 143
    kill -0 "${background[0]}" 2> /dev/null || { echo "slurm: the head of Ray ended; see above" >&2; exit 1; }
    ((SECONDS < 300)) || { echo "slurm: no Ray at $address after 300 s" >&2; exit 1; }
    sleep 1
done
if ((nodes > 1)); then
    srun --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="$head_node" "${each[@]}" \
        ray start --address="$address" "${common[@]}" &
    background+=($!)
fi
python - "$nodes" <<'JOINED'
import sys
import time

import ray

wanted, until = int(sys.argv[1]), time.monotonic() + 300
ray.init(logging_level="ERROR", log_to_driver=False)
while (alive := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > until:
        sys.exit(f"slurm: {alive} of {wanted} nodes have joined Ray after 300 s; see above for what the others say")
    time.sleep(0.5)
JOINED

if [ -z "$ended" ]; then
    # The name stays when the job runs again, so the run resumes; a run.name of your own comes later and wins.
    python -m raytune_ds.train --config "$work/run.yaml" run.name="slurm-$SLURM_JOB_ID" "$@" &
    training=$!
fi
code=143
if [ -n "$training" ]; then
    code=0
    wait "$training" || code=$?
    # A signal ends the wait, not the run.
    if [ -n "$ended" ]; then code=0; wait "$training" || code=$?; fi
fi
exit "$code"
