"""How to decode a block: the decoder, its first guess and what ends it early."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ceed_vla.decoding.registry import Decoder, find_decoder, find_exit
from ceed_vla.errors import ConfigError
from ceed_vla.fields import SEEDS, check_fields, chosen, ranged
from ceed_vla.tokens.guesses import GUESSES


@dataclass(frozen=True)
class DecodingConfig:
    """Decoding of one block of ``n`` tokens.

    The defaults are strict Jacobi decoding: exactly the autoregressive greedy tokens. The other
    settings relax that, and the result names the rule that ended it. `ceed_vla.decoding.names`
    writes a configuration as a short name, for example ``conf0.2_cap2``.

    Attributes:
        method: The decoder: "ar" (one token per forward), "jacobi" (the whole block per forward),
            or the name of another decoder.
        guess: Initial guess: "previous" (the previous chunk, shifted; "mid" in rows without one),
            "mid" (the tokens nearest "do not move"), or "random" (uniform tokens).
        watch: Slots that must converge or satisfy an exit rule: the whole "block", or those of the
            steps "executed" before the next replan.
        tail: Slots behind the watched ones, after the first iteration: "kept" (not computed again)
            or "fresh" (computed again in every iteration). They are the next chunk's warm start.
        max_iterations: Maximum number of iterations, the paper's sigma; None for no cap.
        confidence: Exit when the probability mass within 2 bins of the argmax exceeds this value
            in every watched slot; None for no such rule.
        exits: Names of the exit rules that have no field of their own.
        deadline_s: Time limit of a block, from the end of the prefill on [s]. The first iteration
            always runs; another one starts only if it ends in time when it takes as long as the
            last one. Decoders with forwards of a part of the layers run a whole one behind them,
            also if it ends too late, and rows that do not decode to a chunk continue.
        seed: Seed of random guesses.
        window: Maximum number of slots that one forward computes; None for the whole block. Use it
            for vocabularies with a stop token, whose blocks are mostly shorter than the maximum.
    """

    method: str = "jacobi"
    guess: str = chosen("previous", GUESSES)
    watch: str = chosen("block", ("block", "executed"))
    tail: str = chosen("kept", ("kept", "fresh"))
    max_iterations: int | None = ranged(None, "[1, 1e6]")
    confidence: float | None = ranged(None, "(0, 1]")
    exits: tuple[str, ...] = ()
    deadline_s: float | None = ranged(None, "(0, 1e6]")
    seed: int = ranged(0, SEEDS)
    window: int | None = ranged(None, "[1, 65536]")

    def __post_init__(self) -> None:
        if isinstance(self.exits, list):
            object.__setattr__(self, "exits", tuple(self.exits))
        check_fields(self)
        _ = self.decoder, self.options
        for name in self.exits:
            if field := find_exit(name).rule.field:
                raise ConfigError(
                    f"exits contains {name!r}, which has a field of its own; set {field}."
                )
        if self.window is not None and (self.confidence is not None or self.exits):
            raise ConfigError(
                f"window is {self.window}, so a forward computes a part of the block, but "
                f"confidence {self.confidence} and exits {list(self.exits)} inspect the whole; set "
                "either the window or these rules."
            )
        if self.method == "ar" and self.relaxations:
            raise ConfigError(
                f'method "ar" has no iterations to end early, but {", ".join(self.relaxations)} is '
                'set. Use watch "executed" to decode fewer tokens, or method "jacobi".'
            )

    @cached_property
    def decoder(self) -> Decoder:
        """The decoder that `method` names."""
        return find_decoder(self.method)

    @cached_property
    def options(self) -> Any:
        """The options in the name `method`; see `Decoder.options`."""
        return self.decoder.parse(self.method)

    def __getstate__(self) -> dict[str, Any]:
        """The fields, for pickling; another process finds the decoder by its name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def relaxations(self) -> list[str]:
        """Settings that may end decoding before the fixed point."""
        rules = ("max_iterations", "confidence", "exits", "deadline_s")
        return [name for name in rules if getattr(self, name) not in (None, ())]

    @property
    def strict(self) -> bool:
        """Whether the result is guaranteed to be the autoregressive greedy block."""
        relaxed = self.relaxations or self.watch != "block" or self.decoder.relaxes(self.options)
        return not relaxed
