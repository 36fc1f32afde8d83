#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process; CUDA_VISIBLE_DEVICES chooses among them.
# Usage: launch/gpus.sh [--dry-run] --config=configs/sd35_stage2.py --workdir=DIR [OVERRIDES]
# Assumes: a driver for CUDA 12, Python 3.11 or newer, checkpoints and prompts on its disk.
# On one GPU of 80 or 141 GB, or on eight, a published configuration gets the settings that
# configs/gpus.py has for them; a configuration's own argument (sd35_stage2.py:1x80) comes first.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
environment -e ".[gpu]"
choose_gpu_setup
run .venv/bin/python -m rtdmd_jax.main --check "${arguments[@]}"
run .venv/bin/python -m rtdmd_jax.main "${arguments[@]}"
