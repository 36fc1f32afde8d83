#!/usr/bin/env bash
# The default tests, in an environment of its own; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install -q -e ".[test,parity]"
exec .venv/bin/python -m pytest "$@"
