"""Names of the first guesses of Jacobi decoding, and checks of their steps, without torch."""

from __future__ import annotations

from ceed_vla.errors import TokenError
from ceed_vla.fields import short

GUESSES = ("previous", "mid", "random")


def check_shift(shift_steps: object, chunk_steps: int) -> None:
    """Raise `TokenError` unless `shift_steps` of a chunk of `chunk_steps` can be shifted."""
    if type(shift_steps) is not int or not 0 <= shift_steps <= chunk_steps:
        raise TokenError(
            f"shift_steps is {short(shift_steps)}; it must be a whole number in [0, {chunk_steps}]."
        )


def check_frozen(frozen_steps: object, shift_steps: int, chunk_steps: int) -> None:
    """Raise `TokenError` unless a previous chunk has `frozen_steps` behind `shift_steps`."""
    most = min(chunk_steps - shift_steps, chunk_steps - 1)
    if type(frozen_steps) is not int or not 0 <= frozen_steps <= most:
        raise TokenError(
            f"frozen_steps is {short(frozen_steps)}; it must be in [0, {most}]: at most the steps "
            f"of the previous chunk behind the {shift_steps} executed ones, and less than a chunk."
        )
