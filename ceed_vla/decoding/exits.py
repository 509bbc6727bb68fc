"""Exit rules, which end a row of a Jacobi block before its fixed point.

Each rule is a small class, found by its name. `ceed_vla.decoding.loop` itself ends rows that are at
the fixed point. Only `measure` imports torch, because the rules also run on exported graphs
(`ceed_vla.edge`), which contain the measurements.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ceed_vla.decoding.registry import find_exit, register_exit
from ceed_vla.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ceed_vla.decoding.config import DecodingConfig


@dataclass
class Seen:
    """The state of a block after an iteration, on the host."""

    iteration: int  # iterations done, from 1
    exact: np.ndarray  # (B,) leading tokens proven equal to greedy AR
    watched: int  # end ``M`` of the slots that must be right
    # (B, M) bins by which the last iteration moved the watched tokens; 0 in slots that it skipped
    moved: np.ndarray
    elapsed_s: float  # since decoding began [s]
    iteration_s: float  # of the last iteration [s]
    readable: Callable[[], np.ndarray]  # (B,) bool, rows whose tokens decode to a chunk


class ExitRule(abc.ABC):
    """Ends rows early. One instance serves all blocks of a decoding, so it has no state."""

    reason: ClassVar[str]  # `DecodeResult.exit_reason` of the rows that it ends
    # Field of `DecodingConfig` that holds its option, converted by `kind`; empty for rules that are
    # listed in `exits`.
    field: ClassVar[str] = ""
    kind: ClassVar[Callable[..., Any]] = float
    # Whether it requires that neighbouring tokens stand for neighbouring actions.
    ordered: ClassVar[bool] = False

    def measure(self, logits: Tensor, tokens: Tensor) -> Tensor | None:
        """Measure k watched slots.

        The values go to the host with the tokens, in the one transfer of an iteration.

        Args:
            logits: (B, k, V) of the slots.
            tokens: (B, k) their tokens.

        Returns:
            One value (B, k) per slot, or None if the rule measures nothing.
        """
        return None

    @abc.abstractmethod
    def ends(self, seen: Seen, measured: np.ndarray | None) -> np.ndarray | bool:
        """Choose the rows that end after this iteration.

        Args:
            seen: The state of the block.
            measured: (B, M - f) values of the watched slots behind the ``f`` frozen ones, or None
                if the rule measures nothing.

        Returns:
            (B,) bool, or one bool for all rows.
        """


@register_exit(
    r"conf(?P<confidence>\d*\.?\d+)",
    "conf<P>",
    "ends when confident",
    ["conf0.9", "conf0.7", "conf0.55", "conf0.4", "conf0.3", "conf0.2", "conf0.1"],
)
class Confidence(ExitRule):
    """The least certain watched slot has more than this mass within 2 bins of its argmax."""

    reason = "confidence"
    field = "confidence"
    ordered = True

    def __init__(self, confidence: float | str) -> None:
        self.least = float(confidence)

    def measure(self, logits: Tensor, tokens: Tensor) -> Tensor:
        from ceed_vla.decoding.measures import mass_near

        return mass_near(logits, tokens)

    def ends(self, seen: Seen, measured: np.ndarray | None) -> np.ndarray:
        assert measured is not None
        return measured.min(1) > self.least


@register_exit(
    r"gap(?P<confidence>0?\.\d+|0|1(?:\.0*)?)",
    "gap<P>",
    "ends when the best token leads by P",
    ["gap0.5", "gap0.3", "gap0.2", "gap0.1", "gap0.05", "gap0.02"],
)
class Gap(Confidence):
    """In every watched slot the best token leads the next one by more than this probability (DSSD's
    signal).
    """

    reason = "gap"
    field = ""
    ordered = False

    def measure(self, logits: Tensor, tokens: Tensor) -> Tensor:
        from ceed_vla.decoding.measures import lead

        return lead(logits)


@register_exit(
    r"agree(?P<most>\d+)",
    "agree<D>",
    "ends when two states differ by at most D bins",
    [
        "agree0",
        "agree1",
        "agree2",
        "agree4",
        "agree8",
        "agree16",
        "agree32",
        "agree48",
        "agree64",
        "agree96",
    ],
)
class Agreement(ExitRule):
    """In every watched slot the last two states differ by at most ``D`` bins (DeeR's criterion)."""

    reason, ordered = "agreement", True

    def __init__(self, most: int | str) -> None:
        self.most = int(most)

    def ends(self, seen: Seen, measured: np.ndarray | None) -> np.ndarray:
        return seen.moved.max(1) <= self.most


@register_exit(
    r"changed(?P<most>\d+)",
    "changed<K>",
    "ends when at most K tokens change",
    ["changed0", "changed1", "changed2", "changed4", "changed8", "changed14"],
)
class Changed(Agreement):
    """The last iteration changed at most ``K`` watched tokens."""

    reason, ordered = "few_changes", False

    def ends(self, seen: Seen, measured: np.ndarray | None) -> np.ndarray:
        return (seen.moved > 0).sum(1) <= self.most


@register_exit(r"cap(?P<max_iterations>\d+)", "cap<K>", "at most K forwards")
class Cap(ExitRule):
    """``K`` iterations are done. Rows that do not decode to a chunk continue to the fixed point."""

    reason = "max_iterations"
    field = "max_iterations"
    kind = int

    def __init__(self, max_iterations: int | str) -> None:
        self.most = int(max_iterations)

    def ends(self, seen: Seen, measured: np.ndarray | None) -> bool:
        return seen.iteration == self.most


@register_exit(r"deadline(?P<deadline_s>\d*\.?\d+)", "deadline<MS>", "at most MS milliseconds")
class Deadline(ExitRule):
    """Another iteration as long as the last one would end too late."""

    reason = "deadline"
    field = "deadline_s"

    @staticmethod
    def kind(milliseconds: float | str) -> float:
        return float(milliseconds) / 1000

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = float(deadline_s)

    def ends(self, seen: Seen, measured: np.ndarray | None) -> bool:
        return seen.elapsed_s + seen.iteration_s > self.deadline_s


def exit_rules(config: DecodingConfig, ordered: bool = True) -> tuple[ExitRule, ...]:
    """The rules of `config`, in order: the first that ends a row sets its exit reason.

    Args:
        config: The decoding.
        ordered: Whether neighbouring tokens stand for neighbouring actions.

    Raises:
        ConfigError: A rule compares neighbouring tokens, and the tokens are not ordered.
    """
    rules = _rules(config)
    wrong = [rule.reason for rule in rules if rule.ordered]
    if wrong and not ordered:
        raise ConfigError(
            f"The exit rule {wrong[0]!r} compares neighbouring tokens, but in this vocabulary "
            "neighbouring tokens do not stand for neighbouring actions; use max_iterations or "
            "deadline_s."
        )
    return rules


@lru_cache(maxsize=256)  # a robot decodes every chunk with the same rules
def _rules(config: DecodingConfig) -> tuple[ExitRule, ...]:
    rules: list[ExitRule] = []
    if config.confidence is not None:
        rules.append(Confidence(config.confidence))
    for name in config.exits:
        kind = find_exit(name)
        rules.append(kind.rule(**kind.groups(name)))
    if config.max_iterations is not None:
        rules.append(Cap(config.max_iterations))
    if config.deadline_s is not None:
        rules.append(Deadline(config.deadline_s))
    return tuple(rules)


def __getattr__(name: str) -> Any:
    """`mass_near` and `NEAR`, which were defined here before."""
    if name not in ("mass_near", "NEAR"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ceed_vla.decoding import measures

    return getattr(measures, name)
