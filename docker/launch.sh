#!/usr/bin/env bash
# Trains through DeepSpeed's launcher, on this host, or from the first of several on all of them, over ssh:
#
#   docker/launch.sh [--hostfile HOSTFILE] RECIPE [key=value ...]
#
# SIGTERM, SIGINT and SIGUSR1 are passed on to the ranks, which the launcher itself never does: they stop between two
# steps, and the exit code is 75. The same command then goes on. What a container starts must be this: when its first
# process ends, all others are killed.
#
# HOSTFILE: a line "HOST slots=RANKS" each; the first host, this one, holds rank 0, which alone writes the run's folder.
# Needed: pdsh here; ssh without a password from here to every host; on every host the same checkout, Python and data at
# the same paths. MASTER_PORT (29500): where the ranks meet. LAUNCHER_FLAGS: more for DeepSpeed's launcher, such as
# "--num_gpus 2".
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
root=$(cd "$(dirname "$0")/.." && pwd)

# The first process of a container has no default for a signal: it must be caught from here on.
stopped=
trap 'stopped=early' TERM INT USR1

# Tells faults of the recipe here, once, before any host is asked; the folder of the run is where the pids will be.
run=$(python "$root/docker/run_folder.py" "$@")
began=$(mktemp) # pids that are older are those of a run before
environment=$(mktemp)
trap 'rm -f "$began" "$environment"' EXIT

read -ra flags <<<"${LAUNCHER_FLAGS:-}"
words=("$@")
if [ -n "$hostfile" ]; then
  flags+=(--hostfile "$hostfile" --force_multi --master_port "${MASTER_PORT:-29500}")
  # ssh hands nothing of the environment on; DeepSpeed does with what stands in this file (and by itself with NCCL's),
  # between double quotes, and prints it: so no tokens.
  for name in $(compgen -e | grep -E '^(CL_|HF_|GLOO_|OMP_NUM_THREADS$)' | grep -v TOKEN || true); do
    # shellcheck disable=SC2001 # bash's own replacing has no word for what was found
    printf '%s=%s\n' "$name" "$(sed 's/[\\"$`]/\\&/g' <<<"${!name}")" >>"$environment"
  done
  export DS_ENV_FILE=$environment
  # A shell on the other host reads the arguments again. DeepSpeed itself quotes those with spaces.
  for index in "${!words[@]}"; do
    if [[ ${words[index]} != *" "* ]]; then printf -v "words[index]" '%q' "${words[index]}"; fi
  done
  # A host that has gone would else keep ssh, and with it the launcher, waiting for hours.
  alive="-o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
  export PDSH_SSH_ARGS_APPEND="$alive ${PDSH_SSH_ARGS_APPEND:-}"
fi
[ -z "$stopped" ] || exit 75
# A session of its own: Ctrl-C would else end the launcher, which then kills the ranks.
setsid deepspeed "${flags[@]}" "$root/pipeline/train.py" "${words[@]}" </dev/null &
launcher=$!

# Reads lines "rank host pid" and signals those of the host that it runs on.
tell="while read -r rank name pid; do if [ \"\$name\" = \"\$(uname -n)\" ]; then kill -s SIGNAL \"\$pid\"; fi; done"
# shellcheck disable=SC2029,SC2329 # the signal is put in on this side; the traps call it
forward() {
  if [ "$run/pids" -nt "$began" ]; then
    if [ -z "$hostfile" ]; then
      sh -c "${tell/SIGNAL/$1}" <"$run/pids" || true
    else
      while read -r -u 3 host _; do
        [[ -z $host || $host == \#* ]] && continue
        # shellcheck disable=SC2086 # several words
        ssh $alive "$host" "${tell/SIGNAL/$1}" <"$run/pids" || echo "docker/launch.sh: $host was not told to stop" >&2
      done 3<"$hostfile"
    fi
    stopped=told
  elif [ -z "$stopped" ]; then # the ranks have not begun yet: nothing has to be left whole
    if [ -z "$hostfile" ]; then
      kill -s TERM -- "-$launcher" || true # the launcher tells none of those that it has started
    else
      kill -s TERM "$launcher" || true # on several hosts it ends its own on all of them
    fi
    stopped=early
  fi
}
trap 'forward TERM' TERM INT
trap 'forward USR1' USR1
if [ -n "$stopped" ]; then # between the launcher's start and here
  stopped=
  forward TERM
fi

while :; do
  code=0
  wait "$launcher" || code=$?
  if ! kill -0 "$launcher" 2>/dev/null; then
    last=0
    wait "$launcher" || last=$? # the status above may be the signal's, where the launcher ended inside the trap
    if [ "$last" != 127 ]; then code=$last; fi
    break
  fi
done
if [ "$stopped" = early ] && [ "$code" != 0 ]; then
  code=75
  for _ in $(seq 100); do # ten seconds, for what it had started
    kill -0 -- "-$launcher" 2>/dev/null || break
    sleep 0.1
  done
  kill -s KILL -- "-$launcher" 2>/dev/null || true
fi
exit "$code"
