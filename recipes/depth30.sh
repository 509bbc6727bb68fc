#!/usr/bin/env bash
# What axes of depth, drafts and choice save on the student of 30 layers of `smollm2.sh`, each beside its control. Needs that
# script's outputs, also those of LAYERS=16. After an interrupt run the script again: it resumes.
#
#   bash recipes/depth30.sh [OUTPUT_FOLDER]    # OUTPUT_FOLDER of smollm2.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/smollm2} data=${DATA:-outputs/tabletop/data}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
axes=$out/30/axes student=$out/30/student/checkpoints/final cut=$out/16/student/checkpoints/final
reached="$data/perturb1,$data/takeover0,$data/takeover1"
mkdir -p "$axes"
evaluate() { # name checkpoint seed episodes decoders
  ceed-vla eval --policy.path "$2" --decoders "only=$5" --episodes "$4" --seed "$3" --timing_chunks 0 --clips false --workers 2 \
    --batch 8 --threads 1 --output_dir "$axes/$1" --resume "$([ -e "$axes/$1/episodes.jsonl" ] && echo true || echo false)"
}

# 1. Exits at three depths: with a layer of their own (Balcony), linear ones, and linear ones for drafts, which read verified
#    tokens alone. `deer` compares the linear ones with those one layer earlier. The model's weights do not change.
exits() { # name layers [other flags]
  [ -e "$axes/exits_$1/config.json" ] || ceed-vla exits --policy.path "$student" --output_dir "$axes/exits_$1" --roots "$reached" \
    --layers "$2" --steps 240 --threads 2 "${@:3}"
}
exits layer "[8,15,22]" --kind layer
exits linear "[8,14,15,21,22]"
exits drafts "[8,15,22]" --reads fixed_points

# 2. The layers that matter least, for the control: one fixed program for all chunks; and a router of the programs.
[ -e "$axes/route/route.json" ] || ceed-vla route --policy.path "$student" --roots "$reached" --programs 12 --search_frames 32 \
  --harm 0.1 --output_dir "$axes/route"
skips=$(python - "$axes/route/route.json" <<'END'
import json, sys

all_layers, *shorter = [set(p.split("-")) for p in json.load(open(sys.argv[1]))["programs"]]
print(",".join(f"skip{'-'.join(sorted(all_layers - p, key=int))}p0.2_conf0.2_cap2" for p in shorter[1::2]))
END
)

# 3. Thresholds on choice seeds. `cut` has the first 16 layers, trained by the same recipe (with a drift of its own).
rules=ceed,cap1,sure8p0.2_conf0.2_cap2,sure15p0.2_conf0.2_cap2,sure22p0.2_conf0.2_cap2,deer15t1_conf0.2_cap2,deer22t1_conf0.2_cap2
evaluate choose_linear "$axes/exits_linear" 40000 100 $rules
schedules=cap2_fresh,depth8_cap2_fresh,depth15_cap2_fresh,depth22_cap2_fresh # exits with a layer of their own read one depth alone
for kind in layer linear; do
  evaluate "choose_schedule_$kind" "$axes/exits_$kind" 40000 100 $schedules
done
evaluate choose_skip "$axes/route" 40000 100 "route0.2_conf0.2_cap2,$skips"
evaluate choose_cut "$cut" 40000 100 ceed,cap1

# 4. Exact drafts against the faster of token by token and Jacobi on the executed steps: tokens are equal, so only time differs.
ceed-vla eval --policy.path "$axes/exits_drafts" --decoders only=ar_h,jacobi_h,del_h,spec8x6_h,spec15x6_h,spec22x6_h \
  --episodes 4 --seed 44000 --timing_chunks 60 --threads 2 --clips false --output_dir "$axes/drafts" \
  --resume "$([ -e "$axes/drafts/episodes.jsonl" ] && echo true || echo false)"

# 5. Promised risks, and plans within budgets.
[ -e "$axes/calibrate/calibration.json" ] || ceed-vla calibrate --policy.path "$axes/exits_linear" --output_dir "$axes/calibrate" \
  --signals "[conf,agree,sure15]" --episodes 100 --workers 2 --batch 8 --threads 1
[ -e "$axes/tune/plans.json" ] || ceed-vla tune --policy.path "$axes/exits_linear" --output_dir "$axes/tune" --population 12 --episodes 16 \
  --workers 2 --threads 1
