#!/usr/bin/env bash
# Stage 2 on the shipped tiny pipeline, in an environment of its own. Usage: launch/demo.sh [WORKDIR]
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install -q -r requirements.txt
exec .venv/bin/python -m rtdmd_jax.main --config=configs/tiny_stage2.py --workdir="${1:-runs/tiny}"
