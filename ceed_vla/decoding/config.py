"""How to decode a block: the decoder, its first guess and what ends it early."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ceed_vla.decoding.registry import Decoder, find_decoder, find_exit
from ceed_vla.errors import ConfigError
from ceed_vla.fields import SEEDS, check_fields, chosen, ranged
from ceed_vla.tokens.base import GUESSES


@dataclass(frozen=True)
class DecodingConfig:
    """Decoding of one block of ``n`` tokens.

    The defaults are strict Jacobi decoding: exactly the autoregressive greedy tokens. Every other
    field relaxes that, and says so in the result. `ceed_vla.decoding.names` writes one as a short
    name, such as ``conf0.2_cap2``.

    Attributes:
        method: The decoder: "ar" (one token a forward), "jacobi" (the whole block a forward), or
            another's name.
        guess: First state: "previous" (the previous chunk, shifted; "mid" in rows that have none),
            "mid" (the block nearest "do not move"), or "random" (uniform tokens).
        watch: Slots that must be right: the whole "block", or those of the steps that are
            "executed" before the next replan. Exit rules look at these only.
        tail: Of the slots behind the watched ones, after the first iteration: "kept" as it left
            them, or "fresh", computed again with every iteration. The tail is the next chunk's warm
            start.
        max_iterations: Hard cap, the paper's sigma; None for no cap.
        confidence: Stop when the least probability mass within +-2 bins of a watched slot's argmax
            exceeds this.
        exits: Exit rules that have no field here, by their names.
        deadline_s: Time for the block, counted from the start of decoding, after the prefill [s].
            No further iteration starts when it would end later, judged by the last one. The first
            is always run.
        seed: Seed of random guesses.
        window: Most slots that one forward computes; None for the whole block. A window slides over
            blocks that are mostly longer than what is decoded, as those with a stop token.
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
                raise ConfigError(f"exits has {name!r}, whose place is {field}; set that.")
        if self.window is not None and (self.confidence is not None or self.exits):
            raise ConfigError(
                f"window = {self.window} computes a part of the block a forward, but confidence "
                f"{self.confidence} and exits {list(self.exits)} judge the whole; set only one of "
                "the two."
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
        """What `method` says beside the kind of decoder; see `Decoder.options`."""
        return self.decoder.parse(self.method)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the fields, as another process finds the decoder by its name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def relaxations(self) -> list[str]:
        """Settings that may end decoding before the fixed point."""
        rules = ("max_iterations", "confidence", "exits", "deadline_s")
        return [name for name in rules if getattr(self, name) not in (None, ())]

    @property
    def strict(self) -> bool:
        """Whether the result is the autoregressive greedy block for certain: nothing relaxes
        anything.
        """
        relaxed = self.relaxations or self.watch != "block" or self.decoder.relaxes(self.options)
        return not relaxed
