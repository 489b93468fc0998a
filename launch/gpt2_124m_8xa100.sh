#!/usr/bin/env bash
# GPT-2 124M on eight A100s: 10 billion tokens of FineWeb-Edu, 19,073 steps of 524,288 tokens.
# Batch, betas, decay, clipping and cosine to a tenth: GPT-3 (Brown et al. 2020), table 2.1 and appendix B, its 125M model.
# Learning rate 1.8e-3, three times that of GPT-3, and a warm-up of about 300 steps: published for this model, data and
# batch by garg-aayush/building-from-scratch, HellaSwag 0.3155 and validation loss 3.021 after 10 billion tokens, where
# 6e-4 with 715 steps gave 0.304 and 3.066, and GPT-2 itself has 0.2955. Shuffled globally, as here: 0.3169, 3.005.
# 32 sequences a GPU at a time: 11 GiB with weights, gradients and moments
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
  --model gpt2 --data-dir data/fineweb-edu --out-dir runs/gpt2-fineweb-edu \
  --sequence-length 1024 --micro-batch-size 32 --total-batch-size 524288 \
  --max-steps 19073 --warmup-steps 300 --max-lr 1.8e-3 --weight-decay 0.1 \
  --val-every 250 --val-tokens 10485760 --hellaswag-every 250 --sample-every 250 \
  --checkpoint-every 1000 --keep-checkpoints 3 "$@"
