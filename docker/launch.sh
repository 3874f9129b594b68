#!/usr/bin/env bash
# Trains on several hosts, through DeepSpeed's launcher over ssh:
#
#   docker/launch.sh HOSTFILE RECIPE [key=value ...]
#
# HOSTFILE: a line "HOST slots=RANKS" each; the first host holds rank 0, which alone writes the run's folder.
# Needed: pdsh here; ssh without a password from here to every host; on every host the same checkout, Python and data
# at the same paths. MASTER_PORT (29500): where the ranks meet.
#
# SIGTERM and SIGUSR1 are passed on to the ranks on their hosts, which the launcher itself never does: they stop between
# two steps, and the exit code is 75. The same command then goes on.
set -euo pipefail

if [ $# -lt 2 ] || [ ! -f "$1" ]; then
  echo "usage: docker/launch.sh HOSTFILE RECIPE [key=value ...]; HOSTFILE has a line \"HOST slots=RANKS\" each" >&2
  exit 2
fi
hostfile=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
python=$(command -v python)

# Tells faults of the recipe here, once, before any host is asked; the folder of the run is where the pids will be.
run=$("$python" - "$@" <<'EOF'
import sys

from data_prep.errors import UserError
from pipeline.recipe import Recipe

try:
    print(Recipe.load(sys.argv[1], sys.argv[2:]).run_dir)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
EOF
)
rm -f "$run/pids" # of a run before, whose processes are gone

# ssh hands nothing of the environment on; DeepSpeed does with what stands in this file.
settings=$(mktemp)
trap 'rm -f "$settings"' EXIT
for name in $(compgen -e | grep -E '^(CL_|HF_|GLOO_|NCCL_|OMP_NUM_THREADS$)' || true); do
  printf '%s=%q\n' "$name" "${!name}" >>"$settings"
done

# A shell on the other host reads the arguments again. DeepSpeed itself quotes those with spaces.
words=()
for word in "$@"; do
  if [[ $word != *" "* ]]; then printf -v word '%q' "$word"; fi
  words+=("$word")
done

# A host that has gone would else keep ssh, and with it the launcher, waiting for hours.
export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=10 -o ServerAliveCountMax=3 ${PDSH_SSH_ARGS_APPEND:-}"
DS_ENV_FILE=$settings deepspeed --hostfile "$hostfile" --force_multi --master_port "${MASTER_PORT:-29500}" \
  pipeline/train.py "${words[@]}" </dev/null &
launcher=$!

forward() {
  if [ ! -f "$run/pids" ]; then # nothing has begun that would have to be left whole
    kill -s TERM "$launcher"
    return
  fi
  while read -r host _; do
    [[ -z $host || $host == \#* ]] && continue
    # Each host picks its own lines "rank host pid".
    ssh "$host" "while read -r rank name pid; do if [ \"\$name\" = \"\$(uname -n)\" ]; then kill -s $1 \"\$pid\"; fi; done" \
      <"$run/pids" || echo "docker/launch.sh: $host could not be told to stop" >&2
  done <"$hostfile"
}
trap 'forward TERM' TERM INT
trap 'forward USR1' USR1

code=0
while :; do
  wait "$launcher" && code=0 || code=$?
  # A signal that came here ended the waiting, not the launcher.
  kill -0 "$launcher" 2>/dev/null || break
done
exit "$code"
