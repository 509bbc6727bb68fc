"""What exit rules measure of the logits of a slot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEAR = 2  # bins on each side of the argmax that count as the same decision


def mass_near(logits: Tensor, tokens: Tensor) -> Tensor:
    """Probability mass (B, k) within `NEAR` bins of `tokens` (B, k), under `logits` (B, k, V)."""
    # (B, k, V + 4): no mass past the ends
    padded = F.pad(logits.float(), (NEAR, NEAR), value=-torch.inf)
    near = tokens.unsqueeze(-1) + torch.arange(2 * NEAR + 1, device=tokens.device)  # (B, k, 5)
    mass = (padded.gather(-1, near) - padded.logsumexp(-1, keepdim=True)).exp().sum(-1)  # (B, k)
    return mass.clamp(max=1)  # rounding


def lead(logits: Tensor) -> Tensor:
    """Probability (B, k) by which the best token leads the next one, under `logits` (B, k, V)."""
    best, second = logits.float().topk(2, dim=-1).values.unbind(-1)  # (B, k)
    total = logits.float().logsumexp(-1)
    return (best - total).exp() - (second - total).exp()
