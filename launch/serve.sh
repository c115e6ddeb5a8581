#!/usr/bin/env bash
# Prints the command that serves a draft with its target; --run runs it. What stands behind -- is given to the engine.
# Usage: [MODEL=TARGET] launch/serve.sh DRAFT [sglang|vllm|trtllm] [--run] [--draft-length N] [--port N] [-- ...]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$root/.venv/bin/python" ] || (source "$root/launch/environment.sh")
run=no
arguments=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if [ "$1" = --run ]; then run=yes; else arguments+=("$1"); fi
  shift
done
command=$("$root/.venv/bin/python" -m eagle3.export.serve "${arguments[@]}" "$@")
echo "$command"
[ $run = no ] || exec bash -c "$command"
