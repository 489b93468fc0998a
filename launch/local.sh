#!/usr/bin/env bash
# From a fresh machine to a GPT-2 that was trained, plotted and sampled: bash launch/local.sh [trainer flags]
# Trains the smallest model on the Python language reference (it ships inside Python, so nothing is downloaded but the
# packages), on every GPU or on the CPU's cores. At most three minutes on two cores, whose time goes into the head: 64
# numbers a position rather than gpt2-mini's 384 make it a sixth. Run it again and it goes on where it stopped.
# DATA_DIR and RUN_DIR name other places than data/demo and runs/local. A step is 8 sequences of 128 tokens: on 3, 5, 6, 7
# or more than 8 GPUs give one that divides by them: --total-batch-size 768 for 3 or 6.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DATA_DIR:-data/demo}
run=${RUN_DIR:-runs/local}
hellaswag=data/hellaswag/hellaswag_val.jsonl

for flag in "$@"; do
  case ${flag//_/-} in
  --data-dir | --data-dir=* | --out-dir | --out-dir=* | --config | --config=*)
    echo "error: ${flag%%=*} is not for local.sh: DATA_DIR=... and RUN_DIR=... before the command name its places;" \
      "python -m launch -- ${flag%%=*} ... takes it" >&2
    exit 2
    ;;
  esac
done

bash launch/setup.sh offline,plot,report
python=.venv/bin/python

say() { printf '\n== %s\n' "$*"; }

say "data: text to tokens, in $data"
"$python" -m data_prep demo --out "$data"

say "training, in $run"
"$python" -m launch -- --model gpt2-nano --data-dir "$data" --out-dir "$run" \
  --sequence-length 128 --micro-batch-size auto --total-batch-size 1024 \
  --max-steps 300 --warmup-steps 20 --max-lr 1e-2 \
  --val-every 100 --val-tokens 8192 --checkpoint-every 150 "$@"
# A run that was asked to stop, as by Ctrl-C, also ends with 0.
state=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$run/status.json" 2>/dev/null) ||
  exit 0 # --help trains nothing
if [ "$state" != finished ]; then
  say "training is $state: the same command goes on"
  exit 0
fi

say "plot"
"$python" -m eval plot "$run" --out "$run/plot.png"
if "$python" -c 'import bokeh' 2>/dev/null; then
  say "the page of the run"
  "$python" -m eval report "$run" --out "$run/report.html"
fi

if [ -f "$hellaswag" ]; then
  say "HellaSwag, 200 examples"
  "$python" -m eval hellaswag --model "$run" --data "$hellaswag" --limit 200
else
  say "HellaSwag: no $hellaswag here; python -m data_prep hellaswag --out data/hellaswag fetches it"
fi

say "a sample"
"$python" -m eval sample --model "$run" --prompt "The import statement" --max-new-tokens 80

say "done"
"$python" - "$run/metrics.jsonl" <<'PYTHON'
import json, statistics, sys

events = [json.loads(line) for line in open(sys.argv[1])]
losses = [event["loss"] for event in events if event["event"] == "train"]
print(f"training loss {losses[0]:.2f} at step 1, {statistics.mean(losses[-10:]):.2f} over the last ten")
PYTHON
model=$(printf %q "$run") # for the shell, which would take a place with a space for two
places=${DATA_DIR:+DATA_DIR=$(printf %q "$data") }${RUN_DIR:+RUN_DIR=$model }
cat <<END
the run       $run: checkpoints/ open in Hugging Face transformers as they are, metrics.jsonl, plot.png,
              and report.html where bokeh is installed: curves that answer to the mouse
more text     $python -m eval sample --model $model --prompt "A class definition" --count 3
train longer  ${places}bash launch/local.sh --max-steps 2000
your own text $python -m data_prep text notes.txt --out data/mine
              $python -m launch -- --model gpt2-mini --data-dir data/mine --out-dir runs/mine
GPT-2 124M    $python -m data_prep shakespeare --out data/shakespeare
              $python -m launch -- --config launch/gpt2_124m_t4.toml --max-steps 1000 --warmup-steps 100
              other presets, and slurm.sbatch, are beside it
END
