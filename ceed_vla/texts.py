"""Shortens untrusted texts for logs, parameters, diagnostics and error messages. Free of ROS."""

from __future__ import annotations

import reprlib
import unicodedata
from typing import Any

LONGEST = 200  # largest number of characters of a text that are shown
LONGEST_INSTRUCTION = 500  # largest number of characters of an instruction


class _Repr(reprlib.Repr):
    """`reprlib` calls the method of the type's name."""

    def repr_ndarray(self, value: Any, level: int) -> str:
        """An array without its values, of which numpy would show many."""
        return f"array of {value.dtype} {value.shape}"


_repr = _Repr(
    maxlevel=2, maxlist=8, maxtuple=8, maxdict=8, maxstring=100, maxother=100, maxlong=100
)


def short(text: object, length: int = LONGEST) -> str:
    """Return `text` in at most `length` characters; a longer text ends with three dots."""
    whole = str(text)
    return whole if len(whole) <= length else f"{whole[: length - 3]}..."


def shown(value: object) -> str:
    """Return a short `repr`, however large or deeply nested `value` is."""
    try:
        return short(_repr.repr(value))
    except ValueError:  # Python converts no integer of more than 4300 digits
        return "a number of thousands of digits"


def instruction_problem(instruction: str) -> str | None:
    """Return why `instruction` is refused; None if it is valid. An empty instruction is valid."""
    if len(instruction) > LONGEST_INSTRUCTION:
        return f"it has {len(instruction)} characters; at most {LONGEST_INSTRUCTION} are read"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in instruction):
        return f"it has control characters: {shown(instruction)}"
    return None
