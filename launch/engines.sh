#!/usr/bin/env bash
# Engines in environments of their own, .venv-sglang and .venv-vllm, beside .venv (or in the folder ENGINES_DIR).
# With a GPU: the published engine and this package, held by launch/constraints-ENGINE.txt. Without one: the exact set
# of launch/constraints-ENGINE-cpu.txt, which is for tests/engines and nothing else; an empty CUDA_VISIBLE_DEVICES asks
# for that one. Usage: launch/engines.sh [sglang|vllm|all]
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
folder=${ENGINES_DIR:-$root}
base=${PYTHON:-python3}
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "error: $base is older than Python 3.11; set PYTHON=/path/to/a/newer/python" >&2; exit 1; }

make() { # ENGINE: a virtual environment, made again only when its set has changed
  local home=$folder/.venv-$1 set=launch/constraints-$1-cpu.txt wanted
  [ -z "${CUDA_VISIBLE_DEVICES-all}" ] || ! command -v nvidia-smi > /dev/null || set=launch/constraints-$1.txt
  wanted=$(cat "$set" "$0" | cksum)
  [ "$(cat "$home/installed" 2> /dev/null)" != "$wanted" ] || { echo "$home is up to date"; return; }
  echo "installing $set into $home (once; some gigabytes)"
  [ -x "$home/bin/python" ] || "$base" -m venv "$home"
  local pip=("$home/bin/python" -m pip install --quiet --disable-pip-version-check)
  if [ "$set" = "launch/constraints-$1.txt" ]; then
    "${pip[@]}" -c "$set" "$1" -e .
  else
    "${pip[@]}" --no-deps -r "$set"
    "$home/bin/python" -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' || {
      echo "error: $home has no CPU build of torch; name an index that has one in PIP_EXTRA_INDEX_URL" >&2
      exit 1
    }
    [ "$1" != sglang ] || complete_sglang "$home"
  fi
  echo "$wanted" > "$home/installed"
}

complete_sglang() { # HOME: what SGLang's wheels lack without CUDA
  local packages
  packages=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  printf '%s\n' "$root" "$root/tests/engines/sgl_kernel_cpu" > "$packages/eagle3.pth"
  # torchvision's own library does not load without CUDA, yet it describes these two operators when imported
  grep -q MISSING "$packages/torchvision/extension.py" || cat >> "$packages/torchvision/extension.py" << 'EOF'

if not _has_ops():
    MISSING = torch.library.Library("torchvision", "DEF")
    MISSING.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    MISSING.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
EOF
}

case ${1:-all} in
  sglang | vllm) make "$1" ;;
  all) make sglang && make vllm ;;
  *) echo "error: $1 is not an engine; usage: launch/engines.sh [sglang|vllm|all]" >&2; exit 2 ;;
esac
