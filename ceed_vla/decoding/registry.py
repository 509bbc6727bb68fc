"""Decoders and exit rules by the pattern of their names; each registers itself where it is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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
        ladder: Names of it that calibration and search try, from the strictest to the loosest.
    """

    pattern: str
    shown: str
    meaning: str
    make: Any
    ladder: tuple[str, ...] = ()


_DECODERS: dict[str, Entry] = {}
_EXITS: dict[str, Entry] = {}


def register_decoder[F: Callable[..., Any]](
    pattern: str, shown: str, meaning: str, ladder: Sequence[str] = ()
) -> Callable[[F], F]:
    """Register a decoder ``decode(backbone, prefix, request) -> DecodeResult`` for names that match `pattern`.

    `ceed-vla tune` tries the names of its `ladder`.
    """
    return _register(_DECODERS, pattern, shown, meaning, ladder)


def register_exit[F: Callable[..., Any]](
    pattern: str, shown: str, meaning: str, ladder: Sequence[str] = ()
) -> Callable[[F], F]:
    """Register an `ExitRule`, which is made with the named groups of `pattern`, texts, as keyword arguments.

    `ceed-vla calibrate` and `ceed-vla tune` try the names of its `ladder`, from the strictest to the loosest.
    """
    add = _register(_EXITS, pattern, shown, meaning, ladder)

    def checked(rule: F) -> F:
        if not isinstance(getattr(rule, "reason", None), str):
            raise ConfigError(f"The exit rule {rule.__name__} has no reason, the text that results give; set one.")
        return add(rule)

    return checked


def _register[F: Callable[..., Any]](
    registry: dict[str, Entry], pattern: str, shown: str, meaning: str, ladder: Sequence[str]
) -> Callable[[F], F]:
    if wrong := [name for name in ladder if not re.fullmatch(pattern, name, re.ASCII)]:
        raise ConfigError(f"The ladder of {shown!r} has {wrong[0]!r}, which its pattern {pattern!r} does not match.")
    if "_" in shown or shown in _RESERVED:
        raise ConfigError(
            f"The name {shown!r} cannot be registered: underscores join the parts of a decoding's name, and "
            f"{', '.join(_RESERVED)} are taken."
        )

    def add(made: F) -> F:
        for entry in (*_DECODERS.values(), *_EXITS.values()):
            if shown.partition("<")[0] == entry.shown.partition("<")[0] and entry.make.__module__ != made.__module__:
                raise ConfigError(f"The name {shown!r} is {entry.make.__module__}'s; choose another.")
        registry[pattern] = Entry(pattern, shown, meaning, made, tuple(ladder))
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


def exit_ladders() -> dict[str, tuple[str, ...]]:
    """What can be tried of every exit rule that has a ladder: "conf" -> ("conf0.9", ..., "conf0.1")."""
    return _ladders(_EXITS)


def decoder_ladders() -> dict[str, tuple[str, ...]]:
    """The same of the decoders: "deer" -> ("deer3t0.5", ...)."""
    return _ladders(_DECODERS)


def _ladders(registry: dict[str, Entry]) -> dict[str, tuple[str, ...]]:
    return {entry.shown.partition("<")[0]: entry.ladder for entry in registry.values() if entry.ladder}


def meanings() -> str:
    """All decoders and exit rules with their meanings, for help and messages."""
    return ", ".join(f"{e.shown} ({e.meaning})" for e in (*_DECODERS.values(), *_EXITS.values()))


def _unknown(setting: str, name: str, registry: dict[str, Entry]) -> Any:
    known = ", ".join(entry.shown for entry in registry.values()) or "none is installed"
    raise ConfigError(
        f"decoding.{setting} is {name[:LONGEST_NAME]!r}; known: {known}. One of another package needs "
        "--discover_packages_path."
    )
