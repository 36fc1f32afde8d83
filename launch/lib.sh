# shellcheck shell=bash
# Sourced by the other scripts. Takes --dry-run from the arguments (the rest is in `arguments`); `run`
# then prints commands instead of running them. --help prints the comment at a script's top.
dry_run=false
arguments=()
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      script="launch/$(basename "$0")"
      [ -f "$script" ] || script=$0
      awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$script"
      exit 0
      ;;
    --dry-run) dry_run=true ;;
    *) arguments+=("$argument") ;;
  esac
done

run() {
  if $dry_run; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}

# Makes .venv unless it is there; pip installs into it what the arguments say.
environment() {
  if [ ! -d .venv ]; then
    if ! $dry_run && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "error: python3 must be Python 3.11 or newer, and this is $(python3 --version 2>&1)" >&2
      exit 2
    fi
    run python3 -m venv .venv
  fi
  run .venv/bin/pip install -q "$@"
}

# Gives a published configuration without an argument the settings for the GPUs of this machine
# (configs/gpus.py), if there are any for them.
choose_gpu_setup() {
  local memory count setup index
  memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null) || return 0
  count=$(wc -l <<<"$memory")
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then count=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l); fi
  memory=$(sort -n <<<"$memory" | head -n 1)  # MiB
  if ! [[ $memory =~ ^[0-9]+$ ]] || [ "$memory" -lt 79000 ]; then return 0; fi
  case "$count" in
    1) if [ "$memory" -lt 140000 ]; then setup=1x80; else setup=1x141; fi ;;
    8) setup=8x80 ;;
    *) return 0 ;;
  esac
  for index in "${!arguments[@]}"; do
    case "${arguments[$index]}" in
      *tiny_*) ;;
      --config=*_stage[12].py) arguments[index]+=":$setup" ;;
    esac
  done
}

# The flags of a run, each quoted, for a command that a shell on another machine reads.
quoted() { printf '%q ' "$@"; }
