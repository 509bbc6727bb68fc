#!/usr/bin/env bash
# Fine-tune SmolVLM as an autoregressive VLA, and distil it to fewer Jacobi iterations, with .venv/bin on the PATH:
#
#     bash examples/smolvlm.sh [FOLDER]
#
# The script makes everything, tiny, in some minutes on a CPU: a random model in SmolVLM's file format, and demonstrations in
# simulation. Other image-text-to-text models work in the same way (LLaVA, LLaVA-OneVision, Qwen2.5-VL, PaliGemma). For a
# downloaded model on a GPU, docs/how-to/fine-tune-an-image-text-model.md has the flags, and docs/reference/memory.md the
# memory that each size needs.
set -euo pipefail
out=$(realpath -m "${1:-outputs/smolvlm}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python -m benchmarks.models.smolvlm "$out/model"
ceed-vla record --root "$out/data" --episodes 12
ceed-vla record --root "$out/held-out" --episodes 8 --seed 1000

# All weights are trained (--lora.rank 32 trains adapters). Muon trains the matrices; with real weights set --muon_lr 0.
ceed-vla train --policy.backbone.type=vlm --policy.backbone.path="$out/model" --policy.auxiliary_scale "[]" \
  --policy.action_tokens.num_bins=63 --roots "$out/data" --output_dir "$out/teacher" --env.type=none --grounding_steps 0 \
  --rounds 0 --steps 250 --batch_size 16 --lr 3e-3 --muon_lr 1e-2 --mixed_precision no

# The teacher's chunks are stored, because the tiny model trains on each frame many times. With large data, leave collect out,
# and set --trajectories.online=true for distill.
teacher="$out/teacher/checkpoints/final/pretrained_model"
ceed-vla collect --policy.path "$teacher" --roots "$out/data" --output_dir "$out/trajectories" --states=false --frame_stride 1
ceed-vla distill --teacher.path "$teacher" --trajectories "$out/trajectories" --roots "$out/data" --output_dir "$out/student" \
  --steps 200 --batch_size 16 --lr 3e-3 --muon_lr 2e-2 --omega 0.3 --eval_every 0 --mixed_precision no --env.type=none

ceed-vla open-loop --policy.path "$teacher" --roots "$out/held-out" --output_dir "$out/before"
ceed-vla open-loop --policy.path "$out/student/checkpoints/final/pretrained_model" --roots "$out/held-out" --output_dir "$out/after"
