"""Texts from outside, cut before they reach a log, a parameter, the diagnostics or an error
message. Free of ROS.
"""

from __future__ import annotations

import reprlib
import unicodedata

LONGEST = 200  # characters of a text that are shown
LONGEST_INSTRUCTION = 500  # characters of an instruction that are read

_repr = reprlib.Repr(
    maxlevel=2, maxlist=8, maxtuple=8, maxdict=8, maxstring=100, maxother=100, maxlong=100
)


def short(text: object, length: int = LONGEST) -> str:
    """`text` in at most `length` characters; the rest is three dots."""
    whole = str(text)
    return whole if len(whole) <= length else f"{whole[: length - 3]}..."


def shown(value: object) -> str:
    """A short `repr`, however large or deeply nested `value` is."""
    try:
        return short(_repr.repr(value))
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"


def instruction_problem(instruction: str) -> str | None:
    """Why no policy is asked to follow `instruction`; None if one may be. An empty one is no wrong
    one.
    """
    if len(instruction) > LONGEST_INSTRUCTION:
        return f"it has {len(instruction)} characters; at most {LONGEST_INSTRUCTION} are read"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in instruction):
        return f"it has control characters: {shown(instruction)}"
    return None
