#!/usr/bin/env bash
# run.py under torchrun: bash launch/torchrun.sh [processes] [overrides of run.py, or -m and those of a sweep]
# A process per GPU unless told otherwise. Several nodes: the same on each of them, with NNODES, NODE_RANK (the first is
# 0) and HEAD=host:port of the first. Told to stop (Ctrl-C, SIGTERM) it has SHUTDOWN_TIMEOUT seconds for a checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -n "$(type -P "$python")" ] || python=python3
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  processes=$1
  shift
else
  processes=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
meet=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
  head=${HEAD:?NNODES=$NNODES needs HEAD=host:port of the first node}
  meet=(--nnodes="$NNODES" --node-rank="${NODE_RANK:-${SLURM_NODEID:?NNODES=$NNODES needs NODE_RANK}}")
  meet+=(--master-addr="${head%:*}" --master-port="${head##*:}")
fi
exec "$python" -m eagle3.parallel.torchrun "${meet[@]}" --nproc-per-node="$processes" \
  --shutdown-timeout="${SHUTDOWN_TIMEOUT:-600}" run.py "$@"
