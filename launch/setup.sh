#!/usr/bin/env bash
# Make .venv and install the project with the tested versions: bash launch/setup.sh [EXTRA,...]
# Does nothing where that was done with the same setup.cfg, constraints and Python. For a new .venv $PYTHON chooses
# another python3.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-offline,plot,report}
python=${PYTHON:-python3}

version() { "$1" -ISc 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
# The link .venv/bin/python may lead to another Python than it did, for which nothing is installed.
own=$(version .venv/bin/python)
if [ -n "${PYTHON:-}" ] && [ -n "$own" ] && asked=$(version "$PYTHON") && [ "$asked" != "$own" ]; then
  echo "error: .venv has Python $own, but PYTHON=$PYTHON is ${asked:-no Python}: delete .venv to have it" \
    "made with another, or leave PYTHON out" >&2
  exit 2
fi
wanted=$(cat setup.cfg launch/constraints.txt | cksum)
for done in "$extras" test; do # [test] holds the other extras that are installed here
  if [ "$(cat ".venv/installed-$done" 2>/dev/null)" = "$wanted Python $own" ]; then
    exit 0
  fi
done
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  start=--clear
  if [ -n "$own" ] && compgen -G ".venv/lib/python$own*" >/dev/null; then
    python=.venv/bin/python start= # begun and interrupted, or made by uv: its own Python ends it
  elif [ -n "$own" ]; then # what it links to became another Python, which by the link's name could not clear the link
    python=$(.venv/bin/python -ISc 'import os, sys; print(os.path.realpath(sys.executable))')
  fi
  if ! command -v "$python" >/dev/null; then
    echo "error: no $python on PATH: install Python 3.10 or later, or name one with PYTHON=/path/to/python3" >&2
    exit 2
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $("$python" --version) is too old, 3.10 or later is needed: name one with PYTHON=/path/to/python3" >&2
    exit 2
  fi
  echo "setup: making .venv with $("$python" --version)"
  if ! "$python" -m venv ${start:+"$start"} .venv; then
    echo "error: $python cannot make a virtual environment: on Debian and Ubuntu, apt-get install python3-venv" >&2
    exit 2
  fi
fi
echo "setup: installing gpt2_ddp[$extras] and PyTorch into .venv; a minute or more the first time"
constraints=(-c launch/constraints.txt)
if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: the tested versions need Python 3.11 or later; on this one the newest that fit are taken"
  constraints=()
fi
pip=(.venv/bin/python -m pip -qq --disable-pip-version-check) # errors are told; newer ones warn of what is meant so
"${pip[@]}" install --upgrade pip || true # those beside older Pythons are slower
"${pip[@]}" install --no-compile ${constraints[@]+"${constraints[@]}"} -e ".[$extras]"
# Few of the files are ever imported. These are kept compiled, also where Python is told to keep nothing: each start
# would compile them anew.
PYTHONDONTWRITEBYTECODE='' .venv/bin/python -c 'import torch._inductor.compile_fx, torch.distributed.run
import data_prep.__main__, eval.__main__, gpt2_ddp.train'
echo "$wanted Python $(version .venv/bin/python)" >".venv/installed-$extras"
