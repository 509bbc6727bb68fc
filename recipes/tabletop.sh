#!/usr/bin/env bash
# The tabletop teacher and students from nothing: record, train, collect, distil, evaluate. On two cores without bfloat16
# instructions, recording took 6 minutes and the teacher 90; nobody has run steps 3 to 5 with this teacher yet (README.md).
# Every step goes on where an interrupt left it: run the script again.
#
#   [TEACHER=CHECKPOINT] bash recipes/tabletop.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/tabletop}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

record() { ceed-vla record --resume true --root "$out/data/$1" --mode "$2" --episodes "$3" --seed "$4"; }
started() { [ -e "$out/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$out/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }

# 1. Demonstrations and action-free grounding scenes: two processes side by side, one thread each.
(record perturb0 perturb 1000 1000; record clean clean 300 0; record ground0 grounding 8000 6000) &
(record perturb1 perturb 1200 3000; record ground1 grounding 9000 18000)
wait $! # with its exit status: a plain wait would hide a failure
demos="$out/data/clean,$out/data/perturb0,$out/data/perturb1"

# 2. The teacher, with three takeover (DAgger) rounds; two processes.
if [ -z "${TEACHER:-}" ]; then
  finished teacher || torchrun --nproc_per_node 2 -m ceed_vla.cli train \
    --roots "$demos" --grounding_roots "$out/data/ground0,$out/data/ground1" --output_dir "$out/teacher" \
    --grounding_steps 700 --steps 4000 --grounding_batch 16 --rounds 3 --takeover_episodes 400 --lr 2e-3 \
    --save_every 100 --threads 1 --resume "$(started teacher)"
  teacher="$out/teacher/checkpoints/final" roots="$demos$(printf ",%s" "$out"/teacher/takeover/round_?_?)"
else # a teacher that is there already: only takeovers of it are missing
  takeover() {
    ceed-vla record --resume true --root "$out/data/takeover$1" --mode takeover --policy_path "$TEACHER" --episodes 480 \
      --seed "$2"
  }
  (takeover 0 31000) & (takeover 1 32000)
  wait $!
  teacher="$TEACHER" roots="$demos,$out/data/takeover0,$out/data/takeover1"
fi

# 3. Its Jacobi trajectories on demonstrations and takeovers; two processes share the shards.
collect() {
  ceed-vla collect --policy_path "$teacher" --roots "$roots" --output_dir "$out/trajectories" \
    --max_frames 20000 --num_shards 2 --shard_index "$1" --resume true
}
collect 0 & collect 1
wait $!

# 4. Students: both losses, three seeds each, the same number of steps; two runs side by side, one thread each.
student() { # loss seed
  local states=""
  [ "$1" = paper ] && states="--states stored --omega 1"
  finished "student_$1_$2" || ceed-vla distill --teacher_path "$teacher" --trajectories.path "$out/trajectories" \
    --roots "$roots" --output_dir "$out/student_$1_$2" --seed "$2" --resume "$(started "student_$1_$2")" \
    --steps 1000 --lr 5e-4 --muon_lr 5e-4 --threads 1 --loss "$1" $states
}
student trust_region 0 & student trust_region 1
wait $!
student trust_region 2 & student paper 0
wait $!
student paper 1 & student paper 2
wait $!

# 5. All of them against the teacher, on the same 400 evaluation seeds.
for run in trust_region_0 trust_region_1 trust_region_2 paper_0 paper_1 paper_2; do
  ceed-vla eval --policy.path "$out/student_$run/checkpoints/final" --teacher.path "$teacher" --env tabletop \
    --decoders jacobi,ceed,cap1,cap2,cap3 --episodes 400 --seed 50000 --output_dir "$out/eval_$run"
done
