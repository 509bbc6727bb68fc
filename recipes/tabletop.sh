#!/usr/bin/env bash
# The shipped tabletop teacher and students from nothing: record, train, collect, distil, evaluate (times: README.md).
# Every step goes on where an interrupt left it: run the script again.
#
#   bash recipes/tabletop.sh [OUTPUT_FOLDER]                    # everything
#   TEACHER=teacher bash recipes/tabletop.sh [OUTPUT_FOLDER]    # students of the shipped teacher, or of any checkpoint
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/tabletop}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

record() { # name mode episodes seed
  ceed-vla record --resume true --root "$out/data/$1" --mode "$2" --episodes "$3" --seed "$4" "${@:5}"
}
started() { [ -e "$out/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$out/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }

# 1. Demonstrations: two processes side by side, one thread each.
(record perturb0 perturb 1000 1000; record clean clean 300 0) &
record perturb1 perturb 1200 3000
wait $! # with its exit status: a plain wait would hide a failure
demos="$out/data/clean,$out/data/perturb0,$out/data/perturb1"

# 2. The teacher, in two runs of two processes each: action-free grounding scenes, then all with three takeover (DAgger)
#    rounds; then on from there at half the learning rate, with takeovers of the first run and two more rounds.
teacher=${TEACHER:-$out/teacher/checkpoints/final}
takeovers() { # name policy seed seed
  record "${1}0" takeover 480 "$3" --policy_path "$2" &
  record "${1}1" takeover 480 "$4" --policy_path "$2"
  wait $!
}
train() { # name, and what differs
  finished "$1" || torchrun --nproc_per_node 2 -m ceed_vla.cli train --output_dir "$out/$1" \
    --grounding_roots "$out/data/ground0,$out/data/ground1" --grounding_batch 16 --takeover_episodes 400 \
    --save_every 100 --threads 1 --resume "$(started "$1")" "${@:2}"
}
if [ -z "${TEACHER:-}" ]; then
  record ground0 grounding 8000 6000 &
  record ground1 grounding 9000 18000
  wait $!
  train first --roots "$demos" --grounding_steps 700 --steps 4000 --rounds 3 --lr 2e-3
  takeovers early "$out/first/checkpoints/final" 31000 32000
  train teacher --policy_path "$out/first/checkpoints/final" --roots "$demos,$out/data/early0,$out/data/early1" \
    --root_weights 0.08,0.3,0.37,0.125,0.125 --grounding_steps 0 --steps 3600 --rounds 2 --takeover_seed 33000 \
    --lr 1e-3 --muon_lr 1e-3
fi

# 3. Takeovers of it, and its Jacobi trajectories on these and the demonstrations; two processes share the shards.
takeovers takeover "$teacher" 35000 36000
roots="$demos,$out/data/takeover0,$out/data/takeover1"
collect() { # shard
  ceed-vla collect --policy_path "$teacher" --roots "$roots" --output_dir "$out/trajectories" \
    --max_frames 20000 --num_shards 2 --shard_index "$1" --resume true
}
collect 0 &
collect 1
wait $!

# 4. Students: both losses, three seeds each, the same number of steps; two runs side by side, one thread each. Their exit
#    is what the validation of step 5 chose.
student() { # loss seed
  local states=""
  [ "$1" = paper ] && states="--states stored --omega 1"
  finished "student_$1_$2" || ceed-vla distill --teacher_path "$teacher" --trajectories.path "$out/trajectories" \
    --roots "$roots" --output_dir "$out/student_$1_$2" --seed "$2" --resume "$(started "student_$1_$2")" \
    --steps 1000 --lr 5e-4 --muon_lr 5e-4 --max_iterations 3 --confidence 0.2 --threads 1 --loss "$1" $states
}
student trust_region 0 &
student trust_region 1
wait $!
student trust_region 2 &
student paper 0
wait $!
student paper 1 &
student paper 2
wait $!

# 5. The exit rule, on validation seeds; then all of them against the teacher on the same 400 evaluation seeds.
rules=cap2,conf0.1_cap2,conf0.2_cap2,conf0.3_cap2,conf0.1_cap3,conf0.2_cap3,conf0.3_cap3
for run in trust_region_0 trust_region_1 trust_region_2; do
  ceed-vla eval --policy.path "$out/student_$run/checkpoints/final" --env tabletop --decoders $rules \
    --episodes 360 --seed 40000 --timing_chunks 0 --output_dir "$out/validate_$run"
done
for run in trust_region_0 trust_region_1 trust_region_2 paper_0 paper_1 paper_2; do
  ceed-vla eval --policy.path "$out/student_$run/checkpoints/final" --teacher.path "$teacher" --env tabletop \
    --decoders jacobi,ceed,cap1,cap2,cap3,conf0.2_cap2 --episodes 400 --seed 50000 --timing_chunks 0 \
    --output_dir "$out/evaluate_$run"
done
