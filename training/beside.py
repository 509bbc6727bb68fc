"""What the commands have in common that train a module beside a frozen policy."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ceed_vla.fields import COUNTS, SEEDS, THREADS, Checked, check_fields, ranged
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.training.distill_data import OnlineData, StoredData, as_tokens
from ceed_vla.training.held_out import SHARE
from ceed_vla.training.held_out import SHARES as HELD_OUT_SHARES
from ceed_vla.training.objective import fixed_points
from ceed_vla.training.optim import computes_bfloat16
from ceed_vla.training.settings import BATCHES, RATES


@dataclass
class DecodedConfig:
    """What the policy has decoded already.

    Attributes:
        path: Folder made by `ceed-vla collect` with this policy on these roots (for exits with
            its states; guesses are then those of the folder). Without it, every batch is decoded
            anew.
    """

    path: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "trajectories.")


@dataclass
class BesideConfig(Checked):
    """Settings of the commands that train a module of a frozen policy.

    Attributes:
        policy_path: Checkpoint of the policy, whose weights do not change.
        roots: Comma-separated datasets to train on.
        output_dir: New or empty folder for a copy of the checkpoint with the trained module.
        trajectories: The policy's trajectories, if they are stored.
        steps: Optimizer steps.
        batch_size: Frames per step.
        lr: Peak learning rate.
        eval_frames: Held-out frames for the report.
        held_out: Share of every dataset's episodes that are held out.
        seed: Random seed of the weights and of the order of the frames.
        threads: CPU threads of torch; 0: torch's default.
        save_every: Steps between states to resume from.
        resume: Continue an interrupted run in `output_dir`.
    """

    policy_path: str = ""
    roots: str = ""
    output_dir: str = ""
    trajectories: DecodedConfig = field(default_factory=DecodedConfig)
    steps: int = ranged(300, COUNTS)
    batch_size: int = ranged(16, BATCHES)
    lr: float = ranged(2e-3, RATES)
    eval_frames: int = ranged(64, BATCHES)
    held_out: float = ranged(SHARE, HELD_OUT_SHARES)
    seed: int = ranged(0, SEEDS)
    threads: int = ranged(0, THREADS)
    save_every: int = ranged(50, COUNTS)
    resume: bool = False

    def data(
        self, policy: CeedVLAPolicy, pre: Any, *, states: bool, **settings: Any
    ) -> OnlineData | StoredData:
        """Frames with the policy's fixed points: stored ones, or decoded with each batch.

        Args:
            policy: The policy.
            pre: Its preprocessor.
            states: Whether batches have states on the way to them, too.
            settings: See `DistillData`.

        Raises:
            DatasetError: The datasets do not match the policy or the trajectories.
            CheckpointError: The trajectories are of another policy.
        """
        settings |= {
            "eval_frames": self.eval_frames,
            "held_out": self.held_out,
            "seed": self.seed,
        }
        stored = self.trajectories.path
        if stored:
            return StoredData(stored, self.roots, self.policy_path, policy, pre, states, **settings)
        decode = partial(fixed_points, policy)
        return OnlineData(
            self.roots, policy, pre, decode, teacher_states=states, labels=False, **settings
        )


def fixed_points_of(
    data: OnlineData | StoredData, rows: NDArray[np.int64], observation: dict[str, Any]
) -> Tensor:
    """Fixed points (B, n) of `rows`, whose preprocessed `observation` is given."""
    if isinstance(data, StoredData):
        return as_tokens(data.trajectories.fixed_point[rows]).to(data.policy.config.device)
    return data.decode(observation, None)[0]


def mixed_precision(device: str) -> AbstractContextManager[Any]:
    """Context in which the frozen policy runs in bfloat16, where the device computes it."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=computes_bfloat16(device))
