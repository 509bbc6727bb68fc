#!/usr/bin/env bash
# Trains the shipped student, which runs 8 of 46 prefix tokens, from one that runs all of them: in two rounds, with three
# seeds (docs/reports/context.md). Takes two hours on two cores. After an interrupt run the script again: every step except the
# scorer's training resumes.
#
#   bash recipes/context.sh [OUTPUT_FOLDER] [KEPT_TOKENS]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/context} kept=${2:-8}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

set -m # every job gets its own process group
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done' EXIT # end all jobs after an interrupt or a failure

wait_all() { # unlike a plain wait, fails if a job failed
  local job
  for job in $(jobs -p); do wait "$job"; done
}
record() { # name mode episodes seed [other flags]
  ceed-vla record --resume true --workers 2 --root "$out/$1" --mode "$2" --episodes "$3" --seed "$4" "${@:5}"
}
collect() { # name roots frames
  ceed-vla collect --policy.path student_all_tokens --roots "$2" --output_dir "$out/$1" --states false --max_frames "$3" \
    --workers 2 --resume true
}
finished() { [ -e "$out/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }
distil() { # name seed trajectories roots steps
  local resume
  resume=$([ -e "$out/$1/progress.json" ] && echo true || echo false)
  finished "$1" ||
    ceed-vla distill --teacher.path "$out/scored" --trajectories.path "$out/$3" --roots "$4" --output_dir "$out/$1" \
      --kept "$kept" --seed "$2" --steps "$5" --lr 1e-3 --muon_lr 1e-3 --max_updates 1 --omega 10 --max_iterations 2 \
      --confidence 0.2 --threads 1 --validate_episodes 0 --resume "$resume"
}

# 1. Record demonstrations, and the states that the student with all tokens reaches with one forward per chunk and with its early
#    exit.
record perturb0 perturb 800 1000
record perturb1 perturb 500 3000
record drift0 takeover 960 37000 --policy.path student_all_tokens --decoding cap1
record takeover0 takeover 240 35000 --policy.path student_all_tokens --decoding ceed
seen="$out/perturb1,$out/drift0,$out/takeover0"
roots="$out/perturb0,$seen"

# 2. Train a scorer of the prefix tokens for the frozen student. Collect the student's fixed points, the new student's targets.
[ -e "$out/scored/context.safetensors" ] ||
  ceed-vla context --policy.path student_all_tokens --roots "$seen" --output_dir "$out/scored" --steps 120 --dropped 40
collect trajectories "$roots" 20000

# 3. First round: distil the student that runs the best tokens. Record the states that it reaches with one forward.
distil "first_$kept" 0 trajectories "$roots" 800
record drift1 takeover 960 38000 --policy.path "$out/first_$kept/checkpoints/final" --decoding cap1
wide="$roots,$out/drift1"
collect trajectories_wide "$wide" 0

# 4. Second round: distil three students anew on all these states.
for seed in 0 1 2; do
  distil "kept${kept}_$seed" "$seed" trajectories_wide "$wide" 1200 &
  [ "$seed" != 1 ] || wait_all # two at a time
done
wait_all

# 5. Evaluate them and the student with all tokens on the same episodes: choices on seeds from 40000, the table from 50000 once.
for first in 40000 50000; do
  for seed in 0 1 2; do
    ceed-vla eval --policy.path "$out/kept${kept}_$seed/checkpoints/final" --teacher.path student_all_tokens \
      --decoders ceed,cap1,teacher_ceed,teacher_cap1 --episodes 400 --seed "$first" --workers 2 --timing_chunks 0 \
      --clips false --resume true --output_dir "$out/evaluate_${first}_$seed"
  done
done
