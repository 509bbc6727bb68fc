#!/usr/bin/env bash
# LIBERO-object from scratch on two cores: records demonstrations of the scripted expert, trains a teacher, distils three
# students and evaluates them on the official initial states. Needs the extra `libero`. After an interrupt run the script
# again: every step resumes.
#
#   bash recipes/libero.sh [OUTPUT_FOLDER]
#   bash recipes/libero.sh eval            the shipped pair on ten episodes of one task, in minutes
set -euo pipefail
cd "$(dirname "$0")/.."
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
out=${1:-outputs/libero}
# Data, training and choices use initial states that LIBERO draws anew, never the official ones.
drawn=(--env.type=ceed_libero --env.states sampled --env.quality fast --env.image_size 96)

record() { # name mode episodes seed [other flags]
  ceed-vla record "${drawn[@]}" --resume true --workers 2 --root "$out/data/$1" --mode "$2" --episodes "$3" --seed "$4" "${@:5}"
}
started() { [ -e "$out/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$out/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }

# 1. Record demonstrations with bursts of random steps.
record perturb perturb "${EPISODES:-240}" 1000
demos=$out/data/perturb
