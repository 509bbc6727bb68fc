"""A trained policy whose predictions a new one learns in addition to the demonstrated actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ceed_vla.backbones.capabilities import check_whole_prefix
from ceed_vla.checkpoints import load
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.errors import ConfigError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy

IMITATED = "imitated"  # its preprocessed observation in a batch


def _meaning(config: CeedVLAConfig) -> dict[str, Any]:
    """What decides the actions that tokens stand for."""
    settings = asdict(config.action_tokens)
    grippers = {dim % config.action_dim for dim in config.action_tokens.gripper_dims}
    return {**settings, "type": config.action_tokens.type, "gripper_dims": grippers}


class Imitated:
    """The frozen policy; the two may have different backbones, and its chunks may be shorter.

    Args:
        path: Its checkpoint.
        learner: The policy that learns from it.
        post: The learner's postprocessor.

    Raises:
        CheckpointError: See `load`.
        ConfigError: The two policies have other action tokens, or its chunks are longer.
    """

    def __init__(self, path: str, learner: CeedVLAPolicy, post: Any) -> None:
        self.policy, self.pre, own_post = load(path, learner.config.device)
        self.policy.requires_grad_(False)
        check_whole_prefix(self.policy, "--imitate")
        own, other = learner.config, self.policy.config
        fits = own.action_dim == other.action_dim and _meaning(own) == _meaning(other)
        # tokens that belong to no step do not begin a longer block
        if self.policy.tokenizer.tokens_per_step is None or own.chunk_size < other.chunk_size:
            fits = fits and own.chunk_size == other.chunk_size
        if not fits:
            what = ", ".join(
                f"{name} has chunks of {c.chunk_size} steps, {c.action_dim} dimensions and "
                f"{c.action_tokens.type} tokens of {c.action_tokens.vocabulary_size} values"
                for name, c in (("it", other), ("the new policy", own))
            )
            raise ConfigError(
                f"imitate is {path}, whose action tokens differ: {what}; all settings of "
                "--policy.action_tokens must be equal, the ranges too, and its chunks at most as "
                "long."
            )
        if learner.tokenizer.normalised:
            probe = torch.linspace(-1.0, 1.0, 5)[:, None].expand(-1, own.action_dim)
            if not torch.allclose(own_post(probe.clone()), post(probe.clone())):
                raise ConfigError(
                    f"imitate is {path}, whose tokens are of actions normalised by the statistics "
                    "of other data; continue from it instead (--policy.path)."
                )

    def observation(self, frames: Mapping[str, Any]) -> dict[str, Any]:
        """Preprocess frames for this policy."""
        found: dict[str, Any] = self.pre(dict(frames))
        self.policy.check_observation(found)
        return found

    @torch.no_grad()
    def logits(self, observation: dict[str, Any], tokens: Tensor) -> Tensor:
        """Logits (B, k, V) of the tokens (B, n) of a chunk, for the k of its own chunks."""
        backbone = self.policy.backbone
        tokens = tokens[:, : self.policy.tokenizer.block_length]
        _, (logits,) = backbone.packed_logits(backbone.embed_prefix(observation), [tokens])
        return logits
