"""Exit rules: what ends a row of a Jacobi block before its fixed point. Each is a small class,
found by its name.

The fixed point itself is no rule; `ceed_vla.decoding.jacobi` proves it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ceed_vla.decoding.registry import find_exit, register_exit
from ceed_vla.errors import ConfigError

if TYPE_CHECKING:
    from ceed_vla.decoding.config import DecodingConfig

NEAR = 2  # bins on each side of the argmax that count as the same decision


@dataclass
class Seen:
    """What is known after an iteration, on the host."""

    iteration: int  # iterations done, from 1
    exact: np.ndarray  # (B,) leading tokens proven equal to greedy AR
    watched: int  # end ``M`` of the slots that must be right
    # (B, M) by how many bins the last iteration moved the watched tokens; 0 where it did not
    # compute
    moved: np.ndarray
    elapsed_s: float  # since decoding began [s]
    iteration_s: float  # of the last iteration [s]
    readable: Callable[[], np.ndarray]  # gives (B,) bool, the rows whose tokens stand for a chunk


class ExitRule(abc.ABC):
    """Ends rows early. It is made once for a decoding and keeps no state."""

    reason: ClassVar[str]  # what `DecodeResult.exit_reason` says of rows that it ended
    # Setting of `DecodingConfig` that holds its option, made by `kind`; rules without are in
    # `exits`.
    field: ClassVar[str] = ""
    kind: ClassVar[Callable[..., Any]] = float
    # Whether it compares neighbouring tokens, which must then stand for neighbouring actions.
    ordered: ClassVar[bool] = False

    def measure(self, logits: Tensor, tokens: Tensor) -> Tensor | None:
        """What it needs of the watched slots: (B, k) of `logits` (B, k, V) and their `tokens` (B,
        k); None for nothing.

        It travels to the host with the tokens, in the one transfer of an iteration.
        """
        return None

    @abc.abstractmethod
    def ends(self, seen: Seen, measured: np.ndarray | None) -> np.ndarray | bool:
        """Which rows end after this iteration: (B,) bool, or one for all; `measured` is (B, M -
        f).
        """


@register_exit(
    r"conf(?P<confidence>\d*\.?\d+)",
    "conf<P>",
    "or until confident",
    ["conf0.9", "conf0.7", "conf0.55", "conf0.4", "conf0.3", "conf0.2", "conf0.1"],
)
class Confidence(ExitRule):
    """The least certain watched slot has more than this mass within `NEAR` bins of its argmax."""

    reason = "confidence"
    field = "confidence"
    ordered = True

    def __init__(self, confidence: float | str) -> None:
        self.least = float(confidence)

    def measure(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return mass_near(logits, tokens)

    def ends(self, seen: Seen, measured: np.ndarray | None) -> np.ndarray:
        assert measured is not None
        return measured.min(1) > self.least


@register_exit(
    r"gap(?P<confidence>0?\.\d+|0|1(?:\.0*)?)",
    "gap<P>",
    "or a lead of P",
    ["gap0.5", "gap0.3", "gap0.2", "gap0.1", "gap0.05", "gap0.02"],
)
class Gap(Confidence):
    """In every watched slot the best token's probability exceeds the next one's by more than this
    (DSSD's signal).
    """

    reason = "gap"
    field = ""
    ordered = False

    def measure(self, logits: Tensor, tokens: Tensor) -> Tensor:
        best, second = logits.float().topk(2, dim=-1).values.unbind(-1)  # (B, k)
        total = logits.float().logsumexp(-1)
        return (best - total).exp() - (second - total).exp()


@register_exit(
    r"agree(?P<most>\d+)",
    "agree<D>",
    "or D bins apart",
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
    """The last two states are nowhere further apart in the watched slots than so many bins (DeeR's
    criterion).
    """

    reason, ordered = "agreement", True

    def __init__(self, most: int | str) -> None:
        self.most = int(most)

    def ends(self, seen: Seen, measured: np.ndarray | None) -> np.ndarray:
        return seen.moved.max(1) <= self.most


@register_exit(
    r"changed(?P<most>\d+)",
    "changed<K>",
    "or until K tokens change",
    ["changed0", "changed1", "changed2", "changed4", "changed8", "changed14"],
)
class Changed(Agreement):
    """The last iteration changed no more than so many watched tokens."""

    reason, ordered = "few_changes", False

    def ends(self, seen: Seen, measured: np.ndarray | None) -> np.ndarray:
        return (seen.moved > 0).sum(1) <= self.most


@register_exit(r"cap(?P<max_iterations>\d+)", "cap<K>", "at most K forwards")
class Cap(ExitRule):
    """So many iterations are done. Rows that cannot be read then go on to their fixed point."""

    reason = "max_iterations"
    field = "max_iterations"
    kind = int

    def __init__(self, max_iterations: int | str) -> None:
        self.most = int(max_iterations)

    def ends(self, seen: Seen, measured: np.ndarray | None) -> bool:
        return seen.iteration == self.most


@register_exit(r"deadline(?P<deadline_s>\d*\.?\d+)", "deadline<MS>", "or MS ms are over")
class Deadline(ExitRule):
    """Another iteration as long as the last one would end too late."""

    reason = "deadline"
    field = "deadline_s"

    @staticmethod
    def kind(milliseconds: float | str) -> float:
        return float(milliseconds) / 1000

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s

    def ends(self, seen: Seen, measured: np.ndarray | None) -> bool:
        return seen.elapsed_s + seen.iteration_s > self.deadline_s


def exit_rules(config: DecodingConfig, ordered: bool = True) -> tuple[ExitRule, ...]:
    """The rules of `config`, in the order in which they give their reason.

    Args:
        config: The decoding.
        ordered: Whether neighbouring tokens stand for neighbouring actions.

    Raises:
        ConfigError: A rule that compares neighbouring tokens, for tokens that are not ordered.
    """
    rules = _rules(config)
    wrong = [rule.reason for rule in rules if rule.ordered]
    if wrong and not ordered:
        raise ConfigError(
            f"The exit rule {wrong[0]!r} compares neighbouring tokens, but those of this "
            "vocabulary are no bins; max_iterations and deadline_s work."
        )
    return rules


@lru_cache(maxsize=256)  # a robot decodes every chunk with the same ones
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


def mass_near(logits: Tensor, tokens: Tensor) -> Tensor:
    """Probability mass (B, k) within `NEAR` bins of `tokens` (B, k), under `logits` (B, k, V)."""
    # (B, k, V + 4): no mass past the ends
    padded = F.pad(logits.float(), (NEAR, NEAR), value=-torch.inf)
    near = tokens.unsqueeze(-1) + torch.arange(2 * NEAR + 1, device=tokens.device)  # (B, k, 5)
    mass = (padded.gather(-1, near) - padded.logsumexp(-1, keepdim=True)).exp().sum(-1)  # (B, k)
    return mass.clamp(max=1)  # rounding
