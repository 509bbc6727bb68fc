"""The loss of ``ceed-vla improve``: serial groups move the prediction of the first forward.

After S-GRPO (arXiv 2505.07686). The states of one decode path, one per forward, are a group. Its
members' rewards are success times ``decay ** forwards``, their advantages the differences to the
group's mean. The first forward from the same guess learns to predict, with clipped ratios as in
PPO, the tokens of members with a positive advantage rather than those with a negative one. So what
only a later forward found, and what solved the task, comes sooner. The leash, a divergence from the
policy at the start, covers the prediction behind the last state, too, so that fixed points stay.

S-GRPO's model samples; a decoder takes the most probable tokens. The members differ here because
the forwards do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ceed_vla.starts import SerialGroup
from ceed_vla.supervision import divergence


@dataclass
class Batch:
    """Groups as tensors: B groups of K states of E executed tokens."""

    inputs: dict[str, Tensor]  # of the policy, (B, ...)
    guess: Tensor  # (B, n)
    last: Tensor  # the last state, (B, n)
    tokens: Tensor  # (B, K, E)
    advantage: Tensor  # (B, K); 0 where a group has fewer states, or no outcomes
    known: Tensor | None = None  # log-probabilities of the tokens before learning, (B, K, E)
    reference: Tensor | None = None  # `predicted` by the policy at the start, (2, B, n, V)


def stacked(groups: Sequence[SerialGroup], decay: float, device: str) -> Batch:
    """Stack groups; shorter ones repeat their last state."""
    most = max(len(group.states) - 1 for group in groups)
    executed = groups[0].executed
    advantage = torch.zeros(len(groups), most)
    tokens = []
    for row, group in enumerate(groups):
        states = group.states[1:, :executed]
        tokens.append(torch.cat([states, states[-1:].expand(most - len(states), -1)]))
        if group.solved:
            rewards = torch.tensor(group.rewards(decay))
            advantage[row, : len(rewards)] = rewards - rewards.mean()
    inputs = {
        name: torch.cat([group.inputs[name] for group in groups]).to(device)
        for name in groups[0].inputs
    }
    guess, last = (torch.stack([group.states[at] for group in groups]) for at in (0, -1))
    return Batch(
        inputs,
        guess.to(device),
        last.to(device),
        torch.stack(tokens).to(device),
        advantage.to(device),
    )


def predicted(policy: Any, batch: Batch) -> Tensor:
    """Logits (2, B, n, V) behind the guess and behind the last state."""
    backbone = policy.backbone
    with torch.no_grad():
        embeddings = backbone.embed_prefix(batch.inputs)
    _, logits = backbone.packed_logits(embeddings, [batch.guess, batch.last])
    return torch.stack(logits)


def chances(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (B, K, E) of tokens (B, K, E), from logits (B, n, V)."""
    executed = logits[:, : tokens.shape[2]].float().log_softmax(-1)
    found = executed.gather(-1, tokens.transpose(1, 2))
    return found.transpose(1, 2)


def loss(logits: Tensor, batch: Batch, clip: float, leash: float) -> tuple[Tensor, Tensor]:
    """The loss of `predicted` logits, and the mean divergence from the policy at the start."""
    assert batch.known is not None
    assert batch.reference is not None
    ratio = (chances(logits[0], batch.tokens) - batch.known).exp()  # (B, K, E)
    advantage = batch.advantage.unsqueeze(-1)
    earned = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    strayed = divergence(batch.reference, logits).mean()
    return leash * strayed - earned.mean(2).sum(1).mean(), strayed
