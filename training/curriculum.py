"""Draw the states that teach most: those that the student's next update changes (ExIt, arXiv
2509.04575).

The candidates of a row are the guesses of each kind after 0, 1, ... updates by the student. The
weight of a candidate is the change of its distance to the fixed point by the next update: without a
change, the state has converged or the student cannot improve it. A candidate is drawn in proportion
to this weight times the share of its guess in inference.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ceed_vla.training.corruption import StateDraw, all_guesses, with_first

FLOOR = 0.05  # least weight of a candidate, as a share of the tokens


@torch.no_grad()
def informative_states(
    policy: Any,
    embeddings: Any,
    previous: Tensor,
    fixed_point: Tensor,
    live: Tensor,
    draw: StateDraw,
    max_updates: int,
    shares: NDArray[Any],
) -> Tensor:
    """Draw states (B, n), each among the candidates of its row.

    It takes ``max_updates + 1`` packed forwards of all kinds. The arguments are those of
    `ceed_vla.training.corruption.online_states`, the teacher's fixed points (B, n), their
    `live` slots (B, n), and the `shares` (kinds,) of the kinds of guesses.
    """
    # (kinds, B, n) for each number of updates
    states = [with_first(all_guesses(policy, previous, draw), fixed_point)]
    for _ in range(max_updates + 1):
        _, logits = policy.backbone.packed_logits(embeddings, list(states[-1]))
        states.append(torch.stack([scores.argmax(-1) for scores in logits]))
    # (U + 2, kinds, B)
    weight = live / live.sum(-1, keepdim=True).clamp(min=1)  # (B, n)
    wrong = torch.stack([((state != fixed_point) * weight).sum(-1) for state in states])
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
