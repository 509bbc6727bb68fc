#!/usr/bin/env bash
# LIBERO-object from scratch on two cores: records demonstrations of the scripted expert, trains a teacher, distils three
# students and evaluates them on the official initial states. Needs the extra `libero`. After an interrupt run the script
# again: every step resumes.
#
#   bash recipes/libero.sh [OUTPUT_FOLDER]
#   bash recipes/libero.sh eval [FOLDER]    # only evaluate a teacher and a student, on one task, in minutes
set -euo pipefail
cd "$(dirname "$0")/.."
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
if [ "${1:-}" = eval ]; then
  weights=${2:-weights/libero_object}
  exec ceed-vla eval --env.type=ceed_libero --env.task libero_object/0 --policy.path "$weights/student" \
    --teacher.path "$weights/teacher" --decoders only=teacher_ar,ceed --episodes 10 --seed 50000 --workers 2 --output_dir outputs/libero-pair \
    --resume true
fi
out=${1:-outputs/libero}
# Data, training and choices use initial states that are sampled anew, never the official ones.
trap 'jobs -p | xargs -r kill 2>/dev/null || true' EXIT
sampled=(--env.type=ceed_libero --env.states sampled --env.quality fast --env.image_size 96)

record() { # name mode episodes seed [other flags]
  ceed-vla record "${sampled[@]}" --resume true --workers 2 --root "$out/data/$1" --mode "$2" --episodes "$3" --seed "$4" "${@:5}"
}
started() { [ -e "$out/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$out/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }

# 1. Record demonstrations with bursts of random steps.
record perturb perturb "${EPISODES:-200}" 1000
demos=$out/data/perturb

# 2. Train a teacher in two runs: on the demonstrations; then at half the learning rate, also on the expert's corrections of
#    states that the first run's policy reached (DAgger).
train() { # name [other flags]
  finished "$1" || torchrun --standalone --nproc_per_node 2 -m ceed_vla.cli train "${sampled[@]}" --output_dir "$out/$1" --grounding_steps 0 \
    --rounds 0 --validate_episodes 0 --threads 1 --save_every 200 --resume "$(started "$1")" "${@:2}"
}
takeover() { # name seed policy [other flags]
  record "$1" takeover "${TAKEOVERS:-200}" "$2" --policy.path "$3" --max_chunks 25 --takeover_steps 150 "${@:4}"
}
train first --roots "$demos" --steps "${STEPS:-2000}" --lr 2e-3 --policy.augment_shift 1 --policy.augment_brightness 0.1 \
  --policy.action_tokens.action_range fixed --policy.action_tokens.action_low "[-1, -1, -1, -0.125, -0.125, -0.125, -1]" \
  --policy.action_tokens.action_high "[1, 1, 1, 0.125, 0.125, 0.125, 1]"
takeover driven 31000 "$out/first/checkpoints/final"
train teacher --policy.path "$out/first/checkpoints/final" --roots "$demos,$out/data/driven" --root_weights 0.6,0.4 \
  --steps "${MORE_STEPS:-2000}" --lr 1e-3 --muon_lr 1e-3
teacher=$out/teacher/checkpoints/final

# 3. Collect the teacher's Jacobi trajectories; distil a first student, and record the states that it reaches with one forward
#    per chunk; distil the students on all of these.
collect() { # name roots
  ceed-vla collect --policy.path "$teacher" --roots "$2" --output_dir "$out/$1" --states false --max_frames 60000 --workers 2 \
    --resume true
}
distill() { # name trajectories roots steps [other flags]
  finished "$1" || torchrun --standalone --nproc_per_node 2 -m ceed_vla.cli distill "${sampled[@]}" --teacher.path "$teacher" \
    --trajectories.path "$out/$2" --roots "$3" --output_dir "$out/$1" --steps "$4" --lr 1e-3 --muon_lr 1e-3 --max_updates 1 \
    --max_iterations 2 --confidence 0.2 --threads 1 --validate_episodes 0 --resume "$(started "$1")" "${@:5}"
}
collect trajectories_first "$demos,$out/data/driven"
distill first_student trajectories_first "$demos,$out/data/driven" 600
takeover drift 33000 "$out/first_student/checkpoints/final" --decoding cap1
collect trajectories "$demos,$out/data/driven,$out/data/drift"
student() { [ "$1" = 0 ] && echo student || echo "student_$1"; } # scripts/weights_wheel.py packs `student`
for seed in ${SEEDS:-0 1 2}; do
  distill "$(student "$seed")" trajectories "$demos,$out/data/driven,$out/data/drift" "${STUDENT_STEPS:-1500}" --seed "$seed"
done

# 4. Evaluate on the official initial states.
evaluate() { # name episodes [other flags]
  ceed-vla eval --env.type=ceed_libero --policy.path "$out/$1/checkpoints/final" --episodes "$2" --seed 50000 --workers 2 \
    --timing_chunks 0 --output_dir "$out/evaluate/$1" --resume true "${@:3}"
}
evaluate student 500 --teacher.path "$teacher" --decoders only=teacher_ar,ceed
for seed in ${SEEDS:-0 1 2}; do
  [ "$seed" = 0 ] || evaluate "$(student "$seed")" 100 --decoders only=ceed
done
