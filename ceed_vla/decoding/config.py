"""How to decode a block: the method, its initial guess and its exit rules."""

from __future__ import annotations

from dataclasses import dataclass

from ceed_vla.errors import ConfigError
from ceed_vla.fields import SEEDS, check_fields, chosen, ranged

METHODS = ("ar", "jacobi")
GUESSES = ("previous", "mid", "random")
NAMES = ("ar", "jacobi", "ceed")


@dataclass(frozen=True)
class DecodingConfig:
    """Decoding of one block of ``n = m * A`` tokens.

    The defaults are strict Jacobi decoding: exactly the autoregressive greedy tokens. Every other field
    relaxes that, and says so in the result. Exit rules only watch the *must-converge slots*: the first
    ``executed_steps * A`` tokens behind a frozen prefix, if there is one, or the whole block.

    Attributes:
        method: "ar" (one token a forward) or "jacobi" (the whole block a forward).
        guess: First state: "previous" (the previous chunk, shifted; "mid" in rows that have none), "mid" (the
            bins nearest zero), or "random" (uniform bins).
        max_iterations: Hard cap, the paper's sigma; None for no cap.
        tolerance_bins: Largest move [bins] of a must-converge slot that still counts as quiet; one number for
            all dimensions but the gripper (always 0), or one a dimension.
        stable_iterations: Quiet iterations in a row before the tolerance ends a row; None is 1. With a
            tolerance of 0 it changes nothing: in a causal model one iteration without any change already
            proves the fixed point.
        confidence: Stop when the smallest probability mass within +-2 bins of the argmax, over the
            must-converge slots, exceeds this. In (0, 1]; 1 never fires.
        executed_steps: Steps ``h`` that are executed before the next replan. Jacobi: only these must
            converge, and iterations after the first compute only these. AR: stop after ``h * A`` tokens, the
            rest is the guess.
        deadline_s: Time for the block, counted from the start of decoding, after the prefill [s]. No further
            iteration starts when it would end later, judged by the last one. The first is always run.
        seed: Seed of random guesses.
        window: Jacobi: most slots that one forward computes; None for the whole block. A window slides over
            blocks that are mostly longer than what is decoded, as variable-length ones with a stop token.
    """

    method: str = chosen("jacobi", METHODS)
    guess: str = chosen("previous", GUESSES)
    max_iterations: int | None = ranged(None, "[1, 1e6]")
    tolerance_bins: int | tuple[int, ...] = ranged(0, "[0, 65536]")
    stable_iterations: int | None = ranged(None, "[1, 1e6]")
    confidence: float | None = ranged(None, "(0, 1]")
    executed_steps: int | None = ranged(None, "[1, 4096]")
    deadline_s: float | None = ranged(None, "(0, 1e6]")
    seed: int = ranged(0, SEEDS)
    window: int | None = ranged(None, "[1, 65536]")

    def __post_init__(self) -> None:
        if isinstance(self.tolerance_bins, list):
            object.__setattr__(self, "tolerance_bins", tuple(self.tolerance_bins))
        check_fields(self)
        if isinstance(self.tolerance_bins, tuple) and not self.tolerance_bins:
            raise ConfigError("tolerance_bins is (); give a number of bins, or one for every dimension.")
        if self.window is not None and self.confidence is not None:
            raise ConfigError(
                f"confidence {self.confidence} judges the whole block, but window = {self.window} computes a part "
                "of it a forward; set only one of the two."
            )
        if self.method == "ar" and self._exit_rules():
            raise ConfigError(
                f'method "ar" has no iterations to end early, but {", ".join(self._exit_rules())} is set. '
                'Use executed_steps to decode fewer tokens, or method "jacobi".'
            )

    @property
    def strict(self) -> bool:
        """Whether the result is the autoregressive greedy block for certain: no rule relaxes anything."""
        return not self._exit_rules() and self.executed_steps is None

    def _exit_rules(self) -> list[str]:
        tolerances = self.tolerance_bins if isinstance(self.tolerance_bins, tuple) else (self.tolerance_bins,)
        rules = {
            "max_iterations": self.max_iterations is not None,
            "tolerance_bins": any(tolerances),
            "confidence": self.confidence is not None,
            "deadline_s": self.deadline_s is not None,
        }
        return [name for name, active in rules.items() if active]


def named_config(decoding: str | DecodingConfig, ceed: DecodingConfig) -> DecodingConfig:
    """Resolve a decoder's name.

    Args:
        decoding: "ar" (greedy, token by token), "jacobi" (strict, from the previous chunk), "ceed" (the early
            exit of a checkpoint), or a configuration, which is returned as it is.
        ceed: What "ceed" stands for.

    Raises:
        ConfigError: Unknown name.
    """
    if isinstance(decoding, DecodingConfig):
        return decoding
    if not isinstance(decoding, str) or decoding not in NAMES:
        raise ConfigError(f"decoding is {str(decoding)[:200]!r}; choose one of {', '.join(NAMES)}.")
    return {"ar": DecodingConfig(method="ar"), "jacobi": DecodingConfig(method="jacobi"), "ceed": ceed}[
        decoding
    ]
