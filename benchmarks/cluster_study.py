"""What sharing episodes costs by itself: environment and policy sleep as long as LIBERO's take.

    python -m benchmarks.cluster_study --workers 1,2,4,8,16 --episodes 48 --engine ray

A sleeping worker needs no processor, so that a small machine shows what many would do: the time is
that of the engine which starts workers, gives them episodes and collects results. It prints a table
with efficiency and serial fraction (Karp and Flatt's: the share of the work that the measured
speed-up says is not shared).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

from ceed_vla.sim.rollout import EpisodeResult
from ceed_vla.workers import ClusterConfig, open_workers
from ceed_vla.workers.nodes import connect

CHUNKS = 27  # of an episode
POLICY_S = 0.021  # a chunk of the student, eager [s]
STEPS = 105
STEP_S = 0.057  # ours with official images, one read in four [s]
BATCH = 1  # LIBERO has one environment per process


def sleeper(speed: float) -> Callable[[Sequence[int]], Iterator[EpisodeResult]]:
    """Make the function of a worker: seeds -> results, with all sleeps divided by `speed`."""

    def run(seeds: Sequence[int]) -> Iterator[EpisodeResult]:
        for seed in seeds:
            for _ in range(CHUNKS):
                time.sleep(POLICY_S / speed)
                time.sleep(STEP_S * STEPS / CHUNKS / speed)
            forwards = [1] * CHUNKS
            reasons = ["confidence"] * CHUNKS
            yield EpisodeResult(seed, "task", "words", True, STEPS, forwards, reasons)

    return run


def measured(engine: str, workers: int, episodes: int, speed: float) -> tuple[float, float]:
    """Time to start the workers, and time of the episodes [s]."""
    cluster = ClusterConfig("local", workers) if engine == "ray" else ClusterConfig()
    began = time.perf_counter()
    with open_workers(workers, cluster, sleeper, speed) as opened:
        shards = [range(i, min(i + BATCH, episodes)) for i in range(0, episodes, BATCH)]
        list(opened.map([range(0)] * workers))  # every worker has made its function
        ready = time.perf_counter()
        seeds = {result.seed for _, result in opened.stream(shards)}
        assert len(seeds) == episodes
        return ready - began, time.perf_counter() - ready


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", default="1,2,4,8,16")
    parser.add_argument("--episodes", type=int, default=48)
    parser.add_argument("--speed", type=float, default=1.0, help="divides all sleeps")
    parser.add_argument("--engine", choices=("local", "ray"), default="ray")
    options = parser.parse_args()
    counts = [int(word) for word in options.workers.split(",")]
    if options.engine == "ray":
        connect("local", max(counts))  # one cluster for all rows
    alone = CHUNKS * POLICY_S + STEPS * STEP_S  # [s] of an episode
    print(f"An episode sleeps {alone / options.speed:.2f} s; {options.episodes} episodes.")
    print("| workers | start [s] | episodes [s] | ideal [s] | efficiency | serial fraction |")
    print("| -- | -- | -- | -- | -- | -- |")
    for count in counts:
        start, took = measured(options.engine, count, options.episodes, options.speed)
        whole = options.episodes * alone / options.speed
        ideal = -(-options.episodes // count) * alone / options.speed
        serial = (took / whole - 1 / count) / (1 - 1 / count) if count > 1 else None
        fraction = "" if serial is None else f"{100 * serial:.2f} %"
        print(
            f"| {count} | {start:.1f} | {took:.1f} | {ideal:.1f} | {100 * ideal / took:.1f} % | "
            f"{fraction} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
