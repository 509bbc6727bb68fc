"""Numbers in messages: "1 episode", "40 frames", "episodes 3, 7 and 9"."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """`number` with the noun, singular or plural: "1 episode", "1,200 episodes"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def numbered(noun: str, numbers: Sequence[int | str], most: int = 10) -> str:
    """The noun with its numbers: "episode 3", "episodes 3 and 7".

    If there are more than `most` numbers, it lists the leading ones and the count.
    """
    words = [str(number) for number in numbers[:most]]
    if len(numbers) == 1:
        return f"{noun} {words[0]}"
    if len(numbers) > most:
        return f"{noun}s {', '.join(words)}, ... ({len(numbers)} in all)"
    return f"{noun}s {', '.join(words[:-1])} and {words[-1]}"
