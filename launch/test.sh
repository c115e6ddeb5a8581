#!/usr/bin/env bash
# The tests, in the tested environment. --slow, --gpu and --engines add what the default leaves out; --engines makes the
# engines' environments for CPUs first (launch/engines.sh; ENGINES_DIR is where). The rest goes to pytest.
source "$(dirname "$0")/environment.sh" test
case " $* " in *" --engines "*) CUDA_VISIBLE_DEVICES="" launch/engines.sh all ;; esac
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest "$@"
