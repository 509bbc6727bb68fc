#!/usr/bin/env bash
# Trains a student that keeps 8 of its 46 prefix tokens, starting from the shipped student (docs/reports/context.md). Takes
# half an hour on two cores. After an interrupt run the script again: every step except the scorer's training resumes.
#
#   bash recipes/context.sh [OUTPUT_FOLDER] [KEPT_TOKENS] [TRAINING_SEED]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/context} kept=${2:-8} seed=${3:-0}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

record() { # name mode episodes seed [other flags]
  ceed-vla record --resume true --workers 2 --root "$out/$1" --mode "$2" --episodes "$3" --seed "$4" "${@:5}"
}
# 1. Record demonstrations, and the states that the student reaches with one forward per chunk and with its early exit.
record perturb0 perturb 800 1000
record perturb1 perturb 500 3000
record drift0 takeover 960 37000 --policy.path student --decoding cap1
record takeover0 takeover 240 35000 --policy.path student --decoding ceed
seen="$out/perturb1,$out/drift0,$out/takeover0"
roots="$out/perturb0,$seen"

# 2. Train a scorer of the prefix tokens for the frozen student. Collect the student's fixed points, the new student's targets.
[ -e "$out/scored/context.safetensors" ] ||
  ceed-vla context --policy.path student --roots "$seen" --output_dir "$out/scored" --steps 120 --dropped 40
ceed-vla collect --policy.path student --roots "$roots" --output_dir "$out/trajectories" --states false --max_frames 20000 \
  --workers 2 --resume true

# 3. Distil the student that runs the best tokens, and evaluate both students on the same episodes.
run="$out/kept${kept}_$seed"
resume=$([ -e "$run/progress.json" ] && echo true || echo false)
[ -e "$run/checkpoints/final/pretrained_model/model.safetensors" ] ||
  ceed-vla distill --teacher.path "$out/scored" --trajectories.path "$out/trajectories" --roots "$roots" --output_dir "$run" \
    --kept "$kept" --seed "$seed" --steps 800 --lr 1e-3 --muon_lr 1e-3 --max_updates 1 --omega 10 --max_iterations 2 \
    --confidence 0.2 --threads 1 --validate_episodes 0 --resume "$resume"
ceed-vla bench --policy.path "$run/checkpoints/final" --teacher.path student --decoders ceed,teacher_ceed --episodes 400 \
  --seed 50000 --threads 1 --output_dir "$run/bench"
