"""Base of the action vocabularies: the settings that ``--policy.action_tokens.type`` chooses, and
the tokenizer that they build.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import draccus
import torch
from torch import Tensor

from ceed_vla.choices import Choice
from ceed_vla.errors import ConfigError, TokenError
from ceed_vla.fields import Checked, ranged, short
from ceed_vla.tensors import check_tokens
from ceed_vla.tokens.guesses import GUESSES, check_frozen, check_shift

if TYPE_CHECKING:
    from ceed_vla.tokens.grammar import Grammar

ACTIONS = "[-1e9, 1e9]"  # allowed actions in any unit: metres, degrees or ticks of an encoder


def check_ends(low: Sequence[float], high: Sequence[float]) -> None:
    """Raise `ConfigError` if `action_low` and `action_high` differ in length."""
    if len(low) != len(high):
        raise ConfigError(
            f"action_low has {len(low)} values, action_high {len(high)}; set one of each per "
            "dimension."
        )


def from_front(gripper_dims: Sequence[int], action_dim: int) -> tuple[int, ...]:
    """Sorted non-negative indices of dimensions; negative ones count from the end."""
    bad = [d for d in gripper_dims if not -action_dim <= d < action_dim]
    if bad:
        raise ConfigError(
            f"gripper_dims has {bad}; it must be in [{-action_dim}, {action_dim - 1}], as there "
            f"are {action_dim} action dimensions."
        )
    return tuple(sorted({int(d) % action_dim for d in gripper_dims}))


class ActionTokens(abc.ABC):
    """Converts chunks of ``m`` actions of ``A`` dimensions to blocks of ``n`` tokens, and back."""

    action_dim: int  # action dimensions ``A``
    chunk_steps: int  # steps ``m`` of a chunk
    block_length: int  # tokens ``n`` of a block
    vocabulary_size: int  # values ``V`` of one token
    # Tokens of one step, in order of time; None if tokens do not belong to steps. Then no step can
    # be frozen, and a block is executed as a whole or not at all.
    tokens_per_step: int | None
    # Whether neighbouring tokens stand for neighbouring actions; set from the settings.
    ordered: bool = True
    # Whether the actions are those that the preprocessor has normalised.
    normalised: bool = False
    # Token that ends a block; None if all blocks have fixed length.
    stop: int | None = None
    zero: Tensor  # (n,) int64, the block nearest "do not move"
    gripper_dims: tuple[int, ...] = ()  # two-valued dimensions, as non-negative indices
    low: Tensor  # (A,) float64, smallest action [action units]
    high: Tensor  # (A,) float64, largest action [action units]
    # Rules for the tokens that can complete a chunk; None if all can, or if this is unknown.
    grammar: Grammar | None = None
    clipped: int = 0  # values outside [low, high] that `encode` has clipped since construction

    @abc.abstractmethod
    def encode(self, actions: Tensor) -> Tensor:
        """Convert finite `actions` (B, m, A) to tokens (B, n) int64.

        Values out of range are clipped and counted.

        Raises:
            TokenError: Another shape, NaN or infinity, or a chunk that is too long for a block.
        """

    @abc.abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Convert `tokens` (B, n) to actions (B, m, A) float32 [action units].

        Raises:
            TokenError: Another shape, or a value outside the vocabulary.
            MalformedChunkError: The tokens of a row are not a chunk.
        """

    def readable(self, tokens: Tensor) -> Tensor:
        """The rows (B,) bool of `tokens` (B, n) that decode to a chunk: all, unless a vocabulary
        overrides this.
        """
        check_tokens(tokens, "tokens", (None, self.block_length), 0)
        return torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)

    def weight(self, tokens: Tensor, padded: Tensor | None = None) -> Tensor:
        """Weights (B, n) float32 of `tokens` (B, n) in a loss: 0 in steps that are `padded` (B,
        m).
        """
        check_tokens(tokens, "tokens", (None, self.block_length), 0)
        if padded is not None and getattr(padded, "shape", None) != (len(tokens), self.chunk_steps):
            raise TokenError(
                f"padded is {short(padded)}; expected ({len(tokens)}, {self.chunk_steps}) booleans."
            )
        if padded is None or self.tokens_per_step is None:
            return torch.ones_like(tokens, dtype=torch.float32)
        return (~padded.bool()).repeat_interleave(self.tokens_per_step, dim=1).float()

    def guess(
        self,
        kind: str,
        rows: int,
        previous: Tensor | None = None,
        shift_steps: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Make initial guesses (B, n) int64 for Jacobi decoding.

        Args:
            kind: "random" (uniform tokens), "mid" (`zero`), or "previous" (the previous chunk
                without its executed steps, its last step repeated; "mid" in rows without a previous
                chunk).
            rows: Rows ``B``.
            previous: Tokens (B, n) of the previous chunk; -1 in rows that have none.
            shift_steps: Steps of the previous chunk that were executed.
            generator: Random source on the CPU, so that a seed gives the same tokens on every
                device; torch's default if None.

        Raises:
            ConfigError: `kind` is unknown.
            TokenError: `previous` or `shift_steps` do not fit.
        """
        if kind not in GUESSES:
            raise ConfigError(f"The guess is {short(kind)}; choose one of {', '.join(GUESSES)}.")
        if previous is not None:
            shape = (rows, self.block_length)
            check_tokens(previous, "The previous chunk", shape, self.vocabulary_size, none=True)
        check_shift(shift_steps, self.chunk_steps)
        if kind == "random":
            return self.random_block(rows, generator)
        mid = self.zero.repeat(rows, 1)  # (B, n)
        if kind == "mid" or previous is None:
            return mid
        return self.shifted(previous.long(), mid.to(previous.device), shift_steps)

    def random_block(self, rows: int, generator: torch.Generator | None) -> Tensor:
        """Random tokens (B, n)."""
        return torch.randint(self.vocabulary_size, (rows, self.block_length), generator=generator)

    def with_frozen(
        self, guess: Tensor, previous: Tensor | None, shift_steps: int, frozen_steps: int
    ) -> Tensor:
        """Replace the first steps of a guess by frozen steps of the previous chunk.

        Args:
            guess: (B, n) the guess.
            previous: (B, n) tokens of the previous chunk.
            shift_steps: Steps of the previous chunk that were executed.
            frozen_steps: Steps behind these that are copied to the start of the guess.

        Returns:
            (B, n).

        Raises:
            ConfigError: Tokens do not belong to steps.
            TokenError: `previous` does not have these steps.
        """
        width = self.tokens_per_step
        if width is None:
            raise ConfigError(
                f"frozen_steps is {short(frozen_steps)}; it must be 0, as tokens of variable "
                "length do not belong to steps. Leave it at 0."
            )
        check_frozen(frozen_steps, shift_steps, self.chunk_steps)
        if previous is None or bool((previous[:, 0] < 0).any()):
            raise TokenError(
                f"frozen_steps is {frozen_steps}, but a row has no previous chunk to copy steps "
                "from. Pass previous for every row, or set frozen_steps to 0."
            )
        start = shift_steps * width
        end = start + frozen_steps * width
        frozen = previous[:, start:end].to(guess)  # (B, k * width)
        return torch.cat([frozen, guess[:, end - start :]], dim=1)

    def shifted(self, previous: Tensor, mid: Tensor, steps: int) -> Tensor:
        """Shift `previous` (B, n) by `steps` and repeat its last step; rows of -1 become those of
        `mid` (B, n).
        """
        assert self.tokens_per_step is not None
        width = self.tokens_per_step
        repeated = previous[:, self.block_length - width :].repeat(1, steps)
        return torch.where(
            previous[:, :1] < 0, mid, torch.cat([previous[:, steps * width :], repeated], dim=1)
        )


@dataclass
class ActionTokensConfig(Choice, Checked, draccus.ChoiceRegistry, abc.ABC):
    """Base of the settings of all vocabularies.

    Attributes:
        listed: Names of the settings that have one value per action dimension, or are empty until
            they are fitted.
        gripper_dims: Two-valued action dimensions, which decode to their two values exactly.
    """

    setting: ClassVar[str] = "action_tokens"
    usual: ClassVar[str] = "uniform"
    # Whether neighbouring tokens stand for neighbouring actions, as soft labels require.
    ordered: ClassVar[bool] = True

    listed: ClassVar[tuple[str, ...]] = ()

    gripper_dims: list[int] = ranged([-1], "[-1000, 1000]")

    @abc.abstractmethod
    def build(self, chunk_steps: int, action_dim: int) -> ActionTokens:
        """Build the vocabulary for chunks of ``m`` steps of ``A`` dimensions."""

    @property
    @abc.abstractmethod
    def vocabulary_size(self) -> int:
        """Values ``V`` of one token."""

    def block_length(self, chunk_steps: int, action_dim: int) -> int:
        """Tokens ``n`` of one block."""
        return chunk_steps * action_dim

    def fit(self, action_dim: int, action_stats: Mapping[str, Any] | None) -> None:
        """Set what depends on the data, once, when a policy is created.

        Args:
            action_dim: Action dimensions ``A``.
            action_stats: LeRobot's statistics of the actions, or None.
        """

    def validate_features(self, action_dim: int) -> None:
        """Raise `ConfigError` if the settings do not fit the action."""
        self.gripper_indices(action_dim)
        for name in self.listed:
            if (count := len(getattr(self, name))) not in (0, action_dim):
                raise ConfigError(
                    f"{name} has {count} values, the action has {action_dim} dimensions; set one "
                    "per dimension."
                )

    def gripper_indices(self, action_dim: int) -> tuple[int, ...]:
        """`gripper_dims` as non-negative indices."""
        return from_front(self.gripper_dims, action_dim)
