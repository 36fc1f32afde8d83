#!/usr/bin/env bash
# Asks for a TPU slice, or SLICES of them, waits, installs on every worker and trains.
# Usage: PROJECT=.. ZONE=.. NAME=.. TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite SOURCE=https://.. \
#   [SLICES=2] launch/tpu_pod.sh [--dry-run] --config=configs/sd35_stage2.py --workdir=DIR [OVERRIDES]
# Assumes: gcloud is logged in and has quota; workers can clone SOURCE and have Python 3.11 or newer;
# --workdir, checkpoints and prompts lie on a disk that every worker has mounted at the same path.
# With several slices mesh.data must be a multiple of SLICES. Delete it afterwards:
#   gcloud compute tpus queued-resources delete NAME --project=.. --zone=.. --force
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
: "${PROJECT:?}" "${ZONE:?}" "${NAME:?}" "${TYPE:?}" "${RUNTIME:?}" "${SOURCE:?}"
slices=${SLICES:-1}
where=(--project="$PROJECT" --zone="$ZONE")
nodes=(--node-id="$NAME")
[ "$slices" -eq 1 ] || nodes=(--node-count="$slices" --node-prefix="$NAME")

everywhere() {
  run gcloud compute tpus queued-resources ssh "$NAME" "${where[@]}" --node=all --worker=all \
    --command="$1"
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'
}

run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${nodes[@]}" \
  --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
until $dry_run || [ "$(state)" = ACTIVE ]; do
  case "$(state)" in FAILED | SUSPENDED) echo "$NAME was not granted" >&2; exit 1 ;; esac
  sleep 60
done
everywhere "git clone $(quoted "$SOURCE") rtdmd_jax"
everywhere "cd rtdmd_jax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
everywhere "cd rtdmd_jax && RTDMD_COORDINATOR=auto .venv/bin/python -m rtdmd_jax.main $(quoted "${arguments[@]}")"
