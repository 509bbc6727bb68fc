"""``ceed-vla grounding``: localisation error of the named objects, by distance.

The error is that of the state token's auxiliary regression on random scenes and arm poses. An
average over demonstrations hides missing grounding, because the gripper is at the object in most
frames. So errors are listed by distance, next to the error of predicting the mean position.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ceed_vla.checkpoints import load
from ceed_vla.errors import ConfigError
from ceed_vla.fields import SEEDS, ranged
from ceed_vla.files import write_text
from ceed_vla.outputs import MADE_BY, claim_file
from ceed_vla.sim.env_tasks import task_of
from ceed_vla.sim.environment import (
    EVALUATION_SEEDS,
    Bundle,
    Environment,
    Privileged,
    joined,
    observation_batch,
)
from ceed_vla.sim.settings import DrivenConfig

_BATCH = 64


@dataclass
class GroundingConfig(DrivenConfig):
    """Options of ``ceed-vla grounding``.

    Attributes:
        policy: The policy; it must have an auxiliary regression (``auxiliary_scale``).
        scenes: Random scenes, each with one arm pose.
        seed: First seed; seeds from 50000 up are never recorded.
        edges: Distances between tool and object that separate the rows [m].
        output: JSON file to write; empty for none.
        device: Overrides the checkpoint's device.
    """

    moved: ClassVar[dict[str, str]] = {"split": "env.split"}

    scenes: int = ranged(400, "[1, 100000]")
    seed: int = ranged(EVALUATION_SEEDS, SEEDS)
    edges: list[float] = ranged([0.15, 0.2, 0.25, 0.3, 0.35], "(0, 10]")
    output: str = ""
    device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted(set(self.edges)) != list(self.edges):
            raise ConfigError(f"--edges is {str(self.edges)[:200]}; give increasing distances [m].")


def grounding(config: GroundingConfig) -> dict[str, Any]:
    """Measure and print the localisation errors [cm].

    Raises:
        ConfigError: No policy is set, or it has no auxiliary regression of the environment's
            leading terms.
        CheckpointError: The checkpoint cannot be loaded.
    """
    output = claim_file("output", config.output, ".json") if config.output else None
    privileged: Privileged | None = getattr(config.env, "privileged", None)
    if privileged is None or not privileged.positions:
        raise ConfigError(
            f"--env.type={config.env.type} has no positions to compare with: its configuration "
            "lacks `privileged`, see sim/environment.py."
        )
    config.place_threads()
    bundle = joined(load(config.policy.given(), device=config.device), config.env)
    needed = max(stop for _, stop in privileged.positions.values())
    count = len(bundle[0].config.auxiliary_scale)
    if not needed <= count <= len(privileged.names):
        raise ConfigError(
            f"{config.policy.path} regresses {count} terms; {needed} to {len(privileged.names)} "
            f"are needed: {', '.join(privileged.names[:needed])}."
        )
    found, truth, drawn = _predictions(bundle, config)
    rows = error_rows(found, truth, config.edges, privileged.positions)
    names = list(privileged.positions)
    tasks = {
        str(task): error_rows(found[drawn == task], truth[drawn == task], (), privileged.positions)[
            -1
        ]
        for task in np.unique(drawn)
    }
    bands = {_band(*row["distance_m"]): row for row in rows}
    Console().print(_table(bands, names, "distance (m)", f" between tool and {names[0]}"))
    Console().print(_table(tasks, names, "task"))
    report = {
        "program": MADE_BY,
        "rows": rows,
        "tasks": tasks,
        "seed": config.seed,
        "scenes": config.scenes,
    }
    if output is not None:
        write_text(output, json.dumps(report, indent=2) + "\n")
        Console().print(f"Written: {output}", soft_wrap=True, highlight=False)
    return report


def error_rows(
    found: NDArray[np.float32],
    truth: NDArray[np.float32],
    edges: Sequence[float],
    positions: dict[str, tuple[int, int]],
) -> list[dict[str, Any]]:
    """Compute the median and 90th percentile of the position errors [cm] by distance.

    Args:
        found: Predicted leading terms (N, E) [m].
        truth: True leading terms (N, E) [m].
        edges: Distances of the first position that separate the rows [m].
        positions: As in `Privileged`.

    Returns:
        One row per band that has frames, then one of all; ``chance`` is the error of predicting the
        mean first position.
    """
    parts = {name: slice(*ends) for name, ends in positions.items()}
    first = truth[:, next(iter(parts.values()))]
    distance = np.linalg.norm(first, axis=1)  # (N,)
    off = {
        name: 100 * np.linalg.norm(found[:, part] - truth[:, part], axis=1)
        for name, part in parts.items()
    }
    mean = 100 * np.linalg.norm(first.mean(0) - first, axis=1)
    rows: list[dict[str, Any]] = []
    for low, high in [*pairwise([0.0, *edges, np.inf]), (0.0, np.inf)]:
        inside = (distance >= low) & (distance < high)
        if not inside.any():
            continue
        row = {"distance_m": [low, None if np.isinf(high) else high], "frames": int(inside.sum())}
        for name, values in off.items():
            for label, share in (("p50", 0.5), ("p90", 0.9)):
                row[f"{name}_{label}_cm"] = round(float(np.quantile(values[inside], share)), 2)
        rows.append(row | {"chance_cm": round(float(np.median(mean[inside])), 2)})
    return rows


@torch.inference_mode()
def _predictions(
    bundle: Bundle, config: GroundingConfig
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Predict the leading terms on random scenes and arm poses.

    Returns:
        Predicted and true terms (N, E), and the tasks (N,).
    """
    policy, preprocessor, _ = bundle
    scale = torch.tensor(policy.config.auxiliary_scale)
    found = []
    truth = []
    drawn = []
    env = Environment(config.env, config.instruction)
    env.needs("grounding", "privileged_state", *["observe"] * hasattr(env.inner, "scatter"))
    seeds = range(config.seed, config.seed + config.scenes)
    for start in tqdm(
        range(0, len(seeds), _BATCH), desc="scenes", unit="batch", dynamic_ncols=True
    ):
        observations, instructions = [], []
        for seed in seeds[start : start + _BATCH]:
            env.reset(seed, task_of(config.env, seed))
            if hasattr(env.inner, "scatter"):
                env.rearrange("scatter", np.random.default_rng(seed))
            observations.append(env.observe())
            instructions.append(env.instruction)
            drawn.append(env.task)
            truth.append(env.inner.privileged_state()[: len(scale)])
        batch = preprocessor(observation_batch(observations, instructions))
        state = policy.backbone.prefix_state(policy.backbone.embed_prefix(batch))
        found.append((policy.backbone.auxiliary(state).float().cpu() / scale).numpy())
    env.close()
    return np.concatenate(found), np.stack(truth), np.array(drawn)


def _band(low: float, high: float | None) -> str:
    return (
        "all"
        if (low, high) == (0.0, None)
        else f"{low:.2f} - {'' if high is None else f'{high:.2f}'}"
    )


def _table(
    rows: dict[str, dict[str, Any]], names: Sequence[str], what: str, more: str = ""
) -> Table:
    table = Table(title=f"Localisation error (cm) by {what}{more}")
    errors = [f"{name} p50 / p90" for name in names]
    for column in (what, "frames", *errors, f"{names[0]}, chance p50"):
        table.add_column(column, justify="right")
    for title, row in rows.items():
        errors = [f"{row[f'{name}_p50_cm']:.1f} / {row[f'{name}_p90_cm']:.1f}" for name in names]
        table.add_row(title, str(row["frames"]), *errors, f"{row['chance_cm']:.1f}")
    return table
