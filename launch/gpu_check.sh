#!/usr/bin/env bash
# On a machine with a CUDA GPU, in ten minutes: what dev/roofline predicts, measured, and the tests there.
# INSTALL=0 takes the interpreter in PYTHON (default python3) as it is; else the tested set is installed into .venv.
set -euo pipefail
if [ "${INSTALL:-1}" = 0 ]; then
  cd "$(dirname "$0")/.."
  python=${PYTHON:-python3}
  "$python" -c 'import torch, hydra, transformers, rich, xxhash' ||
    { echo "error: $python lacks what the last line names; install it, or leave INSTALL=0 out" >&2; exit 1; }
else
  source "$(dirname "$0")/environment.sh" test
fi
exec "$python" dev/gpu_check.py "$@"
