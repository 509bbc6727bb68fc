#!/usr/bin/env bash
# What running fewer prefix tokens saves where the prefix is long: the policy of 16 layers of `smollm2.sh` with 290 image
# tokens instead of 34, its student, and the tokens of each frame (EXIT) beside as many fixed places, frozen and distilled.
# Needs the outputs of `bash recipes/smollm2.sh`. After an interrupt run the script again: it resumes.
#
#   bash recipes/context16.sh [OUTPUT_FOLDER]    # OUTPUT_FOLDER of smollm2.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/smollm2} data=${DATA:-outputs/tabletop/data} kept=${KEPT:-64}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
coarse=$out/16 fine=$out/16fine
roots="$data/clean,$data/perturb0,$data/perturb1,$data/takeover0,$data/takeover1"
reached="$data/perturb1,$data/takeover0,$data/takeover1"
mkdir -p "$fine"
begin() { echo "$(date -u +%FT%TZ) $*" | tee -a "$fine/log.txt"; }
started() { [ -e "$fine/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$fine/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }
final() { echo "$fine/$1/checkpoints/final"; }

# 1. The teacher with finer images, whose projection of them is new, and a student that runs all of its prefix.
[ -e "$fine/begun/config.json" ] || python recipes/finer_patches.py "$coarse/teacher/checkpoints/final" "$fine/begun"
finished teacher || OMP_NUM_THREADS=2 ceed-vla train --output_dir "$fine/teacher" --policy.path "$fine/begun" \
  --roots "$roots" --root_weights 0.08,0.3,0.37,0.125,0.125 --imitate teacher --grounding_steps 0 --rounds 0 \
  --validate_episodes 0 --steps "${STEPS:-400}" --batch_size 8 --lora.rank 32 --lr 1e-3 --muon_lr 0 --threads 2 --save_every 25 \
  --resume "$(started teacher)"
distill() { # name teacher trajectories roots steps [other flags]
  finished "$1" || {
    begin "$1"
    OMP_NUM_THREADS=2 ceed-vla distill --output_dir "$fine/$1" --teacher.path "$2" \
      --trajectories.path "$3" --roots "$4" --steps "$5" --batch_size 8 --lora.rank 32 --lr 1e-3 --muon_lr 0 --max_updates 1 \
      --max_iterations 2 --confidence 0.4 --eval_every 0 --eval_frames 24 --validate_episodes 0 --threads 2 --save_every 25 \
      --resume "$(started "$1")" "${@:6}"
  }
}
collect() { # name checkpoint roots frames
  [ -e "$fine/$1/collected" ] || {
    begin "$1"
    ceed-vla collect --policy.path "$2" --roots "$3" --output_dir "$fine/$1" --states false --guesses 1,0,0 --max_frames "$4" \
      --workers 2 --threads 1 --resume true
    touch "$fine/$1/collected"
  }
}
finished student || collect trajectories_teacher "$(final teacher)" "$roots" 3000
distill student "$(final teacher)" "$fine/trajectories_teacher" "$roots" 300

# 2. Scorers of the student's prefix tokens: by frame, and the same in all frames. They read its fixed points.
collect trajectories "$(final student)" "$reached" 2000
scorer() { # name [other flags]
  [ -e "$fine/$1/context.json" ] || {
    begin "$1"
    ceed-vla context --policy.path "$(final student)" --output_dir "$fine/$1" --roots "$reached" --trajectories.path "$fine/trajectories" \
      --dropped 240 --steps 120 --batch_size 8 --eval_frames 64 --threads 2 --save_every 20 \
      --resume "$([ -e "$fine/$1/unfinished/progress.json" ] && echo true || echo false)" "${@:2}"
  }
  cmp "$(final student)/pretrained_model/model.safetensors" "$fine/$1/model.safetensors"
}
scorer by_frame
scorer by_place --fixed true

# 3. Students behind both, and behind the whole prefix for as many steps.
own=("$fine/trajectories" "$reached" 100)
distill longer "$(final student)" "${own[@]}"
distill behind_frame "$fine/by_frame" "${own[@]}" --kept "$kept" --kept_by scorer
distill behind_place "$fine/by_place" "${own[@]}" --kept "$kept" --kept_by scorer

# 4. Success on choice seeds, and milliseconds in turns.
evaluate() { # name checkpoint decoders [seed episodes]
  ! grep -qs '"complete": true' "$fine/$1/report.json" || return 0
  begin "$1"
  ceed-vla eval --policy.path "$2" --decoders "only=$3" --episodes "${5:-50}" --seed "${4:-40000}" --timing_chunks 0 --clips false \
    --workers 2 --threads 1 --output_dir "$fine/$1" --resume "$([ -e "$fine/$1/episodes.jsonl" ] && echo true || echo false)"
}
evaluate choose_whole "$(final student)" ceed
evaluate choose_longer "$(final longer)" ceed
for ranking in frame place; do
  evaluate "choose_by_$ranking" "$fine/by_$ranking" "keep${kept}_conf0.4_cap2"
  evaluate "choose_behind_$ranking" "$(final "behind_$ranking")" ceed
done
grep -qs '"complete": true' "$fine/time/report.json" || {
  begin time
  ceed-vla eval --policy.path "$fine/by_frame" --decoders "only=conf0.4_cap2,keep${kept}_conf0.4_cap2" \
    --episodes 10 --seed 44000 --timing_chunks 60 --clips false --threads 2 --output_dir "$fine/time" \
    --resume "$([ -e "$fine/time/episodes.jsonl" ] && echo true || echo false)"
}

# 5. Success on evaluation seeds, once.
for name in student longer behind_frame behind_place; do evaluate "table_$name" "$(final "$name")" ceed 50000 200; done
for ranking in frame place; do
  evaluate "table_by_$ranking" "$fine/by_$ranking" "keep${kept}_conf0.4_cap2" 50000 200
done
python recipes/pairs.py "$fine"/table_student:ceed "$fine"/table_* | tee "$fine/pairs.md"
begin end
