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

# The flags of a run, each quoted, for a command that a shell on another machine reads.
quoted() { printf '%q ' "$@"; }
