"""The loss of a teacher's training."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.supervision import grounding_loss
from ceed_vla.training.imitation import IMITATED, Imitated


class TeacherObjective(nn.Module):
    """Loss of demonstrations plus auxiliary loss of grounding frames, in one call, as DDP needs.

    Args:
        policy: The policy that learns.
        imitated: Another policy that it learns from, too; a batch then has its observation.
    """

    def __init__(self, policy: CeedVLAPolicy, imitated: Imitated | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.imitated = imitated

    def forward(
        self,
        batch: dict[str, Any] | None,
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
            other: dict[str, Any] = {}
            if self.imitated is not None and IMITATED in batch:  # not in held-out frames
                batch = dict(batch)
                other["imitated"] = partial(self.imitated.logits, batch.pop(IMITATED))
            loss, parts = self.policy(batch, **other)
            total = share * loss
            parts = {name: share * value for name, value in parts.items()}
        if grounding is not None:
            loss = grounding_share * grounding_loss(self.policy, grounding)
            parts["grounding_loss"] = loss.item()
            total = total + self.policy.config.auxiliary_weight * loss
        return total, parts
