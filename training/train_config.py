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
        grounding_roots: Comma-separated action-free datasets for the auxiliary target.
        policy: The policy's configuration. Features come from the data; so do action ranges,
            two-valued dimensions and the auxiliary target unless they are set (auxiliary_weight 0
            disables the target).
        policy_path: Checkpoint to start from; it replaces `policy`, except for the device.
        imitate: Checkpoint whose predictions on the demonstrations are learnt, too, for example a
            smaller policy's; it has the same action tokens, and chunks at most as long.
        grounding_steps: Optimiser steps on grounding frames alone, before the others; by default
            1000, or a fifth of the time with max_minutes.
        grounding_gate: Largest median error of an object in a task on held-out scenes after these
            steps [m]; if one is larger, training ends before the steps on actions. 0 for no gate.
        steps: Optimiser steps on demonstrations; by default 8000, or as many as fit into
            max_minutes.
        batch_size: Frames per step; by default 32, half if few steps fit into max_minutes.
        grounding_batch: Grounding frames in every step on demonstrations.
        named_terms: Leading terms of the auxiliary target that steps on demonstrations regress:
            those of the objects in the instruction; 0 for all. By default the environment's choice.
        weight_decay: Decoupled weight decay.
        rounds: Takeover (DAgger) rounds in the first 3/4 of `steps`; by default 2. With
            max_minutes, one in a tenth of 10 min or more if there is an expert, else none.
        takeover_episodes: Takeovers per round.
        takeover_seed: First seed of the takeovers' scenes; set a new one for a run that starts from
            the policy of another.
        takeover_weight: Share of a batch that comes from takeover data, if there are any.
        intervention_weight: Share of the frames from `roots` in which a person intervened, if there
            are any; 0: as their number. `root_weights` replaces it.
    """

    roots: str = ""
    root_weights: str = ""
    grounding_roots: str = ""
    policy: CeedVLAConfig = field(
        default_factory=lambda: CeedVLAConfig(device="cpu", push_to_hub=False)
    )
    policy_path: str = ""
    imitate: str = ""
    grounding_steps: int | None = ranged(None, NONE_OR_COUNTS)
    steps: int | None = ranged(None, COUNTS)  # type: ignore[assignment]  # None only with a budget
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
    intervention_weight: float = ranged(0.4, "[0, 1)")

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
                f"root_weights has {len(weights)} weights for {len(roots)} roots; there must be "
                "one for each root, not all 0."
            )
