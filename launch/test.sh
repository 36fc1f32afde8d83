#!/usr/bin/env bash
# The default tests, in an environment of its own.
# Usage: launch/test.sh [--dry-run] [ARGUMENTS OF PYTEST]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
environment -e ".[test,parity]"
run .venv/bin/python -m pytest "${arguments[@]}"
