# shellcheck shell=bash
# Sourced by the other scripts. Takes --dry-run from the arguments (the rest is in `arguments`); `run`
# then prints commands instead of running them.
dry_run=false
arguments=()
for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then dry_run=true; else arguments+=("$argument"); fi
done

run() {
  if $dry_run; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}

# Makes .venv with the named extra (tpu, gpu) unless it is there.
environment() {
  [ -d .venv ] || run python3 -m venv .venv
  run .venv/bin/pip install -q -e ".[$1]"
}

# The flags of a run, each quoted, for a command that a shell on another machine reads.
quoted() { printf '%q ' "$@"; }
