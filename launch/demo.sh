#!/usr/bin/env bash
# Stage 2 on the shipped tiny pipeline, in an environment of its own.
# Usage: launch/demo.sh [--dry-run] [WORKDIR]
# Assumes: Python 3.11 or newer; the packages take 1.2 GB. WORKDIR is runs/tiny by default.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
workdir=${arguments[0]:-runs/tiny}
if [ "${#arguments[@]}" -gt 1 ] || [[ $workdir == -* ]]; then
  echo "error: launch/demo.sh takes one WORKDIR, not: ${arguments[*]} (--help says more)" >&2
  exit 2
fi
environment -r requirements.txt
run .venv/bin/python -m rtdmd_jax.main --config=configs/tiny_stage2.py --workdir="$workdir"
