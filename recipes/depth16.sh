#!/usr/bin/env bash
# What axes of depth, drafts and choice save on the student of 16 layers of `smollm2.sh`, each beside its control. Needs that
# script's outputs, also those of LAYERS=8. After an interrupt run the script again: it resumes. Every step writes its begin
# into log.txt.
#
#   bash recipes/depth16.sh [OUTPUT_FOLDER]    # OUTPUT_FOLDER of smollm2.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/smollm2} data=${DATA:-outputs/tabletop/data}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
axes=$out/16/axes student=$out/16/student/checkpoints/final cut=$out/8/student/checkpoints/final
reached="$data/perturb1,$data/takeover0,$data/drift0"
for policy in "$student" "$cut"; do
  [ -e "$policy/pretrained_model/model.safetensors" ] || { echo "$policy is missing: run recipes/smollm2.sh first, also with LAYERS=8" >&2; exit 1; }
done
mkdir -p "$axes"
begin() { echo "$(date -u +%FT%TZ) $*" | tee -a "$axes/log.txt"; }
evaluated() { # folder decoders: whether it has results of them all
  grep -qs '"complete": true' "$1/report.json" || return 1
  for decoder in ${2//,/ }; do
    grep -qF "\"$decoder\": {" "$1/report.json" || { echo "$1 lacks $decoder: remove it, and run the script again" >&2; exit 1; }
  done
}
evaluate() { # name checkpoint seed episodes decoders [flags instead of those of an evaluation that is not timed]
  local more=(--timing_chunks 0 --workers 2 --threads 1)
  ! evaluated "$axes/$1" "$5" || return 0
  [ $# -le 5 ] || more=("${@:6}")
  begin "$1"
  ceed-vla eval --policy.path "$2" --decoders "only=$5" --episodes "$4" --seed "$3" --clips false "${more[@]}" \
    --output_dir "$axes/$1" --resume "$([ -e "$axes/$1/episodes.jsonl" ] && echo true || echo false)"
}

# 1. The student's own trajectories, and exits at three depths: with a layer of their own (Balcony), linear ones, and linear ones
#    for drafts, which read verified tokens alone. `deer` compares the linear ones with those one layer earlier. The model's
#    weights do not change, bit for bit.
[ -e "$axes/collected" ] || {
  begin collect
  ceed-vla collect --policy.path "$student" --roots "$reached" --output_dir "$axes/trajectories" --max_frames 2000 --workers 2 \
    --threads 1 --resume true
  touch "$axes/collected"
}
beside() { # command name [other flags]
  [ -e "$axes/$2/$1.json" ] || { # it is written last
    begin "$2"
    ceed-vla "$1" --policy.path "$student" --output_dir "$axes/$2" --roots "$reached" --trajectories.path "$axes/trajectories" \
      --threads 2 --save_every 20 --resume "$([ -e "$axes/$2/unfinished/progress.json" ] && echo true || echo false)" "${@:3}"
  }
  cmp "$student/pretrained_model/model.safetensors" "$axes/$2/model.safetensors"
}
beside exits exits_layer --layers "[4,8,12]" --kind layer --lr 5e-4 --steps 240
beside exits exits_linear --layers "[4,7,8,11,12]" --steps 240
beside exits exits_drafts --layers "[4,8,12]" --reads fixed_points --steps 240

# 2. The layers that matter least, for the control: one fixed program for all chunks; and a router of the programs.
beside route route --programs 8 --search_frames 32 --harm 0.1
skips=$(python - "$axes/route/route.json" <<'END'
import json, sys

all_layers, *shorter = [set(p.split("-")) for p in json.load(open(sys.argv[1]))["programs"]]
print(",".join(f"skip{'-'.join(sorted(all_layers - p, key=int))}p0.4_conf0.4_cap2" for p in shorter[1::2]))
END
)

# 3. Thresholds on choice seeds. `cut` has the first 8 layers, trained by the same recipe. An exit with a layer of its own
#    serves schedules alone: a decoding cannot end there.
rules=ceed,cap1,cap2_fresh,deer8t1_conf0.4_cap2,deer12t1_conf0.4_cap2
rules+=,sure4p0.4_conf0.4_cap2,sure8p0.4_conf0.4_cap2,sure8p0.6_conf0.4_cap2,sure12p0.4_conf0.4_cap2
evaluate choose_linear "$axes/exits_linear" 40000 100 $rules
schedules=depth4_cap2_fresh,depth8_cap2_fresh,depth12_cap2_fresh # exits with a layer of their own read one depth alone
for kind in layer linear; do
  evaluate "choose_schedule_$kind" "$axes/exits_$kind" 40000 100 $schedules
done
evaluate choose_skip "$axes/route" 40000 100 "route0.4_conf0.4_cap2,$skips"
evaluate choose_cut "$cut" 40000 100 ceed,cap1,cap2_fresh

# 4. Exact drafts against the faster of token by token and Jacobi on the executed steps: tokens are equal, so only time differs.
evaluate drafts "$axes/exits_drafts" 44000 10 ar_h,jacobi_h,del_h,spec4x6_h,spec8x6_h,spec12x6_h --timing_chunks 60 --workers 1 --threads 2

# 5. A promised risk, and plans within budgets.
[ -e "$axes/calibrate/checkpoint/config.json" ] || {
  begin calibrate
  ceed-vla calibrate --policy.path "$axes/exits_linear" --output_dir "$axes/calibrate" --signals "[conf,sure8]" \
    --epsilons "[0.1]" --episodes 60 --batch 10 --workers 2 --threads 1 --resume true
}
[ -e "$axes/tune/checkpoint/config.json" ] || {
  begin tune
  ceed-vla tune --policy.path "$axes/exits_linear" --output_dir "$axes/tune" --save true --population 8 --generations 2 \
    --episodes 8 --chunks 12 --threads 2 --resume true
}

# 6. The table: success on evaluation seeds, once, and milliseconds in turns, for the decoders chosen above. Timing needs a quiet
#    machine. Set CHOSEN, CHOSEN_LAYER and CHOSEN_SKIP from the files in step 3.
[ -n "${CHOSEN:-}" ] && [ -n "${CHOSEN_LAYER:-}" ] && [ -n "${CHOSEN_SKIP:-}" ] || { begin "choose CHOSEN, CHOSEN_LAYER and CHOSEN_SKIP, then run the script again"; exit 0; }
#    All rows run eagerly, as exits in depth have no other engine; `time_fastest` has the others in their fastest one. Exits with a
#    layer of their own also run it on the prefix, for every decoder of their checkpoint: compare with `ceed` of table_linear.
timed="--timing_chunks 60 --workers 1 --threads 2"
for pair in "linear exits_linear $CHOSEN" "layer exits_layer cap2_fresh,$CHOSEN_LAYER" "skip route $CHOSEN_SKIP"; do
  read -r name folder decoders <<<"$pair"
  reuse=
  [ "$name" = linear ] || reuse="--reuse $axes/table_linear"
  # shellcheck disable=SC2086 # the flags are separate words
  evaluate "table_$name" "$axes/$folder" 50000 200 "ceed,$decoders,teacher_ceed,teacher_cap1" --teacher.path "$cut" $timed $reuse
done
# shellcheck disable=SC2086 # the flags are separate words
evaluate time_fastest "$axes/exits_linear" 44000 10 "ceed,$CHOSEN,teacher_ceed,teacher_cap1" --teacher.path "$cut" $timed --engine fastest
evaluate table_risk "$axes/calibrate/checkpoint" 50000 200 risk0.1
evaluate table_plans "$axes/tune/checkpoint" 50000 200 plan
python recipes/pairs.py "$axes"/table_linear:teacher_ceed "$axes"/table_* --picture docs/images/depth-16.png | tee "$axes/pairs.md"
python recipes/pairs.py "$axes"/table_linear:ceed "$axes"/table_* | tee -a "$axes/pairs.md"
begin end
