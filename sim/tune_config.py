"""The options of ``ceed-vla tune``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ceed_vla.fields import COUNTS, SEEDS, chosen, ranged
from ceed_vla.sim.engines import ENGINES
from ceed_vla.sim.env_tasks import check_open
from ceed_vla.sim.environment import VALIDATION_SEED, check_choice
from ceed_vla.sim.settings import DrivenConfig
from ceed_vla.workers import MOST, ClusterConfig

PLAY_OFF = 4  # times the episodes of a generation


@dataclass
class TuneConfig(DrivenConfig):
    """Options of ``ceed-vla tune``.

    Attributes:
        output_dir: Folder for plans.json, pareto.png and, with `save`, the folder `checkpoint`.
        save: Write a copy of the policy with the decoder plan, the plan of the largest budget, and
            its executed steps; plans of other budgets that execute as many steps become plan<MS>.
        budgets_ms: Latency budgets per chunk, p50 [ms]; empty: 1.1, 1.2, 1.5 and 2 times the floor,
            which is measured first.
        population: Plans per generation.
        generations: Number of generations.
        episodes: Episodes of the plans that remain at the end of a generation. All plans run a
            quarter of them; the play-off and the final comparison run four times as many.
        chunks: Chunks on which a plan is timed.
        seed: First seed of the search's episodes; the final comparison uses the seeds after them.
        search_seed: Random seed of the search.
        engine: Engine for timing: eager, compiled, edge (an export), auto (edge if the policy can
            be exported here, eager otherwise), or fastest (the fastest one of each plan, named in
            plans.json).
        workers: Processes that share the episodes; timing runs while they are idle.
        cluster: Ray cluster that runs the episodes instead; timing stays on this machine.
        resume: Continue an interrupted search in `output_dir`, after what it has measured.
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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.seed, 2 * PLAY_OFF * self.episodes)
        check_open(self.env, "Tuning")
