#!/usr/bin/env bash
# One part of the GPU benchmark, under 8 minutes on one GPU; it writes outputs/gpu/PART.json.
#
#   benchmarks/gpu.sh wheels     # before, with a package index: downloads into benchmarks/wheels, to copy to the machine
#   benchmarks/gpu.sh PART       # openvla-0.3b openvla-7b pi0fast-0.3b pi0fast-7b curves-n curves-batch ...
#
# The machine needs Python with torch 2.11 and transformers 5; the other packages come from the wheels.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:?name a part; see the head of this file}
python=${PYTHON:-python3}
if [[ $part == wheels ]]; then
    # Pure Python, for any version; the other dependencies of draccus come with torch and transformers.
    exec "$python" -m pip download --quiet --no-deps --dest benchmarks/wheels \
        draccus mergedeep toml typing_inspect mypy_extensions
fi
export PYTHONPATH="outputs/gpu/site${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import draccus' 2>/dev/null; then
    [[ -d benchmarks/wheels ]] || { echo "draccus is missing; run 'benchmarks/gpu.sh wheels' and copy the folder" >&2; exit 2; }
    "$python" -m pip install --quiet --no-index --no-deps --target outputs/gpu/site benchmarks/wheels/*.whl
fi
exec "$python" -m benchmarks.shapes "$part" "outputs/gpu/$part.json" --minutes "${MINUTES:-4}" "${@:2}"
