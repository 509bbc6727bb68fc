"""OpenVLA's action tokens: 256 ids, 255 bin centres, and normalisation by a dataset's quantiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ceed_vla.errors import ConfigError
from ceed_vla.fields import ranged
from ceed_vla.tensors import check_actions, check_tokens
from ceed_vla.tokens.base import ACTIONS, ActionTokens, ActionTokensConfig
from ceed_vla.tokens.uniform import ranges_from_stats


@ActionTokensConfig.register_subclass("openvla")
@dataclass
class OpenVLATokensConfig(ActionTokensConfig):
    """OpenVLA's tokens: equidistant bins between two quantiles (`OpenVLATokenizer`).

    Attributes:
        n_action_bins: Number of bin edges, and of values of one token.
        unnorm_key: Name of the dataset of the quantiles, for information only.
        q01: Lower quantile of every action dimension; set from the data if empty.
        q99: Upper quantile of every action dimension; set from the data if empty.
        mask: Whether each dimension is normalised; if empty, all are except `gripper_dims` within
            [-1, 1].
    """

    listed = ("q01", "q99", "mask")

    n_action_bins: int = ranged(256, "[3, 65536]")
    unnorm_key: str = ""
    q01: list[float] = ranged([], ACTIONS)
    q99: list[float] = ranged([], ACTIONS)
    mask: list[bool] = field(default_factory=list)

    @property
    def vocabulary_size(self) -> int:
        return self.n_action_bins

    def fit(self, action_dim: int, action_stats: Mapping[str, Any] | None) -> None:
        grippers = self.gripper_indices(action_dim)
        if not self.q01:
            if action_stats is None:
                raise ConfigError(
                    "q01 and q99 are empty, and there are no action statistics of a dataset; pass "
                    "statistics, or set q01 and q99."
                )
            self.q01, self.q99 = ranges_from_stats(
                action_stats, "quantile", grippers, self.n_action_bins
            )
        inside = [low >= -1 and high <= 1 for low, high in zip(self.q01, self.q99, strict=True)]
        self.mask = self.mask or [d not in grippers or not inside[d] for d in range(action_dim)]

    def build(self, chunk_steps: int, action_dim: int) -> ActionTokens:
        return OpenVLATokenizer(self, chunk_steps)


class OpenVLATokenizer(ActionTokens):
    """Converts a chunk of ``m`` actions with ``A`` dimensions to ``n = m * A`` tokens, step-major.

    Dimensions in `mask` are normalised, ``x = 2 (a - q01) / (q99 - q01) - 1``; the others (the
    gripper) are unchanged. `x` in [-1, 1] lies between two of ``V`` equidistant edges. Token ``v``
    decodes to the middle of edges ``v`` and ``v + 1``; the last token, which stands only for ``x =
    1``, decodes to the last middle.

    Args:
        settings: Quantiles, mask and bins.
        chunk_steps: Steps ``m`` of a chunk.

    Raises:
        ConfigError: The quantiles are missing or wrong.
    """

    def __init__(self, settings: OpenVLATokensConfig, chunk_steps: int) -> None:
        q01 = settings.q01
        q99 = settings.q99
        mask = settings.mask
        if not len(q01) == len(q99) == len(mask) > 0:
            raise ConfigError(
                f"q01 has {len(q01)} values, q99 {len(q99)}, mask {len(mask)}; set one of each per "
                "dimension."
            )
        self.action_dim = len(q01)
        self.chunk_steps = chunk_steps
        self.vocabulary_size = settings.n_action_bins
        self.tokens_per_step = self.action_dim
        self.block_length = chunk_steps * self.action_dim
        self.gripper_dims = settings.gripper_indices(self.action_dim)
        self.mask = torch.tensor(mask)  # (A,)
        ones = torch.ones(self.action_dim, dtype=torch.float64)
        self.low = torch.where(self.mask, torch.tensor(q01, dtype=torch.float64), -ones)  # (A,)
        self.high = torch.where(self.mask, torch.tensor(q99, dtype=torch.float64), ones)  # (A,)
        wrong = (self.low > self.high).nonzero()
        if len(wrong):
            d = int(wrong[0])
            raise ConfigError(
                f"Dimension {d} has the quantiles [{q01[d]}, {q99[d]}]; q01 must not exceed q99."
            )
        # numpy's grid, as in OpenVLA; torch's differs in the last bit, and so would decoded
        # actions.
        self._edges = torch.from_numpy(np.linspace(-1.0, 1.0, self.vocabulary_size))  # (V,)
        self._centres = (self._edges[:-1] + self._edges[1:]) / 2  # (V - 1,)
        self.zero = self._bins(
            torch.zeros(1, self.chunk_steps, self.action_dim, dtype=torch.float64)
        ).flatten()
        self.clipped = 0

    def encode(self, actions: Tensor) -> Tensor:
        check_actions(actions, self.chunk_steps, self.action_dim)
        return self._bins(actions.double()).flatten(1)

    def _bins(self, actions: Tensor) -> Tensor:
        """Bins (B, m, A) of float64 actions."""
        low = self.low.to(actions.device)
        high = self.high.to(actions.device)
        # Dimensions outside the mask have the range [-1, 1].
        normalised = 2 * (actions - low) / (high - low).clamp(min=1e-8) - 1
        self.clipped += int((normalised.abs() > 1 + 1e-6).sum())
        edges = self._edges.to(actions.device)
        return torch.bucketize(normalised.clamp(-1, 1), edges, right=True) - 1

    def decode(self, tokens: Tensor) -> Tensor:
        return self.values(tokens).float()

    def values(self, tokens: Tensor) -> Tensor:
        """Actions (B, m, A) float64 [action units] of tokens (B, n)."""
        check_tokens(tokens, "tokens", (None, self.block_length), self.vocabulary_size)
        device = tokens.device
        index = (
            tokens.long()
            .clamp(max=self.vocabulary_size - 2)
            .view(-1, self.chunk_steps, self.action_dim)
        )
        normalised = self._centres.to(device)[index]  # (B, m, A)
        low = self.low.to(device)
        high = self.high.to(device)
        return torch.where(
            self.mask.to(device), 0.5 * (normalised + 1) * (high - low) + low, normalised
        )
