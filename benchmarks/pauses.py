"""Milliseconds of an exported policy after a pause, with and without threads pinned to cores.

    ceed-vla export --policy.path student --output_dir outputs/export
    python -m benchmarks.pauses --export outputs/export

A robot pauses between two chunks. Every pause, decoder and setting `pin` is measured in turns, on
random observations, in this process alone.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict

import numpy as np

from ceed_vla.edge import EdgePolicy
from ceed_vla.edge.observation import random_observation

OBSERVATIONS = 8
SHARES = (10, 50, 95, 99)


def main() -> None:
    parser = argparse.ArgumentParser(description="An export after a pause.")
    parser.add_argument("--export", required=True, help="folder of the export")
    parser.add_argument("--decoders", nargs="+", default=["cap1", "ceed", "ar_h"])
    parser.add_argument("--pauses_ms", nargs="+", type=float, default=[0, 10, 100])
    parser.add_argument("--pins", nargs="+", default=["none", "auto"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=200, help="of every line of the table")
    options = parser.parse_args()
    policies = {pin: EdgePolicy(options.export, options.threads, pin) for pin in options.pins}
    lines = list(itertools.product(options.decoders, options.pauses_ms, options.pins))
    found = defaultdict(list)
    block = 10  # chunks of one line before the next one's turn
    for first in range(-block, options.chunks, block):
        for decoder, pause, pin in lines:
            policy = policies[pin]
            for number in range(block):
                observation = random_observation(policy.settings, number % OBSERVATIONS)
                time.sleep(1e-3 * pause)
                started = time.perf_counter()
                policy.decode(*observation, decoder)
                if first >= 0:  # the first block warms up
                    found[decoder, pause, pin].append(1e3 * (time.perf_counter() - started))
        print(f"\r{first + block} of {options.chunks} chunks", end="", flush=True)
    print("\n| decoder | pause [ms] | pin | cores | p10 / p50 / p95 / p99 [ms] | p99 / p50 |")
    print("| -- | -- | -- | -- | -- | -- |")
    for decoder, pause, pin in lines:
        shares = np.percentile(found[decoder, pause, pin], SHARES)
        cores = ", ".join(map(str, policies[pin].placement.cores)) or "any"
        shown = " / ".join(f"{share:.1f}" for share in shares)
        ratio = shares[3] / shares[1]
        print(f"| `{decoder}` | {pause:g} | {pin} | {cores} | {shown} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
