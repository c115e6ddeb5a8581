#!/usr/bin/env bash
# The tests, in the tested environment, on two processes of one thread each.
# --fast: only those that start no run and no process. --slow, --gpu and --engines add what the default leaves out;
# --engines makes the engines' environments for CPUs first (launch/engines.sh; ENGINES_DIR is where). The rest goes to
# pytest.
source "$(dirname "$0")/environment.sh" test
case " $* " in *" --engines "*) CUDA_VISIBLE_DEVICES="" launch/engines.sh all ;; esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$python" -m ruff check .
"$python" -m ruff format --check .
PYTHONPATH=. "$(dirname "$python")/lint-imports" --no-cache
"$python" -m pytest -n 2 --dist loadfile "$@"
