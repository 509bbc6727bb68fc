"""Allowed values of settings: declared with the default, checked on construction, shown in help."""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ceed_vla.errors import ConfigError

_ALLOWED = "allowed"
_LARGEST = 1e308  # rejects NaN, infinity, and whole numbers beyond the range of a float
LONGEST_TEXT = 2**26  # [characters]; the longest is a tokenizer in a checkpoint's settings
SEEDS = "[0, 2147483647]"
COUNTS = "[1, 1e9]"  # of steps, frames, episodes
THREADS = "[0, 256]"


class Interval:
    """A range of finite numbers in interval notation: ``[1, 10]``, ``(0, 1]``, ``[0, inf)``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.low, self.high = map(float, text[1:-1].split(","))

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.text[0] == "(" else value >= self.low
        below = value < self.high if self.text[-1] == ")" else value <= self.high
        return above and below and math.isfinite(value)


Allowed = Interval | tuple[str, ...]  # a range of numbers, or a choice of strings


def ranged(default: Any, interval: str) -> Any:
    """A field whose number, or each number of its list, lies in `interval`; None is not checked."""
    metadata = {_ALLOWED: Interval(interval)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def chosen(default: str, choices: Sequence[str]) -> Any:
    """A field that is one of `choices`."""
    return field(default=default, metadata={_ALLOWED: tuple(choices)})


def allowed_of(item: Any) -> Allowed | None:
    """The allowed values that the dataclass field `item` declares; None without a declaration."""
    return item.metadata.get(_ALLOWED)


def allowed_text(allowed: Allowed) -> str:
    """The allowed values, in words."""
    return f"one of {', '.join(allowed)}" if isinstance(allowed, tuple) else f"in {allowed.text}"


class Checked:
    """A dataclass whose fields are checked on construction.

    The class argument `prefix` precedes the names of the fields in errors.
    """

    _prefix = ""

    def __init_subclass__(cls, prefix: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._prefix = cls._prefix if prefix is None else prefix

    def __post_init__(self) -> None:
        check_fields(self, self._prefix)


def check_fields(config: Any, prefix: str = "") -> None:
    """Check every field of a dataclass against its annotation and its allowed values.

    Call it at the start of ``__post_init__``.

    Raises:
        ConfigError: It names the field (after `prefix`), its value and the allowed values.
    """
    hints = type_hints(type(config))
    for item in fields(config):
        value = getattr(config, item.name, None)
        hint = hints.get(item.name, Any)
        allowed = allowed_of(item)
        if not fits(value, hint, allowed):
            name = f"{prefix}{item.name.removesuffix('_')}"
            raise ConfigError(f"{name} is {short(value)}; it must be {describe(hint, allowed)}.")


def describe(hint: Any, allowed: Allowed | None) -> str:
    """Type and allowed values of a field, in words."""
    if isinstance(allowed, tuple):
        return allowed_text(allowed)
    options = options_of(hint)
    words = [_word(option) for option in options if option is not type(None)]
    text = " or ".join(dict.fromkeys(words)) + (
        f" {allowed_text(allowed)}" if allowed is not None else ""
    )
    return text + (" (or nothing)" if type(None) in options else "")


def _word(hint: Any) -> str:
    origin = typing.get_origin(hint)
    inside = typing.get_args(hint)
    if origin in (list, tuple):
        return f"a list of {_word(inside[0]).removeprefix('a ')}s" if inside else "a list"
    simple = {
        int: "a whole number",
        float: "a finite number",
        str: "a string",
        bool: "true or false",
        Path: "a path",
    }
    return simple.get(hint, "a mapping" if origin is dict else getattr(hint, "__name__", str(hint)))


def fits(value: Any, hint: Any, allowed: Allowed | None = None) -> bool:
    """Whether a value is of the type `hint` and among the `allowed` ones; all are without these."""
    if hint is Any:
        return True
    if (options := options_of(hint)) != (hint,):
        return any(fits(value, option, allowed) for option in options)
    if hint in (int, float):
        number = isinstance(value, Integral if hint is int else Real) and not isinstance(
            value, bool
        )
        return (
            number
            and abs(value) < _LARGEST
            and (not isinstance(allowed, Interval) or value in allowed)
        )
    if hint is str:
        text = isinstance(value, str) and len(value) <= LONGEST_TEXT and "\0" not in value
        return text and (not isinstance(allowed, tuple) or value in allowed)
    if hint is Path:
        return isinstance(value, str | Path) and "\0" not in str(value)
    origin = typing.get_origin(hint)
    inside = typing.get_args(hint)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(
            fits(v, inside[0] if inside else Any, allowed) for v in value
        )
    if origin is dict:
        key, entry = inside or (Any, Any)
        return isinstance(value, dict) and all(
            fits(k, key) and fits(v, entry) for k, v in value.items()
        )
    return isinstance(value, hint) if isinstance(hint, type) else True


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union; (`hint`,) if it is not a union."""
    return (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )


def short(value: object) -> str:
    """A value for a message: one line of at most 200 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _type_hints(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields by name; empty if they cannot be resolved."""
    try:
        return typing.get_type_hints(kind)
    except (NameError, TypeError):  # a type that is imported under TYPE_CHECKING only
        return {}


# annotated because mypy does not treat a class as hashable
type_hints: Callable[[Any], dict[str, Any]] = functools.cache(_type_hints)
