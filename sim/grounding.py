"""``ceed-vla grounding``: how well a policy sees where the named cube and its goal are, by distance.

The auxiliary regression of the state token is asked on random scenes and arm poses. An average over demonstrations
hides missing grounding, because the gripper is at the cube in most frames; so errors are listed by distance, next to
the error of a guess that has learnt nothing but the mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sim  # noqa: F401  (registers the environment)
from ceed_vla.checkpoints import load
from ceed_vla.devices import check_device
from ceed_vla.errors import ConfigError
from ceed_vla.fields import SEEDS, check_fields, chosen, ranged
from ceed_vla.files import write_text
from sim.evaluate import EVALUATION_SEEDS, CheckpointPath
from sim.outputs import MADE_BY, claim_file
from sim.rollout import ENV_ID, Bundle, observation_batch
from sim.tabletop.env import PRIVILEGED_NAMES
from sim.tabletop.tasks import SPLITS

TARGET, GOAL = slice(0, 3), slice(5, 8)  # positions relative to the TCP, in `PRIVILEGED_NAMES`
_BATCH = 64


@dataclass
class GroundingConfig:
    """Options of ``ceed-vla grounding``.

    Attributes:
        policy: The policy; it must have an auxiliary regression (``auxiliary_scale``).
        scenes: Random scenes, each with one arm pose.
        seed: First seed; scenes from 50000 up are never recorded.
        split: Colour and phrase combinations.
        edges: Distances between gripper and cube that separate the rows [m].
        output: JSON file to write; empty for none.
        device: Overrides the checkpoint's device.
    """

    policy: CheckpointPath = field(default_factory=CheckpointPath)
    scenes: int = ranged(400, "[1, 100000]")
    seed: int = ranged(EVALUATION_SEEDS, SEEDS)
    split: str = chosen("train", SPLITS)
    edges: list[float] = ranged([0.15, 0.2, 0.25, 0.3, 0.35], "(0, 10]")
    output: str = ""
    device: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "--")
        if sorted(set(self.edges)) != list(self.edges):
            raise ConfigError(f"--edges is {str(self.edges)[:200]}; give increasing distances [m].")


def grounding(config: GroundingConfig) -> dict[str, Any]:
    """Measure and print the localisation errors.

    Returns:
        ``{"program": ..., "rows": [...], "seed": ..., "scenes": ...}``; errors in [cm].

    Raises:
        ConfigError: No policy, one without an auxiliary regression of the tabletop's leading terms, or bad edges.
        CheckpointError: A checkpoint that cannot be loaded.
    """
    if not config.policy.path:
        raise ConfigError(
            "--policy.path is missing; give a checkpoint folder, or teacher for the shipped one."
        )
    output = claim_file("output", config.output, ".json") if config.output else None
    if config.device is not None:
        check_device(config.device)
    bundle = load(config.policy.path, device=config.device)
    if len(bundle[0].config.auxiliary_scale) < GOAL.stop:
        raise ConfigError(
            f"{config.policy.path} regresses {len(bundle[0].config.auxiliary_scale)} terms, "
            f"at least {GOAL.stop} are needed: {', '.join(PRIVILEGED_NAMES[: GOAL.stop])}."
        )
    found, truth = _predictions(bundle, config)
    rows = error_rows(found, truth, config.edges)
    Console().print(_table(rows))
    report = {"program": MADE_BY, "rows": rows, "seed": config.seed, "scenes": config.scenes}
    if output is not None:
        write_text(output, json.dumps(report, indent=2) + "\n")
        Console().print(f"Written: {output}", soft_wrap=True, highlight=False)
    return report


def error_rows(
    found: NDArray[np.float32], truth: NDArray[np.float32], edges: Sequence[float]
) -> list[dict[str, Any]]:
    """Median and 90th percentile of the position errors, by distance of the target.

    Args:
        found: Predicted leading terms (N, E) [m].
        truth: True ones (N, E) [m].
        edges: Distances that separate the rows [m].

    Returns:
        One row a distance band that has frames, the last one for all; errors in [cm]. ``chance`` is the median
        error of always answering the mean position of the target.
    """
    distance = np.linalg.norm(truth[:, TARGET], axis=1)  # (N,)
    target = 100 * np.linalg.norm(found[:, TARGET] - truth[:, TARGET], axis=1)
    goal = 100 * np.linalg.norm(found[:, GOAL] - truth[:, GOAL], axis=1)
    mean = 100 * np.linalg.norm(truth[:, TARGET].mean(0) - truth[:, TARGET], axis=1)
    bounds = [0.0, *edges, np.inf]
    bands = list(pairwise(bounds))
    rows = []
    for low, high in [*bands, (0.0, np.inf)]:
        inside = (distance >= low) & (distance < high)
        if inside.any():
            errors = {"target": target[inside], "goal": goal[inside]}
            quantiles = {
                f"{name}_{label}_cm": round(float(np.quantile(values, share)), 2)
                for name, values in errors.items()
                for label, share in (("p50", 0.5), ("p90", 0.9))
            }
            chance = round(float(np.median(mean[inside])), 2)
            rows.append(
                {
                    "distance_m": [low, None if np.isinf(high) else high],
                    "frames": int(inside.sum()),
                    **quantiles,
                    "chance_cm": chance,
                }
            )
    return rows


@torch.inference_mode()
def _predictions(bundle: Bundle, config: GroundingConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Predicted and true leading terms (N, E) on random scenes and arm poses."""
    policy, preprocessor, _ = bundle
    scale = torch.tensor(policy.config.auxiliary_scale)
    found, truth = [], []
    env: Any = gymnasium.make(ENV_ID, task="mixed", split=config.split, disable_env_checker=True)
    seeds = range(config.seed, config.seed + config.scenes)
    for start in track(range(0, len(seeds), _BATCH), description="scenes"):
        observations, instructions = [], []
        for seed in seeds[start : start + _BATCH]:
            env.reset(seed=seed)
            env.unwrapped.scatter_arm(np.random.default_rng(seed))
            observations.append(env.unwrapped.observe())
            instructions.append(env.unwrapped.instruction)
            truth.append(env.unwrapped.privileged_state()[: len(scale)])
        batch = preprocessor(observation_batch(observations, instructions))
        state = policy.backbone.prefix_state(policy.backbone.embed_prefix(batch))
        found.append((policy.backbone.auxiliary(state).float().cpu() / scale).numpy())
    env.close()
    return np.concatenate(found), np.stack(truth)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Localisation error (cm) by distance between gripper and cube")
    for column in ("distance (m)", "frames", "cube p50 / p90", "goal p50 / p90", "cube, chance p50"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["distance_m"]
        band = "all" if (low, high) == (0.0, None) else f"{low:.2f} - {'' if high is None else f'{high:.2f}'}"
        table.add_row(
            band,
            str(row["frames"]),
            f"{row['target_p50_cm']:.1f} / {row['target_p90_cm']:.1f}",
            f"{row['goal_p50_cm']:.1f} / {row['goal_p90_cm']:.1f}",
            f"{row['chance_cm']:.1f}",
        )
    return table
