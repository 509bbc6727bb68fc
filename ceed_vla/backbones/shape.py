"""What a model must fit: all that a family reads of a policy's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ceed_vla.tokens.base import ActionTokensConfig


@dataclass(frozen=True)
class PolicyShape:
    """Inputs and outputs of a policy.

    Attributes:
        cameras: Feature -> (3, height, width) [px], in the order of the prefix.
        state_dim: Length of ``observation.state``; 0 without one.
        action_dim: Action dimensions ``A``.
        chunk_size: Steps ``m`` of a chunk.
        action_tokens: How actions become tokens.
        auxiliary_dim: Outputs of the grounding regression; 0 for none.
        device: Where the policy is going to run.
    """

    cameras: Mapping[str, tuple[int, int, int]]
    state_dim: int
    action_dim: int
    chunk_size: int
    action_tokens: ActionTokensConfig
    auxiliary_dim: int = 0
    device: str = "cpu"

    # Computed when they are asked for: tokens that are fitted on the data have neither before.

    @property
    def block_length(self) -> int:
        """Tokens ``n`` of a block."""
        return self.action_tokens.block_length(self.chunk_size, self.action_dim)

    @property
    def vocabulary_size(self) -> int:
        """Values ``V`` of a token."""
        return self.action_tokens.vocabulary_size
