#!/usr/bin/env bash
# Trains on this TPU VM, with all its chips; one host only (v5e-1 to v5e-8, v6e-1 to v6e-8, v5p-8).
# Usage: launch/tpu_vm.sh [--dry-run] --config=configs/sd35_stage2.py --workdir=DIR [OVERRIDES]
# Assumes: run on the VM, in a clone; Python 3.11 or newer; checkpoints and prompts on its disk.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
environment -e ".[tpu]"
run .venv/bin/python -m rtdmd_jax.main --check "${arguments[@]}"
run .venv/bin/python -m rtdmd_jax.main "${arguments[@]}"
