#!/usr/bin/env bash
# Meta-World's MT10 from scratch on two cores: records demonstrations, trains a teacher on grounding before actions, distils
# three students and evaluates them. Needs the extra `metaworld`. After an interrupt run the script again: every step resumes.
#
#   bash recipes/metaworld_mt10.sh [OUTPUT_FOLDER]
#   EPISODES=1000 SCENES=24000 STEPS=6000 bash recipes/metaworld_mt10.sh    # more data and steps
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/mt10}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
env=--env.type=ceed_metaworld

record() { # name mode episodes seed [other flags]
  ceed-vla record $env --resume true --workers 2 --root "$out/data/$1" --mode "$2" --episodes "$3" --seed "$4" "${@:5}"
}
started() { [ -e "$out/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$out/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }

# 1. Record scenes without actions, and demonstrations with bursts of random steps.
record ground grounding "${SCENES:-12000}" 6000 --poses_per_scene 1
record balls grounding "${BALLS:-8000}" 18000 --poses_per_scene 1 --env.task reach-v3,pick-place-v3 # goals in the air
record perturb perturb "${EPISODES:-440}" 1000
demos="$out/data/perturb" takeover="$out/first/takeover/round_0"

# 2. Train a teacher in two runs. Run `first` trains grounding before any action and ends with one takeover round (DAgger). Run
#    `second` continues at half the learning rate. GATE leaves room for two tasks whose goals are balls of 3 px in the air
#    (metaworld_mt10.md).
train() { # name [other flags]
  finished "$1" || torchrun --standalone --nproc_per_node 2 -m ceed_vla.cli train $env --output_dir "$out/$1" \
    --grounding_roots "$out/data/ground,$out/data/balls" --threads 1 --resume "$(started "$1")" --validate_episodes 40 "${@:2}"
}
train first --roots "$demos" --grounding_steps 1500 --grounding_gate "${GATE:-0.06}" --steps "${STEPS:-2600}" --rounds 1 \
  --takeover_episodes 200 --lr 2e-3 --policy.label_sigma 1.8 --policy.augment_shift 0 --policy.augment_brightness 0
train second --policy.path "$out/first/checkpoints/final" --grounding_steps 0 --steps "${MORE_STEPS:-1700}" --rounds 0 \
  --roots "$demos,$takeover" --root_weights 0.7,0.3 --lr 1e-3 --muon_lr 1e-3

# 3. Record 600 takeovers from this teacher, and 600 from its first student with one forward per chunk: the states that policies
#    reach by themselves decide the result. The teacher continues to train with the expert's corrections in both. The students
#    train on all data.
distill() { # name teacher trajectories roots steps [other flags]
  finished "$1" || torchrun --standalone --nproc_per_node 2 -m ceed_vla.cli distill $env --teacher.path "$2" --trajectories.path "$out/$3" \
    --roots "$4" --output_dir "$out/$1" --steps "$5" --omega 10 --lr 1e-3 --muon_lr 1e-3 --max_updates 1 --max_iterations 2 \
    --confidence 0.2 --threads 1 --validate_episodes 0 --resume "$(started "$1")" "${@:6}"
}
collect() { # name teacher roots
  ceed-vla collect --policy.path "$2" --roots "$3" --output_dir "$out/$1" --states false --max_frames 60000 --workers 2 --resume true
}
drive() { # name seed policy [other flags]
  record "$1" takeover 600 "$2" --policy.path "$3" --max_chunks 40 --takeover_steps 150 --batch 20 "${@:4}"
}
second=$out/second/checkpoints/final teacher=$out/teacher/checkpoints/final
drive driven 31000 "$second"
collect trajectories_second "$second" "$demos,$takeover,$out/data/driven"
distill first_student "$second" trajectories_second "$demos,$takeover,$out/data/driven" 1000
drive drift 33000 "$out/first_student/checkpoints/final" --decoding cap1
seen="$demos,$takeover,$out/data/driven,$out/data/drift"
train teacher --policy.path "$second" --grounding_steps 0 --steps "${LAST_STEPS:-2400}" --rounds 0 \
  --roots "$seen" --root_weights 0.4,0.1,0.25,0.25 --lr 1e-3 --muon_lr 1e-3
collect trajectories "$teacher" "$seen"
student() { [ "$1" = 0 ] && echo student || echo "student_$1"; } # scripts/weights_wheel.py packs `student`
for seed in ${SEEDS:-0 1 2}; do
  distill "$(student "$seed")" "$teacher" trajectories "$seen" 2500 --seed "$seed"
done

# 4. Measure the teacher's localisation errors, and evaluate all policies in closed loop with 50 episodes per task.
ceed-vla grounding $env --policy.path "$teacher" --output "$out/grounding.json"
for seed in ${SEEDS:-0 1 2}; do
  run=$(student "$seed") of_teacher=(); [ "$seed" != 0 ] || of_teacher=(--teacher.path "$teacher")
  ceed-vla eval $env --policy.path "$out/$run/checkpoints/final" "${of_teacher[@]}" --episodes 500 --seed 50000 \
    --decoders jacobi,ceed,cap1 --timing_chunks 0 --workers 2 --output_dir "$out/evaluate/$run" --resume true
done
