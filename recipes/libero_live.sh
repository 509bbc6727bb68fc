#!/usr/bin/env bash
# The live episodes of docs/reports/libero.md: six conditions of 60 episodes by vla-eval, one after the other, in slow motion
# by the factor SLOWER (10 if it is not given). Takes an hour each on two cores; run it again to resume.
#
#   bash recipes/libero_live.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/libero/harness} pair=weights/libero_object
export SLOWER=${SLOWER:-10}
live() { # name latency_ms engine policy decoding
  local late
  for try in 1 2 3; do # late episodes run again
    LATENCY_MS=$2 ENGINE=$3 bash recipes/libero_harness.sh live "$1" "$pair/$4" "$5" 6 "$out"
    [ "$try" != 3 ] || return 0
    late=$(.venv/bin/python -m benchmarks.harness.late "$out/$1")
    [ "${late%% *}" != 0 ] || return 0
    echo "$1: $late"
  done
}
live live-ceed-200 200 eager student ceed
live live-ceed-400 400 eager student ceed
live live-ceed-100 100 eager student ceed
live live-ceed-0 0 eager student ceed
# Each decoder at its own latency on this machine, by `ceed-vla eval --timing_chunks`: token by token with torch, early exit
# in the exported engine.
live live-ar-own "${AR_MS:-84}" eager teacher ar
live live-ceed-own "${CEED_MS:-13}" edge student ceed
# Beside the environment that waits, if `libero_harness.sh sync sync-ceed` ran before.
if [ -e "$out/sync-ceed" ]; then
  .venv/bin/python -m benchmarks.harness.results --runs "$out" --output "$out/report" --reference sync-ceed
fi
