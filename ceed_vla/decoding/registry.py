"""Registries of decoders and exit rules, which are found by the patterns of their names.

Each is registered in the file that defines it.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ceed_vla.errors import ConfigError

Decode = Callable[[Any, Any, Any], Any]  # backbone, prefix, BlockRequest -> DecodeResult
Prefill = Callable[[Any, Any, Any], Any]  # backbone, observation, options -> Prefix

LONGEST_NAME = 60
_RESERVED = ("ceed", "h", "fresh", "mid", "random", "previous")
# Attributes that earlier versions read from the function of a decoder.
_FORMER = {"relaxes": "relaxes", "prefill": "prefill", "eager_only": "compiles"}


class Options:
    """Options in a decoder's name.

    A subclass is a frozen dataclass with one field for every named group of the pattern.
    """

    @classmethod
    def parse(cls, groups: Mapping[str, str | None]) -> Self:
        """The options of a name; the field of an absent group has its default."""
        kinds = typing.get_type_hints(cls)
        return cls(**{name: kinds[name](text) for name, text in groups.items() if text})


class Numbers(tuple[int, ...]):
    """Numbers that are joined by dashes in a name: ``1-2-4``."""

    def __new__(cls, text: str) -> Self:
        return super().__new__(cls, (int(number) for number in text.split("-")))


@dataclass(frozen=True)
class Decoder:
    """A way to decode a block.

    Attributes:
        pattern: Regular expression of its names.
        shown: Its name in messages, for example ``cap<K>``.
        meaning: What it does, in a few words.
        decode: Decodes one block: ``decode(backbone, prefix, request) -> DecodeResult``.
        options: Class of the options in its names; with None, the options are the named groups as
            text.
        relaxes: ``relaxes(options)``, whether it may return other tokens than the greedy ones.
        compiles: Whether it runs on a compiled backbone.
        timed: Whether it takes a deadline.
        rows_wait: Whether the rows of a batch wait for the slowest one, so that a row takes more
            forwards than alone.
        forget: ``forget(backbone)`` resets what it learnt from earlier chunks; None if it learns
            nothing.
        prefill: Runs the prefix, ``prefill(backbone, observation, options) -> Prefix``; None for
            ``backbone.prefill(observation)``.
        needs: Capabilities that the backbone must offer (`ceed_vla.backbones.capabilities`).
        ladder: Names that calibration and search try, strictest first; ``{exit}`` stands for the
            depth of an exit.
    """

    pattern: str
    shown: str
    meaning: str
    decode: Decode
    options: type[Options] | None = None
    relaxes: Callable[[Any], bool] = lambda _: False
    compiles: bool = True
    timed: bool = False
    rows_wait: bool = False
    forget: Callable[[Any], None] | None = None
    prefill: Prefill | None = None
    needs: tuple[type, ...] = ()
    ladder: tuple[str, ...] = ()

    def parse(self, name: str) -> Any:
        """Parse the options in a name that matches the pattern."""
        found = re.fullmatch(self.pattern, name, re.ASCII)
        assert found is not None
        return found.groupdict() if self.options is None else self.options.parse(found.groupdict())

    @property
    def home(self) -> str:
        """The module that defines it."""
        return self.decode.__module__


@dataclass(frozen=True)
class ExitKind:
    """Exit rules of one kind.

    Attributes:
        pattern: Regular expression of its names; named groups are arguments of `rule`, as text.
        shown: Its name in messages.
        meaning: When it ends decoding, in a few words; empty for a rule that is not listed.
        rule: The class, an `ExitRule`.
        ladder: As in `Decoder`.
    """

    pattern: str
    shown: str
    meaning: str
    rule: Any
    ladder: tuple[str, ...] = ()

    def groups(self, name: str) -> dict[str, str]:
        """The named groups in a name that matches the pattern."""
        found = re.fullmatch(self.pattern, name, re.ASCII)
        assert found is not None
        return found.groupdict()

    @property
    def home(self) -> str:
        """The module that defines it."""
        return str(self.rule.__module__)


class Registry[E: (Decoder, ExitKind)](dict[str, E]):
    """Entries by their patterns; the field `setting` of `DecodingConfig` holds their names."""

    def __init__(self, setting: str) -> None:
        super().__init__()
        self.setting = setting

    def add(self, entry: E) -> None:
        """Register an entry; `ConfigError` if another module has registered its name."""
        for other in _entries():
            same = other.shown.partition("<")[0] == entry.shown.partition("<")[0]
            if same and other.home != entry.home:
                raise ConfigError(
                    f"The name {entry.shown!r} is registered by {other.home}; choose another."
                )
        self[entry.pattern] = entry

    def match(self, name: str) -> E | None:
        """The entry that a name belongs to; None for an unknown one."""
        if len(name) > LONGEST_NAME:
            return None
        for entry in self.values():
            if re.fullmatch(entry.pattern, name, re.ASCII):
                return entry
        return None

    def find(self, name: str) -> E:
        """As `match`; `ConfigError` for an unknown name."""
        if entry := self.match(name):
            return entry
        known = ", ".join(entry.shown for entry in self.values()) or "none is installed"
        raise ConfigError(
            f"decoding.{self.setting} is {name[:LONGEST_NAME]!r}; known: {known}. One of "
            "another package needs --discover_packages_path."
        )

    def ladders(self, exits: Sequence[int] = ()) -> dict[str, tuple[str, ...]]:
        """Ladders of the entries that have one: "conf" -> ("conf0.9", ..., "conf0.1").

        An entry that needs an exit has one ladder per depth in `exits`: "deer3" -> ("deer3t0.5",
        ..., "deer3t3").
        """
        found: dict[str, tuple[str, ...]] = {}
        for entry in self.values():
            name = entry.shown.partition("<")[0]
            if any("{exit}" in rung for rung in entry.ladder):
                for depth in exits:
                    rungs = tuple(rung.format(exit=depth) for rung in entry.ladder)
                    found[f"{name}{depth}"] = rungs
            elif entry.ladder:
                found[name] = entry.ladder
        return found


def _check_name(pattern: str, shown: str, ladder: Sequence[str]) -> None:
    """Raise `ConfigError` if a name or a ladder cannot be registered."""
    for rung in ladder:
        if not re.fullmatch(pattern, rung.format(exit=1), re.ASCII):
            raise ConfigError(
                f"The ladder of {shown!r} has {rung!r}, which its pattern {pattern!r} does not "
                "match."
            )
    if "_" in shown or shown in _RESERVED:
        raise ConfigError(
            f"The name {shown!r} cannot be registered: underscores join the parts of a decoding's "
            f"name, and {', '.join(_RESERVED)} are taken."
        )


DECODERS: Registry[Decoder] = Registry("method")
EXITS: Registry[ExitKind] = Registry("exits")


def register_decoder(
    pattern: str,
    shown: str,
    meaning: str,
    ladder: Sequence[str] = (),
    *,
    options: type[Options] | None = None,
    relaxes: bool | Callable[[Any], bool] = False,
    compiles: bool = True,
    timed: bool = False,
    rows_wait: bool = False,
    forget: Callable[[Any], None] | None = None,
    prefill: Prefill | None = None,
    needs: Sequence[type] = (),
) -> Callable[[Decode], Decode]:
    """Register the decorated function as the decoder of names that match `pattern`; see `Decoder`.

    Raises:
        ConfigError: The name is taken or cannot be used, or the ladder does not match the pattern.
    """
    _check_name(pattern, shown, ladder)
    relaxing = relaxes if callable(relaxes) else lambda _: bool(relaxes)

    def add(decode: Decode) -> Decode:
        DECODERS.add(
            Decoder(
                pattern=pattern,
                shown=shown,
                meaning=meaning,
                decode=decode,
                options=options,
                relaxes=relaxing,
                compiles=compiles,
                timed=timed,
                rows_wait=rows_wait,
                forget=forget,
                prefill=prefill,
                needs=tuple(needs),
                ladder=tuple(ladder),
            )
        )
        return decode

    return add


def register_exit[R](
    pattern: str, shown: str, meaning: str, ladder: Sequence[str] = ()
) -> Callable[[type[R]], type[R]]:
    """Register the decorated `ExitRule` for names that match `pattern`; see `ExitKind`.

    Raises:
        ConfigError: The name is taken or cannot be used, the ladder does not match the pattern, or
            the rule has no `reason`.
    """
    _check_name(pattern, shown, ladder)

    def add(rule: type[R]) -> type[R]:
        if not isinstance(getattr(rule, "reason", None), str):
            raise ConfigError(
                f"The exit rule {rule.__name__} has no `reason`, which results report; set it."
            )
        EXITS.add(ExitKind(pattern, shown, meaning, rule, tuple(ladder)))
        return rule

    return add


def _entries() -> list[Decoder | ExitKind]:
    return [*DECODERS.values(), *EXITS.values()]


def find_decoder(name: str) -> Decoder:
    """The decoder that a name belongs to; `ConfigError` for an unknown name."""
    decoder = DECODERS.find(name)
    for former, present in _FORMER.items():
        if hasattr(decoder.decode, former):
            raise ConfigError(
                f"The decoder {decoder.shown!r} has the attribute {former!r} on its function; "
                f"pass {present}=... to register_decoder instead."
            )
    return decoder


def find_exit(name: str) -> ExitKind:
    """The kind of an exit rule's name; `ConfigError` for an unknown name."""
    return EXITS.find(name)


def decoder_ladders(exits: Sequence[int] = ()) -> dict[str, tuple[str, ...]]:
    """Ladders of all decoders; see `Registry.ladders`."""
    return DECODERS.ladders(exits)


def exit_ladders() -> dict[str, tuple[str, ...]]:
    """Ladders of all exit rules."""
    return EXITS.ladders()


def meanings() -> str:
    """All decoders and exit rules with their meanings, for help and messages."""
    shown = [entry for entry in _entries() if entry.meaning]
    return ", ".join(f"{entry.shown} ({entry.meaning})" for entry in shown)
