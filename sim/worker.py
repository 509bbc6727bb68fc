"""One process's share of an evaluation's episodes, a JSON line each: `python -m sim.worker --worker=0 --workers=2 ...`.

It writes no file. The episodes of `sim.evaluate` that a report in `output_dir` has, are left out with `resume`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ceed_vla.cli import Command, run
from ceed_vla.fields import ranged
from sim.environment import EnvPool
from sim.episode_log import line_of
from sim.evaluate import WORKERS, EvalConfig, prepared, run_episodes


@dataclass
class WorkerConfig(EvalConfig):
    """A share of an evaluation's episodes.

    Attributes:
        worker: Which of the `workers` this is.
    """

    worker: int = ranged(0, f"[0, {WORKERS}]")


def work(config: WorkerConfig) -> None:
    """Run every `workers`-th shard; prints each episode as it ends."""
    with EnvPool(min(config.batch, config.episodes), config.env, config.instruction) as pool:
        evaluation, _ = prepared(config, pool)
        run_episodes(evaluation, lambda name, episode: print(line_of(name, episode), flush=True), config.worker)


if __name__ == "__main__":
    command = Command("", "sim.worker", "WorkerConfig", "work", "the finished episodes are kept by what started it")
    raise SystemExit(run("worker", command, sys.argv[1:]))
