#!/usr/bin/env bash
# On a machine with a CUDA GPU: the tests there, then one training step at Llama-3.1-8B shapes.
source "$(dirname "$0")/environment.sh" test
"$python" -m pytest --gpu -m gpu
"$python" dev/gpu_step.py "$@"
