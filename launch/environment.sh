# Sourced: makes .venv with the tested set (launch/constraints.txt) and leaves its interpreter in $python.
# Usage: source launch/environment.sh <extra>; with "" for none, or bash passes the arguments of the caller.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
base=${PYTHON:-python3}
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "error: $base is older than Python 3.10; set PYTHON=/path/to/a/newer/python" >&2; exit 1; }
python=.venv/bin/python
[ -x "$python" ] || "$base" -m venv .venv
wanted="$(cat setup.cfg launch/constraints.txt | cksum) ${1:-}"
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing the tested set into .venv (once; torch is the large part)"
  "$python" -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".${1:+[$1]}"
  echo "$wanted" > .venv/installed
fi
