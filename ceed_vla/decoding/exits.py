"""When a row of a Jacobi block is done, and why. Pure rules on host numbers; nothing here runs the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.errors import ConfigError

WINDOW = 2  # bins on each side of the argmax that count as the same decision


@dataclass(frozen=True)
class ExitRules:
    """The exit rules of one block.

    Attributes:
        block_length: Tokens ``n``.
        must_converge: The first tokens ``M <= n`` that the rules watch.
        tolerance: (M,) largest quiet move of every watched slot [bins].
        quiet_needed: Quiet iterations in a row that end a row.
        confidence: Mass that the least certain watched slot must exceed; None for no such rule.
        max_iterations: Hard cap; None for none.
    """

    block_length: int
    must_converge: int
    tolerance: np.ndarray
    quiet_needed: int
    confidence: float | None
    max_iterations: int | None

    @classmethod
    def of(
        cls, config: DecodingConfig, block_length: int, action_dim: int, gripper_dims: tuple[int, ...] = ()
    ) -> ExitRules:
        """The rules of `config` for blocks of `block_length` tokens, `action_dim` a step.

        Raises:
            ConfigError: Executed steps or tolerances that do not fit the block, or a tolerance on a gripper.
        """
        watched = must_converge(config, block_length, action_dim)
        return cls(
            block_length=block_length,
            must_converge=watched,
            tolerance=np.resize(_tolerances(config, action_dim, gripper_dims), watched),
            quiet_needed=config.stable_iterations or 1,
            confidence=config.confidence,
            max_iterations=config.max_iterations,
        )

    def reason(self, iteration: int, exact: int, quiet: int, mass: float) -> str | None:
        """Why a row ends after this iteration, or None.

        Every threshold only ever adds exits and the states do not depend on it, so a higher cap, a smaller
        tolerance, more stable iterations or a higher confidence never ends a row earlier.

        Args:
            iteration: Iterations done, from 1.
            exact: Leading tokens proven equal to greedy AR.
            quiet: Iterations in a row in which no watched slot moved more than its tolerance.
            mass: Probability mass about the argmax of the least certain watched slot.
        """
        if exact >= self.block_length:
            return "converged"
        if exact >= self.must_converge:
            return "stable"
        if quiet >= self.quiet_needed:
            return "tolerance"
        if self.confidence is not None and mass > self.confidence:
            return "confidence"
        if self.max_iterations is not None and iteration >= self.max_iterations:
            return "max_iterations"
        return None


class Rows:
    """What is known about every row of a block, on the host.

    Attributes:
        running: (B,) bool, rows without an exit reason.
        exact: (B,) leading tokens proven equal to greedy AR.
        quiet: (B,) quiet iterations in a row.
        iterations: (B,) iterations until the row ended.
        reasons: Exit reason of every row, None while it runs.
    """

    def __init__(self, rules: ExitRules, batch: int) -> None:
        self.rules = rules
        self.running = np.ones(batch, dtype=bool)
        self.exact = np.ones(batch, dtype=np.int64)  # token 0 comes from the prefix
        self.quiet = np.zeros(batch, dtype=np.int64)
        self.iterations = np.zeros(batch, dtype=np.int64)
        self.reasons: list[str | None] = [None] * batch
        self._left = batch

    @property
    def any_running(self) -> bool:
        return self._left > 0

    @property
    def all_running(self) -> bool:
        return self._left == len(self.reasons)

    def least_exact(self) -> int:
        """Leading tokens that are proven in every running row."""
        return int(self.exact[self.running].min())

    def update(
        self, iteration: int, old: np.ndarray, new: np.ndarray, first: int, certainty: np.ndarray | None
    ) -> None:
        """Judge the running rows.

        Args:
            iteration: Iterations done, from 1.
            old: Tokens (B, k) of the slots from `first` on, which the iteration read.
            new: Tokens (B, k) of the same slots, which it computed.
            first: Slot of the first column.
            certainty: (B, M) window mass of the watched slots, or None.
        """
        watched = self.rules.must_converge - first
        for row in np.flatnonzero(self.running):
            moved = np.abs(new[row] - old[row])  # (k,) [bins]
            changed = moved.nonzero()[0]
            # The first changed slot is right now, as all slots before it were; no change proves every slot.
            exact = first + (int(changed[0]) + 1 if len(changed) else len(moved))
            calm = bool((moved[:watched] <= self.rules.tolerance[first:]).all())
            self.exact[row], self.quiet[row] = exact, self.quiet[row] + 1 if calm else 0
            mass = 0.0 if certainty is None else float(certainty[row].min())
            reason = self.rules.reason(iteration, exact, int(self.quiet[row]), mass)
            if reason is not None:
                self._end(row, reason, iteration)

    def stop(self, reason: str, iteration: int) -> None:
        """End every running row."""
        for row in np.flatnonzero(self.running):
            self._end(row, reason, iteration)

    def _end(self, row: int, reason: str, iteration: int) -> None:
        self.reasons[row], self.iterations[row], self.running[row] = reason, iteration, False
        self._left -= 1


def must_converge(config: DecodingConfig, block_length: int, action_dim: int) -> int:
    """Tokens ``M`` that will be executed before the next replan.

    Raises:
        ConfigError: `executed_steps` exceeds the block.
    """
    if action_dim < 1 or block_length % action_dim:
        raise ConfigError(
            f"A block of {block_length} tokens is not a whole number of steps of {action_dim} tokens."
        )
    if config.executed_steps is None:
        return block_length
    if config.executed_steps * action_dim > block_length:
        raise ConfigError(
            f"executed_steps is {config.executed_steps}, "
            f"but a block has only {block_length // action_dim} steps."
        )
    return config.executed_steps * action_dim


def window_mass(logits: Tensor, tokens: Tensor) -> Tensor:
    """Probability mass (B, k) within `WINDOW` bins of `tokens` (B, k), under `logits` (B, k, V)."""
    padded = F.pad(logits.float(), (WINDOW, WINDOW), value=-torch.inf)  # (B, k, V + 4): no mass past the ends
    near = tokens.unsqueeze(-1) + torch.arange(2 * WINDOW + 1, device=tokens.device)  # (B, k, 5)
    mass = (padded.gather(-1, near) - padded.logsumexp(-1, keepdim=True)).exp().sum(-1)  # (B, k)
    return mass.clamp(max=1)  # rounding


def _tolerances(config: DecodingConfig, action_dim: int, gripper_dims: tuple[int, ...]) -> np.ndarray:
    """(A,) tolerance of every dimension [bins]."""
    given = config.tolerance_bins
    if isinstance(given, int):
        return np.array([0 if d in gripper_dims else given for d in range(action_dim)])
    if len(given) != action_dim:
        raise ConfigError(f"tolerance_bins has {len(given)} entries; an action has {action_dim} dimensions.")
    loose = [d for d in gripper_dims if given[d]]
    if loose:
        raise ConfigError(
            f"tolerance_bins of the gripper dimensions {loose} must be 0; a gripper is never relaxed."
        )
    return np.array(given)
