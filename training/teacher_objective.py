"""The loss of a teacher's training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.supervision import grounding_loss


class TeacherObjective(nn.Module):
    """Loss of demonstrations plus auxiliary loss of grounding frames, in one call, as DDP needs."""

    def __init__(self, policy: CeedVLAPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        batch: dict[str, Tensor] | None,
        grounding: dict[str, Tensor] | None,
        share: float,
        grounding_share: float,
    ) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss and its parts.

        Args:
            batch: Demonstrations, or None.
            grounding: Grounding frames, or None.
            share: Weight of `batch`, see `Run.share`.
            grounding_share: Weight of `grounding`, see `Run.share`.
        """
        parts: dict[str, float] = {}
        total: Any = 0.0
        if batch is not None:
            loss, parts = self.policy(batch)
            total = share * loss
            parts = {name: share * value for name, value in parts.items()}
        if grounding is not None:
            loss = grounding_share * grounding_loss(self.policy, grounding)
            parts["grounding_loss"] = loss.item()
            total = total + self.policy.config.auxiliary_weight * loss
        return total, parts
