"""A teacher whose parallel decoding begins from its student's chunk: exact, like the teacher
alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ceed_vla.errors import ConfigError
from ceed_vla.sim.environment import Bundle
from ceed_vla.sim.rollout import Chunk, PolicyRunner


class DraftedRunner(PolicyRunner):
    """Strict Jacobi decoding of the executed steps, from what another policy writes: its forwards
    and layers count.

    Args:
        draft: The other one's runner; it is warm-started from this one's last chunk.

    `ConfigError`: The two write other tokens.
    """

    def __init__(
        self, bundle: Bundle, draft: PolicyRunner, executed_steps: int | None, delay: int
    ) -> None:
        super().__init__(bundle, "jacobi_h", None, executed_steps, delay)
        self.draft, self.shift = draft, 0
        own, other = self.policy.config, draft.policy.config
        if (own.block_length, own.action_tokens) != (other.block_length, other.action_tokens):
            raise ConfigError(
                "A teacher can begin from its student's chunk only where both write the same "
                "tokens."
            )

    @property
    def alone(self) -> bool:
        return self.draft.alone

    def decode(
        self, observations: Any, instructions: Any, previous: Any, frozen: Any = ()
    ) -> list[Chunk]:
        """As `PolicyRunner.decode`, from the other one's chunk."""
        drafts = self.draft.decode(observations, instructions, previous, frozen)
        chunks = super().decode(
            observations, instructions, [draft.tokens for draft in drafts], frozen
        )
        return [
            replace(
                chunk,
                forwards=draft.forwards + chunk.forwards,
                block_layers=draft.block_layers + chunk.block_layers,
                prefix_layers=draft.prefix_layers + chunk.prefix_layers,
                seconds={
                    **chunk.seconds,
                    **{k: draft.seconds[k] + chunk.seconds[k] for k in ("prefill", "decode")},
                },
            )
            for draft, chunk in zip(drafts, chunks, strict=True)
        ]
