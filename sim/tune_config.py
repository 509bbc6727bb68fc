"""The options of ``ceed-vla tune``."""

from __future__ import annotations

from dataclasses import dataclass

from ceed_vla.fields import COUNTS, SEEDS, chosen, ranged
from ceed_vla.sim.environment import VALIDATION_SEED, check_choice
from ceed_vla.sim.settings import DrivenConfig
from ceed_vla.sim.timing import ENGINES
from ceed_vla.workers import MOST

PLAY_OFF = 4  # times the episodes of a generation


@dataclass
class TuneConfig(DrivenConfig):
    """Options of ``ceed-vla tune``.

    Attributes:
        output_dir: Folder for plans.json, pareto.png and, with `save`, the folder `checkpoint`.
        save: Write a copy of the policy that executes the steps of the largest budget's plan and
            knows it as plan, and as plan<MS> those of the other budgets that execute as many.
        budgets_ms: Milliseconds a chunk (p50); empty for 1.2, 1.5, 2 and 3 times the floor,
            measured first.
        population: Plans a generation.
        generations: Generations.
        episodes: Episodes of the plans that are left at the end of a generation; all plans run a
            quarter of them, those that play off and the final comparison four times as many.
        chunks: Chunks on which a plan is timed.
        seed: First seed of the search's episodes; the final comparison has those that follow.
        search_seed: Seed of the search.
        engine: Of the timing: eager, compiled, or fastest: each plan in its faster one, which
            plans.json names.
        workers: Processes that share the episodes; timing has the machine to itself.
    """

    output_dir: str = "outputs/tune"
    save: bool = False
    budgets_ms: list[float] = ranged([], "(0, 1e6]")
    population: int = ranged(16, "[4, 1000]")
    generations: int = ranged(3, "[1, 1000]")
    episodes: int = ranged(80, COUNTS)
    chunks: int = ranged(40, "[2, 100000]")
    seed: int = ranged(VALIDATION_SEED + 2000, SEEDS)
    search_seed: int = ranged(0, SEEDS)
    engine: str = chosen("eager", ENGINES)
    workers: int = ranged(1, MOST)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.seed, 2 * PLAY_OFF * self.episodes)
