#!/usr/bin/env bash
# Trains through DeepSpeed's launcher, on this host, or on several over ssh:
#
#   docker/launch.sh [--hostfile HOSTFILE] RECIPE [key=value ...]
#
# SIGTERM and SIGUSR1 are passed on to the ranks, which the launcher itself never does: they stop between two steps, and
# the exit code is 75. The same command then goes on. What a container starts must be this: when its first process ends,
# all others are killed.
#
# HOSTFILE: a line "HOST slots=RANKS" each; the first host holds rank 0, which alone writes the run's folder. Needed:
# pdsh here; ssh without a password from here to every host; on every host the same checkout, Python and data at the same
# paths. MASTER_PORT (29500): where the ranks meet. LAUNCHER_FLAGS: more for DeepSpeed's launcher, such as "--num_gpus 2".
set -euo pipefail

usage() {
  echo "usage: docker/launch.sh [--hostfile HOSTFILE] RECIPE [key=value ...]$1" >&2
  exit 2
}
hostfile=
if [ "${1:-}" = --hostfile ]; then
  [ -f "${2:-}" ] || usage "; HOSTFILE is a file with a line \"HOST slots=RANKS\" each, not ${2:-missing}"
  hostfile=$(realpath "$2")
  shift 2
fi
[ $# -ge 1 ] || usage ""
cd "$(dirname "$0")/.."

# Tells faults of the recipe here, once, before any host is asked; the folder of the run is where the pids will be.
run=$(python - "$@" <<'EOF'
import sys

from data_prep.errors import UserError
from pipeline.recipe import Recipe

try:
    print(Recipe.load(sys.argv[1], [word for word in sys.argv[2:] if not word.startswith("--")]).run_dir)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
EOF
)
rm -f "$run/pids" # of a run before, whose processes are gone

read -ra flags <<<"${LAUNCHER_FLAGS:-}"
words=("$@")
if [ -n "$hostfile" ]; then
  flags+=(--hostfile "$hostfile" --force_multi --master_port "${MASTER_PORT:-29500}")
  # ssh hands nothing of the environment on; DeepSpeed does with what stands in this file.
  DS_ENV_FILE=$(mktemp)
  export DS_ENV_FILE
  trap 'rm -f "$DS_ENV_FILE"' EXIT
  for name in $(compgen -e | grep -E '^(CL_|HF_|GLOO_|NCCL_|OMP_NUM_THREADS$)' || true); do
    printf '%s=%q\n' "$name" "${!name}" >>"$DS_ENV_FILE"
  done
  # A shell on the other host reads the arguments again. DeepSpeed itself quotes those with spaces.
  for index in "${!words[@]}"; do
    if [[ ${words[index]} != *" "* ]]; then printf -v "words[index]" '%q' "${words[index]}"; fi
  done
  # A host that has gone would else keep ssh, and with it the launcher, waiting for hours.
  export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=10 -o ServerAliveCountMax=3 ${PDSH_SSH_ARGS_APPEND:-}"
fi
deepspeed "${flags[@]}" pipeline/train.py "${words[@]}" </dev/null &
launcher=$!

# Reads lines "rank host pid" and signals those of the host that it runs on.
tell="while read -r rank name pid; do if [ \"\$name\" = \"\$(uname -n)\" ]; then kill -s SIGNAL \"\$pid\"; fi; done"
# shellcheck disable=SC2029,SC2329 # the signal is put in on this side; the traps call it
forward() {
  if [ ! -f "$run/pids" ]; then # nothing has begun that would have to be left whole
    kill -s TERM "$launcher"
  elif [ -z "$hostfile" ]; then
    sh -c "${tell/SIGNAL/$1}" <"$run/pids"
  else
    while read -r -u 3 host _; do
      [[ -z $host || $host == \#* ]] && continue
      ssh "$host" "${tell/SIGNAL/$1}" <"$run/pids" || echo "docker/launch.sh: $host could not be told to stop" >&2
    done 3<"$hostfile"
  fi
}
trap 'forward TERM' TERM INT
trap 'forward USR1' USR1

while :; do
  code=0
  wait "$launcher" || code=$?
  kill -0 "$launcher" 2>/dev/null || break # else a signal that came here ended the waiting, not the launcher
done
exit "$code"
