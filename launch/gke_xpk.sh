#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a workload of XPK.
# Usage: PROJECT=.. ZONE=.. CLUSTER=.. NAME=.. TYPE=v5litepod-16 IMAGE=registry/image:tag \
#   [SLICES=2] launch/gke_xpk.sh [--dry-run] --config=configs/sd35_stage2.py --workdir=DIR [OVERRIDES]
# Assumes: `pip install xpk`, a cluster made by it; IMAGE has this clone as its working directory and
# the package installed with the extra `tpu`; --workdir, checkpoints and prompts lie on a mounted disk.
# With several slices mesh.data must be a multiple of SLICES.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
: "${PROJECT:?}" "${ZONE:?}" "${CLUSTER:?}" "${NAME:?}" "${TYPE:?}" "${IMAGE:?}"
run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --workload="$NAME" --tpu-type="$TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --command="RTDMD_COORDINATOR=auto python -m rtdmd_jax.main $(quoted "${arguments[@]}")"
