#!/usr/bin/env bash
# Install with [test] where that was not done, then lint, types and tests: bash tests/run.sh [pytest flags]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh test
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

failed=
check() {
  echo "== $*"
  "$@" || failed="$failed '$*'"
}
check ruff check .
check ruff format --check .
check mypy
if [ -n "$failed" ]; then
  echo "== failed:$failed; the tests follow"
fi
# Three at a time, for two cores: many tests wait.
check python -m pytest -n 3 --dist worksteal -rs -m "not slow" "$@"
[ -z "$failed" ]
