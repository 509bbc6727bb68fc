"""The settings of `ceed-vla train`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.errors import ConfigError
from ceed_vla.fields import COUNTS, SEEDS, ranged
from ceed_vla.training.run_config import RunConfig
from ceed_vla.training.settings import (
    BATCHES,
    NONE_OR_COUNTS,
    NONE_OR_RATES,
    number_list,
    split_list,
)

# without a budget
STEPS = 8000
GROUNDING_STEPS = 1000
BATCH_SIZE = 32
ROUNDS = 2


@dataclass
class TrainConfig(RunConfig):
    """Settings of `ceed-vla train`.

    Attributes:
        roots: Comma-separated LeRobotDataset folders with demonstrations.
        root_weights: Comma-separated shares of `roots`; proportional to their frames if empty.
        grounding_roots: Comma-separated action-free data sets for the auxiliary target.
        policy: The policy's configuration. Features come from the data; action ranges, two-valued
            dimensions and the auxiliary target too, where they are not set (auxiliary_weight 0
            switches the target off).
        policy_path: Start from this checkpoint; it replaces `policy` (but for the device).
        grounding_steps: Optimiser steps on grounding frames alone, first; 1000 if not given. With
            max_minutes, a fifth of the time.
        grounding_gate: Largest median error [m] of every object in every task on held-out scenes
            after these steps; where one is larger, training ends before it sees an action. 0: no
            gate.
        steps: Optimiser steps on demonstrations; 8000 if not given, as many as fit with
            max_minutes.
        batch_size: Frames a step; 32 if not given, half of it where max_minutes leave few steps.
        grounding_batch: Grounding frames beside every step.
        named_terms: Once there are actions to learn, regress only so many leading terms of the
            auxiliary target, those that tell of what the instruction names; 0 for all, by default
            what the environment says.
        weight_decay: Decoupled weight decay.
        rounds: Takeover (DAgger) rounds within the first 3/4 of `steps`; 2 if not given. With
            max_minutes one, of at most a tenth of the time, where there is an expert and ten
            minutes.
        takeover_episodes: Takeovers a round.
        takeover_seed: First seed of the takeovers' scenes; a run that goes on from another one's
            policy takes new ones.
        takeover_weight: Share of a batch that comes from takeover data once there is some.
    """

    roots: str = ""
    root_weights: str = ""
    grounding_roots: str = ""
    policy: CeedVLAConfig = field(
        default_factory=lambda: CeedVLAConfig(device="cpu", push_to_hub=False)
    )
    policy_path: str = ""
    grounding_steps: int | None = ranged(None, NONE_OR_COUNTS)
    steps: int | None = ranged(None, COUNTS)  # type: ignore[assignment]  # every run knows it in the end
    batch_size: int | None = ranged(None, BATCHES)  # type: ignore[assignment]
    grounding_gate: float = ranged(0.0, "[0, 10]")
    grounding_batch: int = ranged(12, "[0, 1e6]")
    named_terms: int | None = ranged(None, "[0, 1e6]")
    muon_lr: float = ranged(2e-3, NONE_OR_RATES)
    weight_decay: float = ranged(0.05, "[0, 10]")
    rounds: int | None = ranged(None, "[0, 1000]")
    takeover_episodes: int = ranged(600, "[1, 1e6]")
    takeover_seed: int = ranged(30_000, SEEDS)
    takeover_weight: float = ranged(0.4, "[0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_minutes:
            self.steps = self.steps or STEPS
            self.batch_size = self.batch_size or BATCH_SIZE
            if self.grounding_steps is None:
                self.grounding_steps = GROUNDING_STEPS
            if self.rounds is None:
                self.rounds = ROUNDS
        weights = number_list(self.root_weights, "root_weights")
        roots = split_list(self.roots)
        if weights and (len(weights) != len(roots) or not sum(weights)):
            raise ConfigError(
                f"root_weights has {len(weights)} weights for {len(roots)} roots; give one each, "
                "not all 0."
            )
