#!/usr/bin/env bash
# Trains the shipped tabletop teacher and student_all_tokens from scratch: record, train, collect, distil, evaluate (times:
# README.md). context.sh makes student from it.
# After an interrupt run the script again: every step resumes.
#
#   bash recipes/tabletop.sh [OUTPUT_FOLDER]                    # everything
#   TEACHER=teacher bash recipes/tabletop.sh [OUTPUT_FOLDER]    # only students, of the shipped teacher or of any checkpoint
#   DATA_ONLY=true bash recipes/tabletop.sh [OUTPUT_FOLDER]     # only the datasets, with the shipped teacher and student
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/tabletop}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

set -m # every job gets its own process group
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done' EXIT # end all jobs after an interrupt or a failure

record() { # name mode episodes seed
  ceed-vla record --resume true --root "$out/data/$1" --mode "$2" --episodes "$3" --seed "$4" "${@:5}"
}
started() { [ -e "$out/$1/progress.json" ] && echo true || echo false; }
wait_all() { # unlike a plain wait, fails if a job failed
  local job
  for job in $(jobs -p); do wait "$job"; done
}
finished() { [ -e "$out/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }

# 1. Record demonstrations and grounding scenes with two processes in parallel, one thread each.
(record perturb0 perturb 1000 1000; record clean clean 300 0) &
record perturb1 perturb 1200 3000 &
wait_all
if [ -z "${TEACHER:-}" ]; then # for a teacher, and for deep.sh
  record ground0 grounding 8000 6000 &
  record ground1 grounding 9000 18000 &
  wait_all
fi
demos="$out/data/clean,$out/data/perturb0,$out/data/perturb1"

# 2. Train the teacher in two runs of two processes each. Run `first` trains on grounding scenes without actions, then on
#    all data with three takeover (DAgger) rounds. Run `teacher` continues at half the learning rate, with takeovers from
#    run `first` and two more rounds.
teacher=${TEACHER:-$out/teacher/checkpoints/final}
takeovers() { # name policy seed seed [attempts decoding]
  record "${1}0" takeover "${5:-480}" "$3" --policy.path "$2" --decoding "${6:-ar}" &
  record "${1}1" takeover "${5:-480}" "$4" --policy.path "$2" --decoding "${6:-ar}" &
  wait_all
}
if [ -n "${DATA_ONLY:-}" ]; then
  takeovers takeover teacher 35000 36000
  takeovers drift student 37000 38000 960 cap1
  exit 0
fi
train() { # name [other flags]
  finished "$1" || torchrun --standalone --nproc_per_node 2 -m ceed_vla.cli train --output_dir "$out/$1" \
    --grounding_roots "$out/data/ground0,$out/data/ground1" --grounding_batch 16 --takeover_episodes 400 \
    --save_every 100 --threads 1 --resume "$(started "$1")" "${@:2}"
}
if [ -z "${TEACHER:-}" ]; then
  train first --roots "$demos" --grounding_steps 700 --steps 4000 --rounds 3 --lr 2e-3 \
    --policy.action_tokens.action_range fixed --policy.action_tokens.action_low "[-1, -1, -1, -0.25, -0.25, -1, -1]" \
    --policy.action_tokens.action_high "[1, 1, 1, 0.25, 0.25, 1, 1]"
  takeovers early "$out/first/checkpoints/final" 31000 32000
  train teacher --policy.path "$out/first/checkpoints/final" --roots "$demos,$out/data/early0,$out/data/early1" \
    --root_weights 0.08,0.3,0.37,0.125,0.125 --grounding_steps 0 --steps 3600 --rounds 2 --takeover_seed 33000 \
    --lr 1e-3 --muon_lr 1e-3
fi

# 3. Record takeovers from the teacher. Collect its Jacobi trajectories on these and on the demonstrations.
takeovers takeover "$teacher" 35000 36000
roots="$demos,$out/data/takeover0,$out/data/takeover1"
collect() { # name roots [other flags]
  ceed-vla collect --policy.path "$teacher" --roots "$2" --output_dir "$out/$1" --workers 2 --resume true "${@:3}"
}
collect trajectories "$roots" --max_frames 20000

# 4. Distil a first student, and record the states that it reaches with one forward per chunk.
distill() { # name trajectories roots [other flags]
  finished "$1" || ceed-vla distill --teacher.path "$teacher" --trajectories.path "$out/$2" --roots "$3" \
    --output_dir "$out/$1" --resume "$(started "$1")" --max_iterations 2 --confidence 0.2 --threads 1 "${@:4}"
}
first_student() { # loss seed [other flags]
  distill "first_student_$1_$2" trajectories "$roots" --loss "$1" --seed "$2" --steps 1000 --lr 5e-4 --muon_lr 5e-4 "${@:3}"
}
first_student trust_region 0
takeovers drift "$out/first_student_trust_region_0/checkpoints/final" 37000 38000 960 cap1

# 5. Distil the students with three seeds on all frames, including the first student's. The exit set here was chosen by step 6.
wide="$roots,$out/data/drift0,$out/data/drift1"
collect trajectories_wide "$wide" --states false --max_frames 0
student() { # seed
  distill "student_$1" trajectories_wide "$wide" --seed "$1" --steps 2000 --lr 1e-3 --muon_lr 1e-3 --max_updates 1
}
for seed in 0 1 2; do student $seed & done
wait_all

# 6. Compare exit rules on validation seeds. Then evaluate all students and the teacher on the same 400 evaluation seeds.
evaluate() { # name decoders
  ceed-vla eval --policy.path "$out/$1/checkpoints/final" --teacher.path "$teacher" --decoders "$2" \
    --episodes 400 --seed 50000 --timing_chunks 0 --output_dir "$out/evaluate_$1" --resume true
}
rules=cap2,conf0.1_cap2,conf0.2_cap2,conf0.3_cap2,conf0.1_cap3,conf0.2_cap3,conf0.3_cap3
for seed in 0 1 2; do
  ceed-vla eval --policy.path "$out/student_$seed/checkpoints/final" --decoders $rules \
    --episodes 360 --seed 40000 --timing_chunks 0 --output_dir "$out/validate_$seed" --resume true
done
for seed in 0 1 2; do evaluate "student_$seed" jacobi,ceed,cap1,cap2,cap3,conf0.2_cap3; done

# 7. Compare the losses for the model card: three seeds each, equal data and steps.
for seed in 1 2; do first_student trust_region $seed & done
wait_all
for seed in 0 1 2; do first_student paper $seed --states stored --omega 1 & done
wait_all
for run in trust_region_0 trust_region_1 trust_region_2 paper_0 paper_1 paper_2; do
  evaluate "first_student_$run" jacobi,cap1,cap2,cap3,conf0.2_cap2,conf0.2_cap3
done
