"""``ceed-vla demo``: the shipped teacher and student on the same episodes, in a few minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ceed_vla.fields import SEEDS, check_fields, ranged
from ceed_vla.folders import pretrained_path
from sim.environment import EVALUATION_SEEDS
from sim.evaluate import EPISODE_COUNTS, CheckpointPath, EvalConfig, default_console, evaluate

DECODERS = "teacher_ar,teacher_cap4,jacobi,ceed"


@dataclass
class DemoConfig:
    """Options of ``ceed-vla demo``: an evaluation with fixed checkpoints and decoders.

    Attributes:
        episodes: Episodes a decoder.
        seed: First seed.
        output_dir: Folder for the report, plots and clips.
        resume: Keep the finished episodes of an interrupted run.
    """

    episodes: int = ranged(20, EPISODE_COUNTS)
    seed: int = ranged(EVALUATION_SEEDS, SEEDS)
    output_dir: str = "outputs/demo"
    resume: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "--")


def demo(config: DemoConfig, console: Console | None = None) -> dict[str, Any]:
    """Run the demonstration; the content of ``report.json``.

    Raises:
        CheckpointError: The installation lacks the shipped weights.
    """
    console = console or default_console()
    teacher, student = pretrained_path("teacher"), pretrained_path("student")
    console.print(
        f"Tabletop, four task families, {config.episodes} episodes a decoder: the teacher token by token "
        "(teacher_ar) and in at most 4 parallel forwards (teacher_cap4), the distilled student to "
        "convergence (jacobi) and with early exit (ceed)."
    )
    return evaluate(
        EvalConfig(
            policy=CheckpointPath(str(student)),
            teacher=CheckpointPath(str(teacher)),
            decoders=DECODERS,
            episodes=config.episodes,
            seed=config.seed,
            output_dir=config.output_dir,
            batch=min(config.episodes, 20),
            resume=config.resume,
        ),
        console,
    )
