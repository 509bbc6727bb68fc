"""Which states teach most: those that the student's own updates treat unevenly (ExIt, arXiv
2509.04575).

Every row has candidates: each kind of guess after 0, 1, ... of the student's updates. How
informative one is, is how much of the distance to the fixed point the next update makes or loses:
where it is nothing, the state is done or the student is lost there. One is drawn in proportion to
that, times the share that inference gives its guess.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ceed_vla.training.corruption import StateDraw, all_guesses

FLOOR = 0.05  # of the tokens: what every candidate counts at least


@torch.no_grad()
def informative_states(
    policy: Any,
    embeddings: Any,
    previous: Tensor,
    fixed_point: Tensor,
    draw: StateDraw,
    max_updates: int,
    shares: NDArray[Any],
) -> Tensor:
    """States (B, n), each drawn among a row's candidates; see
    `ceed_vla.training.corruption.online_states` for the others.

    `shares` (kinds,) are those of the guesses. It takes ``max_updates + 1`` packed forwards of all
    kinds.
    """
    # of (kinds, B, n), one for each number of updates
    states = [all_guesses(policy, previous, draw)]
    for _ in range(max_updates + 1):
        _, logits = policy.backbone.packed_logits(embeddings, list(states[-1]))
        states.append(torch.stack([scores.argmax(-1) for scores in logits]))
    # (U + 2, kinds, B)
    wrong = torch.stack([(state != fixed_point).float().mean(-1) for state in states])
    informative = (wrong[:-1] - wrong[1:]).abs() + FLOOR
    weights = (
        informative
        * torch.as_tensor(shares, dtype=informative.dtype, device=informative.device)[:, None]
    )
    weights = weights.flatten(0, 1).T  # (B, candidates)
    pick = torch.as_tensor(draw.pick, dtype=weights.dtype, device=weights.device)[:, None]
    below = weights.cumsum(1) / weights.sum(1, keepdim=True) <= pick
    chosen = below.sum(1).clamp(max=weights.shape[1] - 1)  # (B,)
    candidates = torch.stack(states[:-1]).flatten(0, 1)  # (candidates, B, n)
    return candidates[chosen, torch.arange(len(chosen), device=chosen.device)]
