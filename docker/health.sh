#!/usr/bin/env bash
# Trains the tiny recipe for a few steps, from its first file to its report: whether this image, or host, can.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python pipeline/train.py recipes/tiny_t5_order1.yaml training.max_steps=2 data.max_test_rows=8 \
  output.dir="$folder/run" >"$folder/log" 2>&1 || { tail -n 20 "$folder/log" >&2; exit 1; }
test -s "$folder/run/results.json"
