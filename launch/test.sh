#!/usr/bin/env bash
# The tests, in the tested environment. --slow and --gpu add what the default leaves out; the rest goes to pytest.
source "$(dirname "$0")/environment.sh" test
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest "$@"
