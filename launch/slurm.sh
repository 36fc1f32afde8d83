#!/usr/bin/env bash
# Trains on GPUs of a Slurm allocation, one process a GPU.
# Usage: sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --signal=TERM@300 \
#   launch/slurm.sh [--dry-run] --config=configs/sd35_stage2.py --workdir=DIR [OVERRIDES]
# Assumes: sbatch is called in the clone, whose .venv (made by launch/gpus.sh, or by hand) and whose
# --workdir, checkpoints and prompts every node sees. The signal saves a checkpoint before the limit.
# On nodes of eight GPUs a published configuration gets the settings that configs/gpus.py has.
set -euo pipefail
# Slurm runs a copy of this file, so that $0 says nothing of the clone.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
. launch/lib.sh
export RTDMD_COORDINATOR=auto
choose_gpu_setup
run srun --export=ALL --kill-on-bad-exit=1 .venv/bin/python -m rtdmd_jax.main "${arguments[@]}"
