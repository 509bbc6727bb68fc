#!/usr/bin/env bash
# Accelerate an OpenVLA fine-tune: convert, distil, and compare the decoders, with .venv/bin on the PATH:
#
#     bash examples/openvla.sh [FOLDER]
#
# Everything is made here, tiny, in some two minutes on a CPU core: demonstrations in simulation, a random model in OpenVLA's
# file format, and its fine-tune. With a fine-tune and data of your own, on a GPU, docs/other-vlas.md has the three commands.
# Its folder is read as published, without remote code, and stays as it is.
set -euo pipefail
out=$(realpath -m "${1:-outputs/openvla}") seed=${SEED:-0}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 # more threads only get in each other's way on tiny layers
small=(--batch_size 16 --mixed_precision no --env.type=none --seed "$seed")

python -m benchmarks.models.openvla "$out/model" "$seed"
ceed-vla record --root "$out/data" --episodes 12
ceed-vla record --root "$out/held-out" --episodes 16 --seed 1000

# What has hardly learnt writes nearly the same chunk in every frame, where a warm start has little to gain: 150 steps.
ceed-vla convert --from openvla "$out/model" --output_dir "$out/base" --chunk_size 8 --n_action_steps 4
ceed-vla train --policy.path "$out/base" --roots "$out/data" --output_dir "$out/fine-tune" --steps 150 --lr 2e-3 \
  --muon_lr 1e-2 --warmup 5 --grounding_steps 0 --rounds 0 "${small[@]}"

# The teacher's answers are stored, as the tiny model sees each frame many times; with large data leave collect out, and
# give distill --trajectories.online=true. A small omega: the tiny model has little skill to protect.
teacher="$out/fine-tune/checkpoints/final/pretrained_model" student="$out/student/checkpoints/final/pretrained_model"
ceed-vla collect --policy.path "$teacher" --roots "$out/data" --output_dir "$out/trajectories" --states=false --frame_stride 1
ceed-vla distill --teacher.path "$teacher" --trajectories.path "$out/trajectories" --roots "$out/data" \
  --output_dir "$out/student" --steps 150 --lr 3e-3 --muon_lr 1e-2 --omega 1 --eval_every 0 --eval_frames 16 "${small[@]}"

for part in before after; do # Jacobi forwards to the exact greedy chunk fall from a random and from a warm start
  [ $part = before ] && policy=$teacher || policy=$student
  ceed-vla open-loop --policy.path "$policy" --roots "$out/held-out" --output_dir "$out/$part" \
    --decoders jacobi_random,jacobi,cap2_fresh
done
