#!/usr/bin/env bash
# Everything CI checks: linter, format, types, tests. Further arguments go to pytest.
#
#   scripts/test.sh                     all of it
#   scripts/test.sh -m 'not oracle'     without the tests that import torch
#   SHARDXFORM_TESTS=all scripts/test.sh    as every night: crashes at all effects, and not at some; more examples
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() {
    printf '\n== %s\n' "$*"
    "$@"
}

scripts/venv.sh test
export PATH="$PWD/.venv/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE # each worker would compile all tests anew
step ruff check
step ruff format --check
step mypy
step python -m pytest -n 3 "$@" # of which one waits, for a cluster or a process, as a rule
