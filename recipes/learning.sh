#!/usr/bin/env bash
# What learns, on the pair of 12 layers of `deep.sh`: a router of programs (CoLa), exits that learn together with the student
# (Splitformer), and weights that learn by reward (S-GRPO) from states chosen by the variance of the reward (ExIt). Each beside
# its control. Needs the outputs of `TRAIN_ONLY=true bash recipes/deep.sh`. After an interrupt run the script again: it resumes.
# Every evaluation writes its begin into learning.txt.
#
#   bash recipes/learning.sh [OUTPUT_FOLDER]    # OUTPUT_FOLDER of tabletop.sh and deep.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/tabletop}
export MUJOCO_GL=${MUJOCO_GL:-egl} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
started() { [ -e "$out/$1/progress.json" ] && echo true || echo false; }
finished() { [ -e "$out/$1/checkpoints/final/pretrained_model/model.safetensors" ]; }
data="$out/data" teacher="$out/deep_teacher/checkpoints/final" student="$out/deep_student/checkpoints/final"
roots="$data/clean,$data/perturb0,$data/perturb1,$data/takeover0,$data/takeover1"
reached="$data/perturb1,$data/takeover0,$data/takeover1"
begin() { echo "$(date -u +%FT%TZ) $*" | tee -a "$out/learning.txt"; }
evaluated() { # folder only=decoders: whether it has results of them all
  grep -qs '"complete": true' "$1/report.json" || return 1
  local decoders=${2#only=}
  for decoder in ${decoders//,/ }; do
    grep -qF "\"$decoder\": {" "$1/report.json" || { echo "$1 lacks $decoder: remove it, and run the script again" >&2; exit 1; }
  done
}
evaluate() { # name checkpoint seed episodes decoders [flags instead of those of an evaluation that is not timed]
  local more=(--timing_chunks 0 --workers 2)
  ! evaluated "$out/learning/$1" "$5" || return 0
  [ $# -le 5 ] || more=("${@:6}")
  begin "$1"
  ceed-vla eval --policy.path "$2" --decoders "$5" --episodes "$4" --seed "$3" --clips false "${more[@]}" \
    --output_dir "$out/learning/$1" --resume "$([ -e "$out/learning/$1/episodes.jsonl" ] && echo true || echo false)"
}

# 1. Programs by importance, and routers of them for two weights of the error. As controls, the same programs for all chunks.
for harm in 0.1 0.2; do
  [ -e "$out/route_$harm/route.json" ] || ceed-vla route --policy.path "$student" --roots "$reached" --programs 6 \
    --harm "$harm" --threads 2 --output_dir "$out/route_$harm"
  evaluate "route_$harm" "$out/route_$harm" 40000 200 only=route0.2_conf0.2_cap2,route0_cap2
done
fixed=$(python - "$out/route_0.1/route.json" <<'END'
import json, sys

all_layers, *shorter = [set(p.split("-")) for p in json.load(open(sys.argv[1]))["programs"]]
names = [f"skip{'-'.join(sorted(all_layers - p, key=int))}" for p in shorter]
print(",".join(f"{name}p0.2_conf0.2_cap2,{name}p0_cap2" for name in names))
END
)
evaluate skip "$student" 40000 200 "only=ceed,cap1,$fixed"

# 2. The student of deep.sh again, with exits from the first step on: with a coarse branch, and linear ones as control. A
#    second control adds exits of both kinds to the finished student, which learn from as many frames.
joint() { # kind
  finished "joint_$1" || torchrun --standalone --nproc_per_node 2 -m ceed_vla.cli distill --teacher.path "$teacher" \
    --trajectories.online true --roots "$roots" --output_dir "$out/joint_$1" --steps 650 --lr 6e-4 --muon_lr 6e-4 \
    --max_updates 1 --max_iterations 2 --confidence 0.2 --save_every 50 --eval_every 0 --threads 1 --validate_episodes 0 \
    --exits.layers "[3,4]" --exits.kind "$1" --resume "$(started "joint_$1")"
}
for kind in coarse linear; do
  joint "$kind"
  [ -e "$out/after_$kind/config.json" ] || ceed-vla exits --policy.path "$student" --output_dir "$out/after_$kind" \
    --roots "$roots" --layers "[3,4]" --kind "$kind" --steps 650 --batch_size 48 --threads 2
  evaluate "joint_$kind" "$out/joint_$kind/checkpoints/final" 40000 200 only=ceed,sure4p0.2_conf0.2_cap2,sure3p0.2_conf0.2_cap2
  evaluate "after_$kind" "$out/after_$kind" 40000 200 only=ceed,sure4p0.2_conf0.2_cap2,sure3p0.2_conf0.2_cap2
done

# 3. Weights that learn by reward, at equal cost in the simulator: from the starts of episodes, from states that episodes
#    passed, and from those where outcomes differ. `skip` above and `table_route` below have the student as it was.
for starts in first uniform grown; do
  [ "$(tail -n 1 "$out/improve_$starts/done" 2>/dev/null)" = done ] || {
    OMP_NUM_THREADS=2 ceed-vla improve --policy.path "$student" --output_dir "$out/improve_$starts" --decoding cap1 --cap 3 --starts "$starts" \
      --seed 30000 --iterations 1000 --max_control_steps "${CONTROL_STEPS:-120000}" --workers 2 \
      --resume "$([ -e "$out/improve_$starts/improve.json" ] && echo true || echo false)"
    echo done >"$out/improve_$starts/done"
  }
  evaluate "improve_$starts" "$out/improve_$starts/checkpoints/final" 40000 200 only=cap1,ceed
done

# 4. The table: success on evaluation seeds, once, and milliseconds in turns, for the decoders chosen above. Timing needs a quiet
#    machine. Set HARM, CHOSEN_SKIP and CHOSEN_EXIT from the files in $out/learning.
[ -n "${HARM:-}" ] && [ -n "${CHOSEN_SKIP:-}" ] && [ -n "${CHOSEN_EXIT:-}" ] || { begin "choose HARM, CHOSEN_SKIP and CHOSEN_EXIT, then run the script again"; exit 0; }
timed="--timing_chunks 60 --workers 1 --threads 2"
# shellcheck disable=SC2086 # the flags are separate words
{
  evaluate table_route "$out/route_$HARM" 50000 200 "only=ceed,cap1,route0.2_conf0.2_cap2,route0_cap2,$CHOSEN_SKIP" $timed
  for kind in coarse linear; do
    evaluate "table_joint_$kind" "$out/joint_$kind/checkpoints/final" 50000 200 "only=ceed,$CHOSEN_EXIT" $timed
    evaluate "table_after_$kind" "$out/after_$kind" 50000 200 "only=ceed,$CHOSEN_EXIT" $timed
  done
}
for starts in first uniform grown; do
  evaluate "table_improve_$starts" "$out/improve_$starts/checkpoints/final" 50000 200 only=cap1,ceed
done
python recipes/pairs.py "$out"/learning/table_route:ceed "$out"/learning/table_* --picture docs/images/learning-to-exit.png | tee "$out/learning/pairs.md"
begin end
