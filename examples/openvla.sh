#!/usr/bin/env bash
# Accelerate an OpenVLA fine-tune: convert, distil, and compare the decoders, with .venv/bin on the PATH:
#
#     bash examples/openvla.sh [FOLDER]
#
# The script makes everything, tiny, in some two minutes on a CPU core: demonstrations in simulation, a random model in
# OpenVLA's file format, and its fine-tune. For your own fine-tune and data, on a GPU, docs/how-to/convert-openvla.md has the
# three commands. The model's folder is read as published, without remote code, and does not change.
set -euo pipefail
out=$(realpath -m "${1:-outputs/openvla}") seed=${SEED:-0}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 # more threads are slower on tiny layers
small=(--batch_size 16 --mixed_precision no --env.type=none --seed "$seed")

python -m benchmarks.models.openvla "$out/model" "$seed"
ceed-vla record --root "$out/data" --episodes 12
ceed-vla record --root "$out/held-out" --episodes 16 --seed 1000

# 150 steps: a model that has hardly learnt writes nearly the same chunk in every frame, and a warm start gains little.
ceed-vla convert --from openvla "$out/model" --output_dir "$out/base" --chunk_size 8 --n_action_steps 4
ceed-vla train --policy.path "$out/base" --roots "$out/data" --output_dir "$out/fine-tune" --steps 150 --lr 2e-3 \
  --muon_lr 1e-2 --warmup 5 --grounding_steps 0 --rounds 0 "${small[@]}"

# The teacher's chunks are stored, because the tiny model trains on each frame many times. With large data, leave collect out,
# and set --trajectories.online=true for distill. A small omega: the tiny model has little skill to protect.
teacher="$out/fine-tune/checkpoints/final/pretrained_model" student="$out/student/checkpoints/final/pretrained_model"
ceed-vla collect --policy.path "$teacher" --roots "$out/data" --output_dir "$out/trajectories" --states=false --frame_stride 1
ceed-vla distill --teacher.path "$teacher" --trajectories.path "$out/trajectories" --roots "$out/data" \
  --output_dir "$out/student" --steps 150 --lr 3e-3 --muon_lr 1e-2 --omega 1 --eval_every 0 --eval_frames 16 "${small[@]}"

for part in before after; do # after distillation, fewer Jacobi forwards reach the greedy chunk, from random and warm guesses
  [ $part = before ] && policy=$teacher || policy=$student
  ceed-vla open-loop --policy.path "$policy" --roots "$out/held-out" --output_dir "$out/$part" \
    --decoders jacobi_random,jacobi,cap2_fresh
done
