"""What real episodes cost on a Ray cluster against local processes, with equally many workers.

    python -m benchmarks.cluster_cost --workers 2 --rounds 6 --episodes 40

Both kinds of workers are started before the first episode, and rounds of the same tabletop episodes
alternate between them, so that a machine that becomes slower does so for both. It prints the time
per episode of every round, and the ratio of the two with a 95 % interval over the pairs of rounds.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from scipy import stats

from ceed_vla.sim.environment import EnvPool
from ceed_vla.sim.evaluation import batch_runner, batches, load_bundles, rows_of
from ceed_vla.sim.evaluation_config import EvalConfig
from ceed_vla.workers import ClusterConfig, open_workers
from ceed_vla.workers.nodes import connect

FIRST_SEED = 40000


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6, help="of each kind of workers, at least 2")
    parser.add_argument("--episodes", type=int, default=40, help="of a round")
    parser.add_argument("--batch", type=int, default=1, help="episodes that a worker is given")
    options = parser.parse_args()
    if options.workers < 2 or options.rounds < 2:
        parser.error("--workers and --rounds must be at least 2: one worker is this process itself")
    config = EvalConfig(
        decoders="only=ceed",
        workers=options.workers,
        batch=options.batch,
        episodes=options.episodes,
        seed=FIRST_SEED,
    )
    config.policy.path = "student"
    row = rows_of(config, load_bundles(config))[0]
    items = [(row, episodes) for episodes in batches(config)]
    connect("local", options.workers)
    ray = ClusterConfig("local", options.workers)
    took: dict[str, list[float]] = {"local processes": [], "Ray": []}
    with (
        EnvPool(options.batch, config.env, config.instruction) as pool,
        open_workers(options.workers, ClusterConfig(), batch_runner, config, pool) as local,
        open_workers(
            options.workers, ray, batch_runner, config, pool, checkpoints=config.paths
        ) as shared,
    ):
        kinds = {"local processes": local, "Ray": shared}
        for workers in kinds.values():
            list(workers.stream(items[: options.workers]))  # models are loaded
        print("| round | workers | [ms] per episode | solved |\n| -- | -- | -- | -- |")
        for number in range(options.rounds):
            for name in sorted(kinds, reverse=bool(number % 2)):
                began = time.perf_counter()
                solved = [result.success for _, result in kinds[name].stream(items)]
                took[name].append((time.perf_counter() - began) / len(solved))
                print(f"| {number} | {name} | {1e3 * took[name][-1]:.1f} | {sum(solved)} |")
    ratios = np.log(np.array(took["Ray"]) / np.array(took["local processes"]))
    half = stats.t.ppf(0.975, len(ratios) - 1) * ratios.std(ddof=1) / np.sqrt(len(ratios))
    low, middle, high = np.exp([ratios.mean() - half, ratios.mean(), ratios.mean() + half])
    print(f"Ray takes {middle:.3f} [{low:.3f}, {high:.3f}] of the time of local processes.")


if __name__ == "__main__":
    main()
