"""How a policy writes actions as tokens: one dataclass a scheme, chosen by ``--policy.action_tokens.type``."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import draccus

from ceed_vla.choices import Choice
from ceed_vla.errors import ConfigError
from ceed_vla.fields import check_fields, chosen, ranged

if TYPE_CHECKING:
    from ceed_vla.action_tokens import ActionTokens

ACTIONS = "[-1e6, 1e6]"  # whatever the unit: metres, degrees or ticks of an encoder
ACTION_RANGES = ("quantile", "min_max", "fixed")


@dataclass
class ActionTokensConfig(Choice, draccus.ChoiceRegistry, abc.ABC):
    """Base of all schemes.

    Attributes:
        gripper_dims: Two-valued action dimensions; never relaxed by a tolerance.
    """

    setting: ClassVar[str] = "action_tokens"
    usual: ClassVar[str] = "uniform"
    ordered: ClassVar[bool] = (
        True  # neighbouring tokens stand for neighbouring actions: soft labels make sense
    )

    gripper_dims: list[int] = ranged([-1], "[-1000, 1000]")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    @abc.abstractmethod
    def vocabulary(self) -> int:
        """Values ``V`` of one token."""

    def block_length(self, chunk_steps: int, action_dim: int) -> int:
        """Tokens ``n`` of one block."""
        return chunk_steps * action_dim

    def fit(self, action_dim: int, action_stats: Mapping[str, Any] | None) -> None:
        """Fill what the data define, once, when a policy is new.

        Args:
            action_dim: Action dimensions ``A``.
            action_stats: LeRobot statistics of the action, or None.

        Raises:
            ConfigError: The statistics are needed and missing or unusable.
        """

    @abc.abstractmethod
    def build(self, chunk_steps: int, action_dim: int) -> ActionTokens:
        """The tokenizer for chunks of ``m`` steps of ``A`` dimensions."""

    def validate_features(self, action_dim: int) -> None:
        """Raise `ConfigError` if the settings do not fit the action."""
        bad = [d for d in self.gripper_dims if not -action_dim <= d < action_dim]
        if bad:
            raise ConfigError(f"gripper_dims {bad} lie outside the {action_dim} action dimensions.")

    def gripper_indices(self, action_dim: int) -> tuple[int, ...]:
        """`gripper_dims` as non-negative indices."""
        return tuple(sorted({d % action_dim for d in self.gripper_dims}))


@ActionTokensConfig.register_subclass("uniform")
@dataclass
class UniformTokensConfig(ActionTokensConfig):
    """One uniform grid of bin centres for every action dimension (`ceed_vla.action_tokens.ActionTokenizer`).

    Attributes:
        num_bins: Values of one action token. Odd numbers put zero exactly on a bin centre.
        action_range: Where the bins end: "quantile" (1 % and 99 %), "min_max" (of the data), or "fixed"
            (`action_low`, `action_high`). Quantiles break dimensions that are nearly always zero.
        action_low: Lower end of every action dimension [the data set's units]; filled from the data unless fixed.
        action_high: Upper end of every action dimension [the data set's units].
        gripper_dims: Two-valued action dimensions; always min/max, decoded exactly, never relaxed by a tolerance.
    """

    num_bins: int = ranged(255, "[2, 65536]")
    action_range: str = chosen("quantile", ACTION_RANGES)
    action_low: list[float] = ranged([], ACTIONS)
    action_high: list[float] = ranged([], ACTIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.action_low) != len(self.action_high):
            raise ConfigError(
                f"action_low has {len(self.action_low)} values and action_high {len(self.action_high)}; "
                "give one of each for every action dimension."
            )
        if self.action_range == "fixed" and not self.action_low:
            raise ConfigError('action_range "fixed" needs action_low and action_high, one value a dimension.')

    @property
    def vocabulary(self) -> int:
        return self.num_bins

    def fit(self, action_dim: int, action_stats: Mapping[str, Any] | None) -> None:
        from ceed_vla.action_tokens import ranges_from_stats

        if self.action_low:
            return
        if action_stats is None:
            raise ConfigError(
                f'action_range "{self.action_range}" needs the data set\'s action statistics, or set '
                'action_range="fixed" with action_low and action_high.'
            )
        low, high = ranges_from_stats(
            action_stats, self.action_range, self.gripper_indices(action_dim), self.num_bins
        )
        self.action_low, self.action_high = [float(v) for v in low], [float(v) for v in high]

    def build(self, chunk_steps: int, action_dim: int) -> ActionTokens:
        from ceed_vla.action_tokens import ActionTokenizer

        grippers = self.gripper_indices(action_dim)
        return ActionTokenizer(self.action_low, self.action_high, chunk_steps, self.num_bins, grippers)

    def validate_features(self, action_dim: int) -> None:
        super().validate_features(action_dim)
        if self.action_low and len(self.action_low) != action_dim:
            raise ConfigError(
                f"action_low/action_high have {len(self.action_low)} values, the action has {action_dim}."
            )


@ActionTokensConfig.register_subclass("openvla")
@dataclass
class OpenVLATokensConfig(ActionTokensConfig):
    """OpenVLA's tokens: equidistant bins between two quantiles (`ceed_vla.openvla_tokens.OpenVLATokenizer`).

    Attributes:
        n_action_bins: Edges of the bins, and values of one token.
        unnorm_key: Data set the quantiles come from; a name only.
        q01: Lower quantile of every action dimension; filled from the data if empty.
        q99: Upper quantile of every action dimension; filled from the data if empty.
        mask: Dimensions that are normalised; filled with all but `gripper_dims` if empty.
    """

    n_action_bins: int = ranged(256, "[3, 65536]")
    unnorm_key: str = ""
    q01: list[float] = ranged([], ACTIONS)
    q99: list[float] = ranged([], ACTIONS)
    mask: list[bool] = field(default_factory=list)

    @property
    def vocabulary(self) -> int:
        return self.n_action_bins

    def fit(self, action_dim: int, action_stats: Mapping[str, Any] | None) -> None:
        from ceed_vla.action_tokens import ranges_from_stats

        if not self.q01:
            if action_stats is None:
                raise ConfigError(
                    "q01 and q99 are empty, and there are no action statistics to take them from."
                )
            self.q01, self.q99 = ranges_from_stats(
                action_stats, "quantile", self.gripper_indices(action_dim), self.n_action_bins
            )
        if not self.mask:
            self.mask = [d not in self.gripper_indices(action_dim) for d in range(action_dim)]

    def build(self, chunk_steps: int, action_dim: int) -> ActionTokens:
        from ceed_vla.openvla_tokens import OpenVLATokenizer

        grippers = self.gripper_indices(action_dim)
        return OpenVLATokenizer(self.q01, self.q99, self.mask, chunk_steps, self.n_action_bins, grippers)

    def validate_features(self, action_dim: int) -> None:
        super().validate_features(action_dim)
        for name in ("q01", "q99", "mask"):
            if (count := len(getattr(self, name))) not in (0, action_dim):
                raise ConfigError(f"{name} has {count} values, the action has {action_dim}.")
