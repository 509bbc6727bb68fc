"""Decoders and exit rules by the pattern of their names; each registers itself where it is
written.
"""

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
    """One decoder or exit rule."""

    pattern: str  # of its names; named groups are its options
    shown: str  # its name in messages: "cap<K>"
    meaning: str  # in a few words; none for what is not shown
    make: Any  # the decoder, or the class of the rule
    # Names of it that calibration and search try, from the strictest on; "{exit}" is an exit's
    # depth.
    ladder: tuple[str, ...] = ()


class _Registry(dict[str, Entry]):
    """Entries by their patterns.

    Attributes:
        setting: Field of `DecodingConfig` that names them.
    """

    def __init__(self, setting: str) -> None:
        super().__init__()
        self.setting = setting

    def register[F: Callable[..., Any]](
        self, pattern: str, shown: str, meaning: str, ladder: Sequence[str] = ()
    ) -> Callable[[F], F]:
        """Register what is decorated for names that match `pattern`.

        A decoder is a function ``decode(backbone, prefix, request) -> DecodeResult``. An `ExitRule`
        is made with the named groups of `pattern`, texts, as keyword arguments. `ceed-vla tune`,
        and for rules `ceed-vla calibrate`, try the names of its `ladder`, from the strictest to the
        loosest.
        """
        if wrong := [
            name for name in ladder if not re.fullmatch(pattern, name.format(exit=1), re.ASCII)
        ]:
            raise ConfigError(
                f"The ladder of {shown!r} has {wrong[0]!r}, which its pattern {pattern!r} does not "
                "match."
            )
        if "_" in shown or shown in _RESERVED:
            raise ConfigError(
                f"The name {shown!r} cannot be registered: underscores join the parts of a "
                f"decoding's name, and {', '.join(_RESERVED)} are taken."
            )

        def add(made: F) -> F:
            if self.setting == "exits" and not isinstance(getattr(made, "reason", None), str):
                raise ConfigError(
                    f"The exit rule {made.__name__} has no reason, the text that results give; set "
                    "one."
                )
            for entry in (*_DECODERS.values(), *_EXITS.values()):
                taken = shown.partition("<")[0] == entry.shown.partition("<")[0]
                if taken and entry.make.__module__ != made.__module__:
                    raise ConfigError(
                        f"The name {shown!r} is {entry.make.__module__}'s; choose another."
                    )
            self[pattern] = Entry(pattern, shown, meaning, made, tuple(ladder))
            return made

        return add

    def match(self, name: str) -> tuple[Entry, dict[str, str]] | None:
        """The entry of that name and its options; None for an unknown name."""
        if len(name) <= LONGEST_NAME:
            for entry in self.values():
                if found := re.fullmatch(entry.pattern, name, re.ASCII):
                    return entry, found.groupdict()
        return None

    def find(self, name: str) -> tuple[Entry, dict[str, str]]:
        """As `match`; `ConfigError` for an unknown name."""
        if found := self.match(name):
            return found
        known = ", ".join(entry.shown for entry in self.values()) or "none is installed"
        raise ConfigError(
            f"decoding.{self.setting} is {name[:LONGEST_NAME]!r}; known: {known}. One of another "
            "package needs --discover_packages_path."
        )

    def ladders(self, exits: Sequence[int] = ()) -> dict[str, tuple[str, ...]]:
        """What can be tried of every entry that has a ladder: "conf" -> ("conf0.9", ...,
        "conf0.1").

        One that needs an exit has a ladder for every depth of `exits`: "deer3" -> ("deer3t0.5",
        ..., "deer3t3").
        """
        found: dict[str, tuple[str, ...]] = {}
        for entry in self.values():
            name = entry.shown.partition("<")[0]
            if "{exit}" in "".join(entry.ladder):
                found |= {
                    f"{name}{k}": tuple(rung.format(exit=k) for rung in entry.ladder) for k in exits
                }
            elif entry.ladder:
                found[name] = entry.ladder
        return found


_DECODERS = _Registry("method")
_EXITS = _Registry("exits")
register_decoder = _DECODERS.register
match_decoder = _DECODERS.match
find_decoder = _DECODERS.find
register_exit = _EXITS.register
match_exit = _EXITS.match
find_exit = _EXITS.find
decoder_ladders, exit_ladders = _DECODERS.ladders, _EXITS.ladders


def meanings() -> str:
    """All decoders and exit rules with their meanings, for help and messages."""
    shown = [entry for entry in (*_DECODERS.values(), *_EXITS.values()) if entry.meaning]
    return ", ".join(f"{entry.shown} ({entry.meaning})" for entry in shown)
