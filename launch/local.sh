#!/usr/bin/env bash
# From a fresh machine to a GPT-2 that was trained, plotted and sampled: bash launch/local.sh [trainer flags]
# Trains a small model on the Python language reference (it ships inside Python, so nothing is downloaded but the
# packages), on every GPU or on the CPU's cores. Minutes on two cores; run it again and it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
data=data/demo
run=runs/local
hellaswag=data/hellaswag/hellaswag_val.jsonl

bash launch/setup.sh offline,plot
python=.venv/bin/python

say() { printf '\n== %s\n' "$*"; }

say "data: text to tokens, in $data"
"$python" -m data_prep demo --out "$data"

say "training, in $run"
"$python" -m launch -- --model gpt2-nano --data-dir "$data" --out-dir "$run" \
  --sequence-length 256 --micro-batch-size 8 --total-batch-size 4096 \
  --max-steps 400 --warmup-steps 20 --max-lr 3e-3 \
  --val-every 100 --val-tokens 8192 --checkpoint-every 100 "$@"

say "plot"
"$python" -m eval plot "$run" --out "$run/plot.png"

if [ -f "$hellaswag" ]; then
  say "HellaSwag, 200 examples"
  "$python" -m eval hellaswag --model "$run" --data "$hellaswag" --limit 200
else
  say "HellaSwag: no $hellaswag here; python -m data_prep hellaswag --out data/hellaswag fetches it"
fi

say "a sample"
"$python" -m eval sample --model "$run" --prompt "The import statement" --max-new-tokens 80

say "done"
