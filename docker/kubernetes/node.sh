#!/usr/bin/env bash
# The ranks of one pod of an Indexed Job: docker/kubernetes/node.sh RECIPE [key=value ...]
# Reads JOB_COMPLETION_INDEX, NODES, GPUS, MASTER_ADDR and MASTER_PORT; passes SIGTERM and SIGUSR1 on to its ranks.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${JOB_COMPLETION_INDEX:?is set in pods of an Indexed Job}" "${NODES:?}" "${GPUS:?}" "${MASTER_ADDR:?}" "${MASTER_PORT:?}"

ranks=()
for ((local = 0; local < GPUS; local++)); do
  RANK=$((JOB_COMPLETION_INDEX * GPUS + local)) WORLD_SIZE=$((NODES * GPUS)) LOCAL_RANK=$local \
    python pipeline/train.py "$@" &
  ranks+=($!)
done
trap 'kill -s TERM "${ranks[@]}" 2>/dev/null || true' TERM INT
trap 'kill -s USR1 "${ranks[@]}" 2>/dev/null || true' USR1

# The first rank that fails decides the exit code, and ends the others, which would wait for it.
code=0
while [ ${#ranks[@]} -gt 0 ]; do
  one=0
  wait -n -p ended "${ranks[@]}" || one=$?
  if [ -z "${ended:-}" ]; then continue; fi # a signal came, and has been passed on
  left=()
  for rank in "${ranks[@]}"; do
    if [ "$rank" != "$ended" ]; then left+=("$rank"); fi
  done
  ranks=("${left[@]}")
  if [ "$one" != 0 ] && [ "$code" = 0 ]; then
    code=$one
    sleep 10 # ranks that stop for the same reason end by themselves
    if [ ${#ranks[@]} -gt 0 ]; then kill -s KILL "${ranks[@]}" 2>/dev/null || true; fi
  fi
done
exit "$code"
