#!/usr/bin/env bash
# GPT-2 124M learns a small text by heart, as a sign that all of it works: 750 steps of 32,768 tokens over tiny Shakespeare,
# 73 times each of its 338,025 tokens.
#   python -m data_prep shakespeare --out data/shakespeare      or TEXT=any.txt
#   bash launch/seed_convergence.sh [trainer flags]             one GPU, or as many as there are
#   PART=16 bash launch/seed_convergence.sh                     for a CPU: a sixteenth of the text and of the batch, as often
# One rank has a sequence of 1,024 tokens at least: on more ranks than 32 / PART, LAUNCH_FLAGS="--nproc-per-node 1".
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/find_python.sh
part=${PART:-1}
text=${TEXT:-data/shakespeare/tinyshakespeare.txt}
data=data/seed_convergence_$part

if [ ! -f "$text" ]; then
  echo "error: no $text: python -m data_prep shakespeare --out data/shakespeare fetches it, TEXT=any.txt names another" >&2
  exit 2
fi
mkdir -p "$data.text"
"$python" -c 'import sys
text = sys.stdin.buffer.read()
end = len(text) // int(sys.argv[1]) // 100 * 100
while 0 < end < len(text) and text[end] >> 6 == 0b10:  # within a letter of UTF-8
    end -= 1
sys.stdout.buffer.write(text[:end])' "$part" <"$text" >"$data.text.new"
# data_prep tells a text by its time: one that is the same keeps it.
if cmp -s "$data.text.new" "$data.text/text.txt"; then
  rm "$data.text.new"
elif [ -f "$data/manifest.json" ]; then
  rm "$data.text.new"
  echo "error: $data holds another text than $text: delete $data and runs/seed_convergence_$part, or move them" >&2
  exit 2
else
  mv "$data.text.new" "$data.text/text.txt"
fi
"$python" -m data_prep text "$data.text" --out "$data" --val-fraction 0
# shellcheck disable=SC2086  LAUNCH_FLAGS may hold several
exec "$python" -m launch ${LAUNCH_FLAGS:-} -- \
  --model gpt2 --data-dir "$data" --out-dir "runs/seed_convergence_$part" \
  --sequence-length 1024 --micro-batch-size auto --total-batch-size $((32768 / part)) \
  --max-steps 750 --warmup-steps 75 --max-lr 6e-4 --weight-decay 0.1 \
  --val-every 0 --checkpoint-every 50 "$@"
