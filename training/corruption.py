"""States to distil from: guesses as in inference, after a few Jacobi updates by the student."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.training.shards import GUESSES

PREVIOUS = GUESSES.index("previous")
RANDOM = GUESSES.index("random")


@dataclass
class StateDraw:
    """The random part of a batch's states, drawn at once, so that it is the same in any split."""

    kind: NDArray[np.int64]  # (B,) index into `GUESSES`
    guess: Tensor  # (B, n) the random guess
    updates: NDArray[np.int64]  # (B,) own Jacobi updates of the guess
    pick: NDArray[np.float64]  # (B,) uniform in [0, 1): which state of a stored trajectory

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, rows: slice) -> StateDraw:
        return StateDraw(self.kind[rows], self.guess[rows], self.updates[rows], self.pick[rows])


def draw_states(
    policy: CeedVLAPolicy,
    rows: int,
    shares: NDArray[np.float64],
    max_updates: int,
    random: np.random.Generator,
) -> StateDraw:
    """Draw kinds of guesses by their `shares`, random guesses, and 0 to `max_updates` updates."""
    kind = random.choice(len(GUESSES), size=rows, p=shares)
    generator = torch.Generator().manual_seed(int(random.integers(2**31)))
    guess = policy.tokenizer.guess("random", rows, generator=generator)
    return StateDraw(kind, guess, random.integers(max_updates + 1, size=rows), random.random(rows))


def guess_states(policy: CeedVLAPolicy, previous: Tensor, draw: StateDraw) -> Tensor:
    """Initial guesses (B, n); rows without a previous chunk (-1) get random tokens instead."""
    rows = torch.arange(len(previous), device=previous.device)
    return all_guesses(policy, previous, draw)[
        torch.from_numpy(draw.kind).to(previous.device), rows
    ]


def all_guesses(policy: CeedVLAPolicy, previous: Tensor, draw: StateDraw) -> Tensor:
    """Initial guesses of every kind (kinds, B, n).

    Rows without a previous chunk (-1) get random tokens in its place.
    """
    tokenizer, steps = policy.tokenizer, policy.config.n_action_steps
    guesses = [
        draw.guess if name == "random" else tokenizer.guess(name, len(previous), previous, steps)
        for name in GUESSES
    ]
    found = torch.stack([guess.to(previous.device) for guess in guesses])
    found[PREVIOUS] = torch.where(previous[:, :1] < 0, found[RANDOM], found[PREVIOUS])
    return found


def with_first(guesses: Tensor, fixed_point: Tensor) -> Tensor:
    """`guesses` (..., n) with the first token of `fixed_point` (..., n), as decoding starts with:
    the prefix predicts it.
    """
    return torch.cat([fixed_point[..., :1].expand_as(guesses[..., :1]), guesses[..., 1:]], dim=-1)


@torch.no_grad()
def online_states(
    policy: CeedVLAPolicy,
    embeddings: Tensor,
    previous: Tensor,
    fixed_point: Tensor,
    draw: StateDraw,
    max_updates: int,
) -> Tensor:
    """Guesses (B, n) after the drawn numbers of Jacobi updates by the student.

    Args:
        policy: The student.
        embeddings: Its prefix embeddings.
        previous: Previous chunks (B, n); rows of -1 have none.
        fixed_point: The teacher's fixed points (B, n), see `with_first`.
        draw: The random part of the states.
        max_updates: Most updates. Every process runs as many forwards, as sharded weights require.
    """
    states = with_first(guess_states(policy, previous, draw), fixed_point)
    updates = torch.from_numpy(draw.updates).to(states.device)
    for update in range(max_updates):
        rows = torch.nonzero(updates > update).squeeze(1)
        due = len(rows) > 0
        rows = rows if due else rows.new_zeros(1)
        _, (logits,) = policy.backbone.packed_logits(embeddings[rows], [states[rows]])
        if due:
            states[rows] = logits.argmax(-1)
    return states
