#!/usr/bin/env bash
# Install with [test] where that was not done, then lint, types and tests: bash tests/run.sh [pytest flags]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh test
# Each process would compile the project anew where Python is told to keep nothing, as in some containers; and one that
# compiles graphs would start others for that, on cores that are busy.
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
  PYTHONDONTWRITEBYTECODE=

failed=
check() {
  echo "== $*"
  "$@" || failed="$failed '$*'"
}
check ruff check .
check ruff format --check .
if [ -n "$failed" ]; then
  echo "== failed:$failed; the tests follow"
fi
types=$(mktemp)
nice mypy >"$types" 2>&1 &
mypy=$!
trap 'kill $mypy 2>/dev/null || true; rm -f "$types"' EXIT
# Four at a time, for two cores: many tests wait.
check python -m pytest -n 4 --dist worksteal -rs -m "not slow" "$@"
echo "== mypy, which ran beside the tests"
wait $mypy || failed="$failed 'mypy'"
cat "$types"
if [ -n "$failed" ]; then
  echo "== failed:$failed"
fi
[ -z "$failed" ]
