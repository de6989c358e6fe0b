#!/usr/bin/env bash
# Make or reuse .venv with the package installed in place.
#
#   scripts/venv.sh [EXTRA]      EXTRA: an optional dependency group of pyproject.toml, such as test
#
# Does nothing when pyproject.toml has not changed since the last time. PYTHON names the interpreter (python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-}
python=${PYTHON:-python3}
stamp=.venv/installed${extra:+-$extra}

if [[ ! -x .venv/bin/python ]]; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "$python is older than 3.10, or missing: set PYTHON to a newer one" >&2
        exit 1
    fi
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi

if ! cmp -s pyproject.toml "$stamp"; then
    echo "installing shardxform${extra:+ with what \"$extra\" needs} into .venv"
    .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
    cp pyproject.toml .venv/installed # the package itself is part of every installation
    cp pyproject.toml "$stamp.new"
    mv "$stamp.new" "$stamp"
fi
