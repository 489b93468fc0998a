#!/usr/bin/env bash
# GPT-2 350M on eight A100s: 10 billion tokens of FineWeb-Edu, 19,073 steps of 524,288 tokens.
# Learning rate, batch and warm-up of 375 million tokens: GPT-3 (Brown et al. 2020), table 2.1 and appendix B,
# its 350M model.
# That 124M learns better at three times its rate (gpt2_124m_8xa100.sh) is published for no other size.
# 16 sequences a GPU at a time: 17 GiB with weights, gradients and moments
# by the arithmetic of docs/gpus.md, not measured; so it fits cards of 40 GB. Ones of 80 GB take twice that.
#
# Data (about 20 GB of shards, and HellaSwag's validation set), once:
#   python -m data_prep fineweb-edu --out data/fineweb-edu
#   python -m data_prep hellaswag --out data/hellaswag
# Trainer flags may follow. LAUNCH_FLAGS goes to the launcher: LAUNCH_FLAGS=--dry-run shows the command only.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/find_python.sh
# shellcheck disable=SC2086  LAUNCH_FLAGS may hold several
exec "$python" -m launch ${LAUNCH_FLAGS:-} -- \
  --model gpt2-medium --data-dir data/fineweb-edu --out-dir runs/gpt2-medium-fineweb-edu \
  --sequence-length 1024 --micro-batch-size 16 --total-batch-size 524288 \
  --max-steps 19073 --warmup-steps 715 --max-lr 3e-4 --weight-decay 0.1 \
  --val-every 250 --val-tokens 10485760 --hellaswag-every 250 --sample-every 250 \
  --checkpoint-every 1000 --keep-checkpoints 3 "$@"
