#!/usr/bin/env bash
# GPT-2 124M on one T4 (also free notebooks): 32,768 tokens a step, in float16 with a gradient scaler, which --dtype auto
# takes on a T4. 8 sequences at a time: 5 GiB of the card's 15 with weights, gradients and moments by the arithmetic of
# docs/gpus.md, not measured; 16 would need 7. A notebook that ends is no loss: the same command goes on.
#
# Data, once; any other text does as well (python -m data_prep --help):
#   python -m data_prep shakespeare --out data/shakespeare
#   python -m data_prep fineweb-edu --out data/fineweb-edu      (then: --data-dir data/fineweb-edu)
# Trainer flags may follow. LAUNCH_FLAGS goes to the launcher: LAUNCH_FLAGS=--dry-run shows the command only.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/find_python.sh
# shellcheck disable=SC2086  LAUNCH_FLAGS may hold several
exec "$python" -m launch ${LAUNCH_FLAGS:-} -- \
  --model gpt2 --data-dir data/shakespeare --out-dir runs/gpt2-t4 \
  --sequence-length 1024 --micro-batch-size 8 --total-batch-size 32768 \
  --max-steps 19073 --warmup-steps 715 --max-lr 6e-4 --weight-decay 0.1 \
  --val-every 250 --val-tokens 32768 --sample-every 250 --checkpoint-every 250 "$@"
