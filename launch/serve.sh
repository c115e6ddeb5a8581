#!/usr/bin/env bash
# Prints the command that serves a draft with its target; --run runs it.
# Usage: [MODEL=TARGET] launch/serve.sh DRAFT [sglang|vllm|trtllm] [--run] [--draft-length N]
#        [--port N] [-- ARGUMENTS OF THE ENGINE]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$root/.venv/bin/python" ] || (source "$root/launch/environment.sh" "")
exec "$root/.venv/bin/python" -m eagle3.export.serve "$@"
