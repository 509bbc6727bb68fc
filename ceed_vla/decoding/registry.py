"""Decoders and exit rules by the pattern of their names; each registers itself where it is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ceed_vla.errors import ConfigError

LONGEST_NAME = 60
_RESERVED = ("ceed", "h", "fresh", "mid", "random", "previous")


@dataclass(frozen=True)
class Entry:
    """One decoder or exit rule.

    Attributes:
        pattern: Of its names; named groups are its options.
        shown: Its name in messages: "cap<K>".
        meaning: In a few words.
        make: The decoder, or the class of the rule.
    """

    pattern: str
    shown: str
    meaning: str
    make: Any


_DECODERS: dict[str, Entry] = {}
_EXITS: dict[str, Entry] = {}


def register_decoder[F: Callable[..., Any]](pattern: str, shown: str, meaning: str) -> Callable[[F], F]:
    """Register a decoder ``decode(backbone, prefix, request) -> DecodeResult`` for names that match `pattern`."""
    return _register(_DECODERS, pattern, shown, meaning)


def register_exit[F: Callable[..., Any]](pattern: str, shown: str, meaning: str) -> Callable[[F], F]:
    """Register an `ExitRule`, which is made with the named groups of `pattern`, texts, as keyword arguments."""
    add = _register(_EXITS, pattern, shown, meaning)

    def checked(rule: F) -> F:
        if not isinstance(getattr(rule, "reason", None), str):
            raise ConfigError(f"The exit rule {rule.__name__} has no reason, the text that results give; set one.")
        return add(rule)

    return checked


def _register[F: Callable[..., Any]](
    registry: dict[str, Entry], pattern: str, shown: str, meaning: str
) -> Callable[[F], F]:
    if "_" in shown or shown in _RESERVED:
        raise ConfigError(
            f"The name {shown!r} cannot be registered: underscores join the parts of a decoding's name, and "
            f"{', '.join(_RESERVED)} are taken."
        )

    def add(made: F) -> F:
        for entry in (*_DECODERS.values(), *_EXITS.values()):
            if shown.partition("<")[0] == entry.shown.partition("<")[0] and entry.make.__module__ != made.__module__:
                raise ConfigError(f"The name {shown!r} is {entry.make.__module__}'s; choose another.")
        registry[pattern] = Entry(pattern, shown, meaning, made)
        return made

    return add


def match_decoder(name: str) -> tuple[Entry, dict[str, str]] | None:
    """The decoder of that name and its options; None for an unknown name."""
    return _match(_DECODERS, name)


def match_exit(name: str) -> tuple[Entry, dict[str, str]] | None:
    """The exit rule of that name and its options; None for an unknown name."""
    return _match(_EXITS, name)


def _match(registry: dict[str, Entry], name: str) -> tuple[Entry, dict[str, str]] | None:
    if len(name) <= LONGEST_NAME:
        for entry in registry.values():
            if found := re.fullmatch(entry.pattern, name, re.ASCII):
                return entry, found.groupdict()
    return None


def find_decoder(name: str) -> tuple[Entry, dict[str, str]]:
    """As `match_decoder`.

    Raises:
        ConfigError: Unknown name.
    """
    return match_decoder(name) or _unknown("method", name, _DECODERS)


def find_exit(name: str) -> tuple[Entry, dict[str, str]]:
    """As `match_exit`.

    Raises:
        ConfigError: Unknown name.
    """
    return match_exit(name) or _unknown("exits", name, _EXITS)


def meanings() -> str:
    """All decoders and exit rules with their meanings, for help and messages."""
    return ", ".join(f"{e.shown} ({e.meaning})" for e in (*_DECODERS.values(), *_EXITS.values()))


def _unknown(setting: str, name: str, registry: dict[str, Entry]) -> Any:
    known = ", ".join(entry.shown for entry in registry.values()) or "none is installed"
    raise ConfigError(
        f"decoding.{setting} is {name[:LONGEST_NAME]!r}; known: {known}. One of another package needs "
        "--discover_packages_path."
    )
