"""What an action vocabulary is: the settings that ``--policy.action_tokens.type`` chooses, and what
these build.
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

if TYPE_CHECKING:
    from ceed_vla.tokens.grammar import Grammar

ACTIONS = "[-1e9, 1e9]"  # whatever the unit: metres, degrees or ticks of an encoder
GUESSES = ("previous", "mid", "random")


def check_ends(low: Sequence[float], high: Sequence[float]) -> None:
    """Refuse `action_low` and `action_high` of two lengths."""
    if len(low) != len(high):
        raise ConfigError(
            f"action_low has {len(low)} values, action_high {len(high)}; give one of each a "
            "dimension."
        )


def from_front(gripper_dims: Sequence[int], action_dim: int) -> tuple[int, ...]:
    """Dimensions of which negative ones count from the end, as sorted non-negative indices."""
    bad = [d for d in gripper_dims if not -action_dim <= d < action_dim]
    if bad:
        raise ConfigError(f"gripper_dims {bad} lie outside the {action_dim} action dimensions.")
    return tuple(sorted({int(d) % action_dim for d in gripper_dims}))


class ActionTokens(abc.ABC):
    """Writes chunks of ``m`` actions of ``A`` dimensions as blocks of ``n`` tokens, and reads
    them.
    """

    action_dim: int  # action dimensions ``A``
    chunk_steps: int  # steps ``m`` of a chunk
    block_length: int  # tokens ``n`` of a block
    vocabulary_size: int  # values ``V`` of one token
    # Tokens of one step, in order of time; None where a token belongs to no step. Then nothing can
    # be frozen, and a block is executed as a whole or not at all.
    tokens_per_step: int | None
    # whether neighbouring tokens stand for neighbouring actions, as the settings say
    ordered: bool = True
    # whether it writes what the pre-processor makes of a data set's actions
    normalised: bool = False
    # token behind which a block holds nothing; None where every block is full
    stop: int | None = None
    zero: Tensor  # (n,) int64, the block nearest "do not move"
    gripper_dims: tuple[int, ...] = ()  # two-valued dimensions, as non-negative indices
    low: Tensor  # (A,) float64, smallest action [action units]
    high: Tensor  # (A,) float64, largest action [action units]
    # which tokens can complete a chunk; None where all can, or nobody knows
    grammar: Grammar | None = None
    clipped: int = 0  # values outside [low, high] that `encode` has clipped since construction

    @abc.abstractmethod
    def encode(self, actions: Tensor) -> Tensor:
        """Tokens (B, n) int64 of finite `actions` (B, m, A); values out of range are clipped and
        counted.

        `TokenError` for another shape, NaN or infinity, or a chunk that no block can hold.
        """

    @abc.abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Actions (B, m, A) float32 [action units] of `tokens` (B, n).

        `TokenError` for another shape or what lies outside the vocabulary, `MalformedChunkError`
        for rows of no chunk.
        """

    def readable(self, tokens: Tensor) -> Tensor:
        """Which rows (B,) bool of `tokens` (B, n) stand for a chunk: all, unless a vocabulary says
        otherwise.
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
                f"padded is {short(padded)}; expected ({len(tokens)}, {self.chunk_steps}) true or "
                "false."
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
        """First states (B, n) int64 of Jacobi decoding.

        Args:
            kind: "random" (uniform tokens), "mid" (`zero`), or "previous" (the previous chunk
                without the steps that were executed, its last step repeated; "mid" in rows that
                have none).
            rows: Rows ``B``.
            previous: Tokens (B, n) of the previous chunk; rows of -1 have none.
            shift_steps: Steps of it that were executed.
            generator: Random source, on the CPU so that a seed means the same tokens on every
                device; torch's if None.
        """
        if kind not in GUESSES:
            raise ConfigError(f"The guess is {short(kind)}; choose one of {', '.join(GUESSES)}.")
        if previous is not None:
            shape = (rows, self.block_length)
            check_tokens(previous, "The previous chunk", shape, self.vocabulary_size, none=True)
        if type(shift_steps) is not int or not 0 <= shift_steps <= self.chunk_steps:
            raise TokenError(
                f"shift_steps is {short(shift_steps)}; it must be whole steps in [0, "
                f"{self.chunk_steps}]."
            )
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
        """`guess` (B, n) with the steps of `previous` (B, n) behind its first `shift_steps` as its
        own first `frozen_steps`.

        `ConfigError` where tokens belong to no step, `TokenError` where `previous` lacks these
        steps.
        """
        width = self.tokens_per_step
        if width is None:
            raise ConfigError(
                f"frozen_steps is {short(frozen_steps)}; tokens of variable length belong to no "
                "step, so none can be frozen. Leave it at 0."
            )
        most = min(self.chunk_steps - shift_steps, self.chunk_steps - 1)
        if type(frozen_steps) is not int or not 0 <= frozen_steps <= most:
            raise TokenError(
                f"frozen_steps is {short(frozen_steps)}; it must be in [0, {most}]: the steps of "
                f"the previous chunk behind the {shift_steps} executed ones, and one step less "
                "than a chunk."
            )
        if previous is None or bool((previous[:, 0] < 0).any()):
            raise TokenError(
                f"frozen_steps is {frozen_steps}, but there is no previous chunk whose steps could "
                "stay in every row. Pass it as previous, or freeze none."
            )
        start = shift_steps * width
        end = start + frozen_steps * width
        kept = previous[:, start:end].to(guess)  # (B, k * width)
        return torch.cat([kept, guess[:, end - start :]], dim=1)

    def shifted(self, previous: Tensor, mid: Tensor, steps: int) -> Tensor:
        """`previous` (B, n) without its first `steps`, its last step repeated; `mid` (B, n) in rows
        of -1.
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
        listed: Settings that have one value for every action dimension, or are empty until they are
            filled.
        gripper_dims: Two-valued action dimensions, which decode to their two values exactly.
    """

    setting: ClassVar[str] = "action_tokens"
    usual: ClassVar[str] = "uniform"
    # neighbouring tokens stand for neighbouring actions: soft labels make sense
    ordered: ClassVar[bool] = True

    listed: ClassVar[tuple[str, ...]] = ()

    gripper_dims: list[int] = ranged([-1], "[-1000, 1000]")

    @abc.abstractmethod
    def build(self, chunk_steps: int, action_dim: int) -> ActionTokens:
        """The vocabulary for chunks of ``m`` steps of ``A`` dimensions."""

    @property
    @abc.abstractmethod
    def vocabulary_size(self) -> int:
        """Values ``V`` of one token."""

    def block_length(self, chunk_steps: int, action_dim: int) -> int:
        """Tokens ``n`` of one block."""
        return chunk_steps * action_dim

    def fit(self, action_dim: int, action_stats: Mapping[str, Any] | None) -> None:
        """Fill what the data define, once, when a policy is new; `action_stats` are LeRobot's, or
        None.
        """

    def validate_features(self, action_dim: int) -> None:
        """Raise `ConfigError` if the settings do not fit the action."""
        self.gripper_indices(action_dim)
        for name in self.listed:
            if (count := len(getattr(self, name))) not in (0, action_dim):
                raise ConfigError(f"{name} has {count} values, the action has {action_dim}.")

    def gripper_indices(self, action_dim: int) -> tuple[int, ...]:
        """`gripper_dims` as non-negative indices."""
        return from_front(self.gripper_dims, action_dim)
