#!/usr/bin/env bash
# From nothing to a served EAGLE3 draft of Llama-3.1-8B-Instruct, on the GPUs of this machine (1 to 8).
# Usage: launch/speedrun_llama3_8b.sh [--serve]        (--serve starts the server at the end instead of printing how)
#
# Needed: GPUs of 80 GB or more, access to meta-llama/Llama-3.1-8B-Instruct on the hub (HF_TOKEN), some 40 GB of disk
# for the model, the data and the environments. Nothing is stored of the target's hidden states (mode=online).
# The plan comes first and names tokens, memory and hours on this machine; stop there if they do not suit you.
# What to expect: public drafts of this size reach an acceptance length of 2.9 on MT-bench with chains of 3 drafts at
# temperature 0 (SGLang, batch 1), and twice the speed of the target alone. Compare the benchmark's with that.
# Run it again after an interruption: every step goes on where it was.
#
# SPEEDRUN_DIR     the run's folder           SPEEDRUN_RECIPE  what is trained; small changes go behind it
# SPEEDRUN_ENGINE  sglang, or builtin: the benchmark without an engine (where there is no GPU)
set -euo pipefail
source "$(dirname "$0")/environment.sh" ""
gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)
engine=${SPEEDRUN_ENGINE:-$([ "$gpus" -gt 0 ] && echo sglang || echo builtin)}
run=${SPEEDRUN_DIR:-outputs/speedrun_llama3_8b}
read -ra recipe <<< "${SPEEDRUN_RECIPE:-experiment=llama3-8b-speedrun}"
recipe+=("name=speedrun" "launch.nproc_per_node=$((gpus > 8 ? 8 : gpus > 0 ? gpus : 1))")

[ "$engine" = builtin ] || launch/engines.sh "$engine"
if [ ! -f "$run/benchmark/benchmark.json" ]; then
  "$python" run.py "${recipe[@]}" plan=true "hydra.run.dir=$run/plan"
  [ -f "$run/report.html" ] ||
    "$python" run.py "${recipe[@]}" 'stages=[prepare,generate,train,export,check]' "hydra.run.dir=$run"
  measured=("benchmark=$engine")
  [ "$engine" = builtin ] || measured+=(
    "benchmark.python=${ENGINES_DIR:-.}/.venv-$engine/bin/python"
    'benchmark.configs=[[1,3,1,4],[1,7,1,8]]' 'benchmark.suites=[mtbench:80,gsm8k:200,humaneval:164,math500:200]'
  )
  "$python" run.py "${recipe[@]}" launch.nproc_per_node=1 'stages=[benchmark]' "draft_path=$run/draft" \
    "${measured[@]}" "hydra.run.dir=$run/benchmark"
fi
echo "the draft: $run/draft, its curves: $run/report.html, its speed: $run/benchmark/report.html; it is served by"
[ "$engine" != builtin ] || engine=sglang
case ${1:-} in
  --serve) exec launch/serve.sh "$run/draft" "$engine" --run ;;
  *) launch/serve.sh "$run/draft" "$engine" ;;
esac
