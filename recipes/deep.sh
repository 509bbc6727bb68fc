#!/usr/bin/env bash
# Grows the shipped teacher of 4 layers to 12 and distils a student, to measure early exits in depth: grow, train, distil,
# train exits, evaluate. Takes about two hours on two slow cores. Needs the datasets of `tabletop.sh`. After an interrupt
# run the script again: it resumes.
#
#   bash recipes/deep.sh [OUTPUT_FOLDER]    # OUTPUT_FOLDER of tabletop.sh
#   TRAIN_ONLY=true bash recipes/deep.sh [OUTPUT_FOLDER]    # teacher and student alone
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/tabletop}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
started() { [ -e "$out/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$out/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }
data="$out/data" teacher="$out/deep_teacher/checkpoints/final" student="$out/deep_student/checkpoints/final"
roots="$data/clean,$data/perturb0,$data/perturb1,$data/takeover0,$data/takeover1"

# 1. Insert two layers after every layer that initially add nothing. Then repeat the teacher's second run, shorter and with a
#    lower learning rate: at 1e-3 the loss rises.
[ -e "$out/grown/config.json" ] || python recipes/grow.py teacher "$out/grown" 3
finished deep_teacher || torchrun --standalone --nproc_per_node 2 -m ceed_vla.cli train --output_dir "$out/deep_teacher" \
  --policy.path "$out/grown" --roots "$roots" --root_weights 0.08,0.3,0.37,0.125,0.125 \
  --grounding_roots "$data/ground0,$data/ground1" --grounding_batch 8 --grounding_steps 0 --steps 1100 --rounds 0 \
  --lr 4e-4 --muon_lr 4e-4 --save_every 100 --threads 1 --resume "$(started deep_teacher)"

# 2. Distil the student on online trajectories.
finished deep_student || torchrun --standalone --nproc_per_node 2 -m ceed_vla.cli distill --teacher.path "$teacher" \
  --trajectories.online true --roots "$roots" --output_dir "$out/deep_student" --steps 650 --lr 6e-4 --muon_lr 6e-4 \
  --max_updates 1 --max_iterations 2 --confidence 0.2 --save_every 100 --eval_every 0 --threads 1 \
  --resume "$(started deep_student)"

[ "${TRAIN_ONLY:-false}" = false ] || exit 0

# 3. Train exits, choose thresholds on validation seeds, and evaluate on evaluation seeds.
[ -e "$out/deep_exits/config.json" ] || ceed-vla exits --policy.path "$student" --output_dir "$out/deep_exits" \
  --roots "$data/perturb1,$data/takeover0,$data/takeover1" --layers "[3,4,5,6,7,8]" --steps 240 --threads 1
evaluate() { # name seed episodes decoders [other flags]
  ceed-vla eval --policy.path "$out/deep_exits" --decoders "$4" --episodes "$3" --seed "$2" --timing_chunks 0 --threads 1 \
    --output_dir "$out/$1" --resume true "${@:5}"
}
rules=ceed,cap1,deer4t1_conf0.2_cap2,deer4t3_conf0.2_cap2,deer7t1_conf0.2_cap2,deer7t2_conf0.2_cap2,deer7t1_cap1,deer7t2_cap1
sure=sure4p0.2_conf0.2_cap2,sure7p0.2_conf0.2_cap2
evaluate deep_validate 40000 100 $rules
evaluate deep_validate_sure 40000 200 ceed,$sure,sure3p0.2_conf0.2_cap2,sure5p0.2_conf0.2_cap2,sure6p0.2_conf0.2_cap2
evaluate deep_evaluate 50000 400 ar,ceed,cap1,deer7t2_cap1,deer4t3_conf0.2_cap2,deer7t1_conf0.2_cap2,$sure,sure7p0.1_conf0.2_cap2
