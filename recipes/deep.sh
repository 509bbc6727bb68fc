#!/usr/bin/env bash
# A teacher of 12 layers from the shipped one of 4, to see what depth is worth: grow, train on (67 minutes on a slow core).
# It takes the data sets of `tabletop.sh` and goes on where an interrupt left it.
#
#   bash recipes/deep.sh [OUTPUT_FOLDER]    # the folder of tabletop.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/tabletop}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
started() { [ -e "$out/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$out/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }
data="$out/data"
roots="$data/clean,$data/perturb0,$data/perturb1,$data/takeover0,$data/takeover1"

# 1. Behind every layer two that add nothing yet; then the teacher's second run again, shorter.
[ -e "$out/grown/config.json" ] || python recipes/grow.py teacher "$out/grown" 3
finished deep_teacher || ceed-vla train --output_dir "$out/deep_teacher" --policy_path "$out/grown" --roots "$roots" \
  --root_weights 0.08,0.3,0.37,0.125,0.125 --grounding_roots "$data/ground0,$data/ground1" --grounding_batch 8 \
  --grounding_steps 0 --steps 1100 --rounds 0 --lr 4e-4 --muon_lr 4e-4 --save_every 100 --threads 1 \
  --resume "$(started deep_teacher)"
