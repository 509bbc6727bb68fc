"""When a row of a Jacobi block is done, and why. Pure rules on host numbers; nothing here runs the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        must_converge: End ``M <= n`` of the slots ``[frozen, M)`` that the rules watch.
        tolerance: (M,) largest quiet move of every watched slot [bins].
        quiet_needed: Quiet iterations in a row that end a row.
        confidence: Mass that the least certain watched slot must exceed; None for no such rule.
        max_iterations: Hard cap; None for none.
        frozen: Leading tokens that are given and never change.
        stop: Token that ends a block of variable length; None for none.
    """

    block_length: int
    must_converge: int
    tolerance: np.ndarray
    quiet_needed: int
    confidence: float | None
    max_iterations: int | None
    frozen: int = 0
    stop: int | None = None

    @classmethod
    def of(
        cls,
        config: DecodingConfig,
        block_length: int,
        action_dim: int,
        gripper_dims: tuple[int, ...] = (),
        frozen: int = 0,
        stop: int | None = None,
    ) -> ExitRules:
        """The rules of `config` for blocks of `block_length` tokens, `action_dim` a step, the first `frozen` given.

        Raises:
            ConfigError: Executed steps or tolerances that do not fit the block, a tolerance on a gripper, or
                rules that compare bins for a vocabulary with a stop token, whose tokens are no bins.
        """
        if stop is not None:
            check_variable_length(config, frozen)
            action_dim, config = 1, replace(config, executed_steps=None)  # every step needs every token
        watched = must_converge(config, block_length, action_dim, frozen)
        return cls(
            block_length=block_length,
            must_converge=watched,
            tolerance=np.resize(_tolerances(config, action_dim, gripper_dims), watched),
            quiet_needed=config.stable_iterations or 1,
            confidence=config.confidence,
            max_iterations=config.max_iterations,
            frozen=frozen,
            stop=stop,
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
        # Without frozen tokens the prefix gives token 0; behind them the first free token takes a forward.
        self.exact = np.full(batch, max(rules.frozen, 1), dtype=np.int64)
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
            # A window that ends before what this row has proven already takes nothing back.
            exact = first + int(changed[0]) + 1 if len(changed) else max(first + len(moved), self.exact[row])
            if self.rules.stop is not None and self.rules.stop in new[row, : exact - first]:
                self._end(row, "stop", iteration)
                continue
            # A window that ends before the last watched slot has not seen whether that one is quiet.
            calm = len(moved) >= watched and bool((moved[:watched] <= self.rules.tolerance[first:]).all())
            self.exact[row], self.quiet[row] = exact, self.quiet[row] + 1 if calm else 0
            mass = 0.0 if certainty is None else float(certainty[row].min())
            reason = self.rules.reason(iteration, exact, int(self.quiet[row]), mass)
            if reason is not None:
                self._end(row, reason, iteration)

    def stop_at_once(self, tokens: np.ndarray) -> None:
        """End the rows whose first `tokens` (B,), which the prefix knows, are the stop token."""
        if self.rules.stop is not None:
            for row in np.flatnonzero(tokens == self.rules.stop):
                self._end(row, "stop", 0)

    def stop(self, reason: str, iteration: int) -> None:
        """End every running row."""
        for row in np.flatnonzero(self.running):
            self._end(row, reason, iteration)

    def _end(self, row: int, reason: str, iteration: int) -> None:
        self.reasons[row], self.iterations[row], self.running[row] = reason, iteration, False
        if reason == "stop":
            self.exact[row] = self.rules.block_length  # what follows is stop tokens by definition
        self._left -= 1


def check_variable_length(config: DecodingConfig, frozen: int = 0) -> None:
    """Check that `config` reads nothing that variable-length tokens lack: steps, and neighbouring bins.

    Raises:
        ConfigError: A tolerance, a confidence or frozen tokens.
    """
    tolerances = (
        config.tolerance_bins if isinstance(config.tolerance_bins, tuple) else (config.tolerance_bins,)
    )
    if any(tolerances) or config.confidence is not None or frozen:
        raise ConfigError(
            f"tolerance_bins is {config.tolerance_bins}, confidence {config.confidence} and {frozen} tokens are "
            "frozen, but variable-length tokens are neither bins nor steps. Leave these at their defaults; "
            "max_iterations and deadline_s work."
        )


def after_stop(block: Tensor, stop: int, *states: Tensor) -> list[Tensor]:
    """`block` (B, n), then `states` (B, n), with `stop` in every slot behind the first `stop` of the block's row."""
    ends = (block == stop).int()  # (B, n)
    behind = ends.cumsum(1) - ends > 0
    return [tokens.masked_fill(behind, stop) for tokens in (block, *states)]


def must_converge(config: DecodingConfig, block_length: int, action_dim: int, frozen: int = 0) -> int:
    """End ``M`` of the slots that will be executed before the next replan: `frozen` tokens and the steps behind them.

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
    return min(frozen + config.executed_steps * action_dim, block_length)


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
