"""A trained policy whose predictions a new one learns in addition to the demonstrated actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ceed_vla.checkpoints import load
from ceed_vla.errors import ConfigError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy

IMITATED = "imitated"  # its preprocessed observation in a batch


class Imitated:
    """The frozen policy; the two may have different backbones.

    Args:
        path: Its checkpoint.
        learner: The policy that learns from it.

    Raises:
        CheckpointError: See `load`.
        ConfigError: The two policies have other action tokens.
    """

    def __init__(self, path: str, learner: CeedVLAPolicy) -> None:
        self.policy, self.pre, _ = load(path, learner.config.device)
        self.policy.requires_grad_(False)
        own, other = learner.tokenizer, self.policy.tokenizer
        same = own.block_length == other.block_length and all(
            torch.equal(torch.as_tensor(getattr(own, name)), torch.as_tensor(getattr(other, name)))
            for name in ("low", "high", "vocabulary_size")
            if hasattr(own, name) or hasattr(other, name)
        )
        if not same:
            raise ConfigError(
                f"imitate is {path}, whose chunks have {other.block_length} tokens of "
                f"{other.vocabulary_size} values; the new policy must have the same action tokens "
                f"and ranges, and has {own.block_length} of {own.vocabulary_size}."
            )

    def observation(self, frames: Mapping[str, Any]) -> dict[str, Any]:
        """Preprocess frames for this policy."""
        found: dict[str, Any] = self.pre(dict(frames))
        self.policy.check_observation(found)
        return found

    @torch.no_grad()
    def logits(self, observation: dict[str, Any], tokens: Tensor) -> Tensor:
        """Logits (B, n, V) of the tokens (B, n) of a chunk."""
        backbone = self.policy.backbone
        _, (logits,) = backbone.packed_logits(backbone.embed_prefix(observation), [tokens])
        return logits
