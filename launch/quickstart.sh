#!/usr/bin/env bash
# From nothing to a measured draft: an environment, then `python run.py` with whatever is given here.
source "$(dirname "$0")/environment.sh" ""
"$python" run.py "$@"
