r"""A coarse branch parallel to the first layers, for early exits: one token per control step
(Splitformer, arXiv 2506.18035).

    tokens of step 0   1   2        (A each; embeddings, as the first layer reads them)
                   |   |   |
                   p0  p1  p2       pooled
                   h0  h1  h2       one small layer, causal over steps
                     \   \
    tokens of step 0   1   2        a prediction in step u gets h of step u - 1, in step 0 nothing

The branch reads whole steps only, so no logit depends on a later token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CoarseBranch(nn.Module):
    """A coarse view of a block, which is added to the hidden vectors at one depth; initially zero.

    Multiply-adds per step: A * d * w to pool, w * d to spread, and those of the layer.

    Args:
        layer: Called as ``layer(x (B, T, w), mask (T, T))``, True where attention is allowed.
        inner: Width ``w`` of the layer.
        width: Width ``d`` of the backbone.
        step: Tokens ``A`` of a control step.
    """

    def __init__(self, layer: nn.Module, inner: int, width: int, step: int) -> None:
        super().__init__()
        self.step, self.layer = step, layer
        self.pool = nn.Sequential(
            nn.Linear(step * width, inner, bias=False), nn.LayerNorm(inner, bias=False)
        )
        self.spread = nn.Linear(inner, width, bias=False)
        nn.init.zeros_(self.spread.weight)

    def forward(self, block: Tensor) -> Tensor:
        """The summand (B, k, d) for the first k tokens of a block, embedded (B, k, d)."""
        batch, k, width = block.shape
        steps = k // self.step
        if not steps:
            return torch.zeros_like(block)
        # (B, T, w)
        pooled = self.pool(block[:, : steps * self.step].reshape(batch, steps, self.step * width))
        seen = self.layer(
            pooled, torch.ones(steps, steps, dtype=torch.bool, device=block.device).tril()
        )
        spread = F.pad(self.spread(seen), (0, 0, 1, 0))  # (B, T + 1, d), nothing in front
        return spread.repeat_interleave(self.step, dim=1)[:, 1 : k + 1]  # token i predicts i + 1
