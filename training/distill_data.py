"""Batches for distillation: frames with fixed points, mixed labels, and the states to distil from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ceed_vla.decoding import make_guess
from ceed_vla.errors import DatasetError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from training.data import open_dataset
from training.losses import chunk_distance, mixed_labels
from training.mixture import check_fits, join_batches
from training.run import split_list
from training.trajectories import GUESSES, read_trajectories


class DistillData:
    """Frames with their fixed points.

    Args:
        trajectories: Folder of `ceed-vla collect`.
        roots: Comma-separated data sets it was collected on, in the same order.
        teacher: Checkpoint that must have made it.
        policy: The student; gives vocabulary and chunk.
        pre: Its pre-processor.
        eval_frames: Frames held out for measurements.
        delta_quantile: Share of the training frames whose distance between teacher and demonstration is acceptable.

    Attributes:
        rows: Rows of the trajectories to train on.
        held_out: Rows to measure on.
        delta_max: Distance beyond which the demonstration replaces the teacher's block.

    Raises:
        DatasetError: Trajectories and data sets that do not fit each other, or too few frames.
        CheckpointError: Trajectories of another teacher.
    """

    def __init__(
        self,
        trajectories: str,
        roots: str,
        teacher: str,
        policy: CeedVLAPolicy,
        pre: Any,
        *,
        eval_frames: int,
        delta_quantile: float,
    ) -> None:
        self.policy, self.pre = policy, pre
        self.stores = [open_dataset(root) for root in split_list(roots)]
        self.trajectories = read_trajectories(trajectories, teacher)
        found = [{"name": s.root.name, "frames": len(s)} for s in self.stores]
        if found != self.trajectories.meta["datasets"]:
            raise DatasetError(
                f"The trajectories were collected on {self.trajectories.meta['datasets']}, --roots gives {found}; "
                "name the same folders in the same order."
            )
        for store in self.stores:
            check_fits(store, policy.config)
            if store.action is None:
                raise DatasetError(f"{store.root} holds no actions; distil on demonstrations.")
        order = np.random.default_rng(0).permutation(len(self.trajectories.frame))
        self.held_out, self.rows = order[:eval_frames], order[eval_frames:]
        if not len(self.rows):
            raise DatasetError(f"{trajectories} has {len(order)} frames; more than eval_frames are needed.")
        self.distance = self._distances()
        self.delta_max = float(np.quantile(self.distance[self.rows], delta_quantile))

    def _distances(self) -> NDArray[np.float32]:
        """Distance (N,) between the teacher's chunk and the demonstration, in normalised units."""
        low, high = torch.tensor(self.policy.config.action_low), torch.tensor(self.policy.config.action_high)
        rows = np.arange(len(self.trajectories.frame))
        parts = []
        for part in np.split(rows, range(4096, len(rows), 4096)):
            actions, pad = self._demonstration(part)
            fixed = self.policy.tokenizer.decode(as_tokens(self.trajectories.fixed_point[part]))
            parts.append(
                chunk_distance(fixed, actions.clamp(low, high), (~pad).float(), (high - low) / 2).numpy()
            )
        return np.concatenate(parts)

    def _demonstration(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Recorded chunks (B, m, A) and their padding (B, m)."""
        m = self.policy.config.chunk_size
        actions = torch.empty(len(rows), m, self.policy.config.action_dim)
        pad = torch.empty(len(rows), m, dtype=torch.bool)
        for index, store in enumerate(self.stores):
            own = np.flatnonzero(self.trajectories.root[rows] == index)
            if len(own):
                actions[own], pad[own] = store.chunks(self.trajectories.frame[rows[own]], m)
        return actions, pad

    def batch(self, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Pre-processed observations of `rows` with fixed points, labels and previous chunks, on the policy's device.

        Returns:
            What the pre-processor gives, and ``fixed_point``, ``previous``, ``labels``, ``label_weight`` (B, n),
            ``replaced`` (B,) and ``rows`` (B,); the rows come grouped by data set.
        """
        m, dim = self.policy.config.chunk_size, self.policy.config.action_dim
        groups = [rows[self.trajectories.root[rows] == index] for index in range(len(self.stores))]
        parts = [
            store.batch(self.trajectories.frame[own], m)
            for store, own in zip(self.stores, groups, strict=True)
            if len(own)
        ]
        batch, rows = self.pre(join_batches(parts)), np.concatenate(groups)
        device = batch["action"].device
        fixed = as_tokens(self.trajectories.fixed_point[rows]).to(device)
        distance = torch.from_numpy(self.distance[rows]).to(device)
        demonstration = self.policy.tokenizer.encode(batch["action"])
        labels, replaced = mixed_labels(fixed, demonstration, distance, self.delta_max)
        valid = (~batch["action_is_pad"]).repeat_interleave(dim, dim=1)  # (B, n)
        extra = {
            "rows": torch.from_numpy(rows),
            "fixed_point": fixed,
            "previous": as_tokens(self.trajectories.previous[rows]).to(device),
            "labels": labels,
            "replaced": replaced,
            "label_weight": torch.where(replaced[:, None], valid, torch.ones_like(valid)).float(),
        }
        return {**batch, **extra}

    def stored_states(self, rows: Tensor, random: np.random.Generator) -> Tensor:
        """One state of each teacher trajectory (B, n), drawn uniformly; the fixed point itself is never drawn."""
        chosen = []
        for row in rows.tolist():
            states = self.trajectories.states[row]
            chosen.append(states[random.integers(len(states) - 1)])
        return as_tokens(np.stack(chosen))


@torch.no_grad()
def online_states(
    policy: CeedVLAPolicy,
    embeddings: Tensor,
    previous: Tensor,
    shares: NDArray[np.float64],
    max_updates: int,
    random: np.random.Generator,
) -> Tensor:
    """Guesses (B, n) of inference's mixture after 0 to `max_updates` of the student's own Jacobi updates.

    Args:
        policy: The student.
        embeddings: Prefix embeddings (B, P, d).
        previous: Previous chunks (B, n); rows of -1 have none.
        shares: Shares of previous, mid and random guesses.
        max_updates: Most updates; every row draws its number.
        random: Random source.
    """
    states = guess_states(policy, previous, shares, random)
    updates = torch.from_numpy(random.integers(max_updates + 1, size=len(states))).to(states.device)
    for update in range(max_updates):
        rows = torch.nonzero(updates > update).squeeze(1)
        if len(rows):
            _, (logits,) = policy.backbone.packed_logits(embeddings[rows], [states[rows]])
            states[rows] = logits.argmax(-1)
    return states


def guess_states(
    policy: CeedVLAPolicy, previous: Tensor, shares: NDArray[np.float64], random: np.random.Generator
) -> Tensor:
    """Initial guesses (B, n) in the given shares; rows without a previous chunk (-1) get random bins instead."""
    kinds = torch.from_numpy(random.choice(len(GUESSES), size=len(previous), p=shares)).to(previous.device)
    kinds[(kinds == GUESSES.index("previous")) & (previous[:, 0] < 0)] = GUESSES.index("random")
    generator = torch.Generator().manual_seed(int(random.integers(2**31)))
    guesses = [
        make_guess(
            kind,
            previous.shape[0],
            previous.shape[1],
            policy.config.num_bins,
            policy.tokenizer.zero_bins,
            previous=previous,
            shift_tokens=policy.config.n_action_steps * policy.config.action_dim,
            generator=generator,
        )
        for kind in GUESSES
    ]
    return torch.stack(guesses)[kinds, torch.arange(len(previous), device=previous.device)]  # (B, n)


def as_tokens(tokens: NDArray[np.int16]) -> Tensor:
    """Stored tokens as int64."""
    return torch.from_numpy(tokens.astype(np.int64))
