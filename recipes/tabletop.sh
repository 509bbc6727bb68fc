#!/usr/bin/env bash
# Rebuild the shipped tabletop checkpoints: record, train, collect, distil, evaluate. About two hours on two cores.
# Every step resumes where an interrupt left it: run the script again.
#
#   bash recipes/tabletop.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/tabletop}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 PATH="$PWD/.venv/bin:$PATH"

both() { # run two commands side by side, one thread each
  OMP_NUM_THREADS=1 bash -c "$1" & local first=$!
  OMP_NUM_THREADS=1 bash -c "$2"
  wait "$first"
}

# 1. Demonstrations (a quarter without disturbance) and action-free grounding scenes.
both "ceed-vla record --mode clean --episodes 400 --seed 0 --root $out/data/clean --resume true &&
      ceed-vla record --mode perturb --episodes 800 --seed 1000 --root $out/data/perturb0 --resume true" \
     "ceed-vla record --mode perturb --episodes 1200 --seed 3000 --root $out/data/perturb1 --resume true"
both "ceed-vla record --mode grounding --episodes 12000 --seed 6000 --root $out/data/ground0 --resume true" \
     "ceed-vla record --mode grounding --episodes 12000 --seed 18000 --root $out/data/ground1 --resume true"

# 2. The teacher, with three takeover (DAgger) rounds.
resume=$([ -e "$out/teacher/progress.json" ] && echo true || echo false)
[ -d "$out/teacher/checkpoints/final" ] || ceed-vla train \
  --roots "$out/data/clean,$out/data/perturb0,$out/data/perturb1" \
  --grounding_roots "$out/data/ground0,$out/data/ground1" \
  --output_dir "$out/teacher" --resume "$resume"
