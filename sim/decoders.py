"""The decoders an evaluation knows by name, and how a name becomes a row of the table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.errors import ConfigError

TEACHER_PREFIX = "teacher_"
HONEST_RIVALS = ("teacher_ar", "teacher_cap4")
DECODERS = (
    "ar, ar_h (stops after the executed steps), jacobi (strict), ceed (the checkpoint's early exit), cap<K> (at most K "
    "forwards, e.g. cap2), conf<P>_cap<K> (or until confident, e.g. conf0.2_cap3); Jacobi ones also with _mid or "
    "_random (the guess); all with teacher_ in front"
)
_STARTS = ("mid", "random")
_EXIT_RULE = re.compile(r"(?:conf(?P<confidence>[0-9]*\.?[0-9]+)_)?cap(?P<cap>[0-9]+)")
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Row:
    """One row of a report.

    Attributes:
        name: As asked for, e.g. ``"teacher_cap4"``.
        model: ``"policy"`` or ``"teacher"``.
        decoding: The decoding with every field resolved.
    """

    name: str
    model: str
    decoding: DecodingConfig

    @property
    def reference(self) -> str:
        """Name of the full autoregressive row of the same model."""
        return TEACHER_PREFIX + "ar" if self.model == "teacher" else "ar"


def _named(name: str, executed_steps: int, early_exit: DecodingConfig) -> DecodingConfig | None:
    """The decoding of a name without ``teacher_``, None for an unknown one; `early_exit` is the checkpoint's own."""
    if name in ("ar", "ar_h"):
        return DecodingConfig(method="ar", executed_steps=executed_steps if name == "ar_h" else None)
    plain, _, start = name.rpartition("_")
    if start not in _STARTS:
        plain, start = name, "previous"
    if plain == "ceed":
        return early_exit if plain == name else replace(early_exit, guess=start)
    if plain == "jacobi":
        return DecodingConfig(guess=start)
    rule = _EXIT_RULE.fullmatch(plain) if len(plain) <= _LONGEST_NAME else None
    if rule is None:
        return None
    confidence = None if rule["confidence"] is None else float(rule["confidence"])
    try:
        return DecodingConfig(
            guess=start, confidence=confidence, max_iterations=int(rule["cap"]), executed_steps=executed_steps
        )
    except ConfigError as error:
        reason = str(error).replace("max_iterations", "its cap K").replace("confidence", "its confidence P")
        raise ConfigError(f"Decoder {name!r}: {reason}") from error


def parse_decoders(text: str, *, has_teacher: bool) -> list[str]:
    """Split and check a comma-separated list of decoders.

    With a teacher, the rows every table must have (`HONEST_RIVALS`) are put in front where they are missing.

    Args:
        text: For example ``"ar,jacobi,ceed"``.
        has_teacher: Whether a teacher checkpoint is given.

    Returns:
        Names without repetition, in the order of the table.

    Raises:
        ConfigError: No name, an unknown name, or a teacher row without a teacher.
    """
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ConfigError(f"--decoders is empty; name at least one of {DECODERS}.")
    for name in names:
        if _named(name.removeprefix(TEACHER_PREFIX), 1, DecodingConfig()) is None:
            raise ConfigError(f"Unknown decoder {name[:_LONGEST_NAME]!r}; choose from {DECODERS}.")
        if name.startswith(TEACHER_PREFIX) and not has_teacher:
            raise ConfigError(f"Decoder {name!r} needs the teacher; pass --teacher.path=<checkpoint folder>.")
    if has_teacher:
        names = [rival for rival in HONEST_RIVALS if rival not in names] + names
    return names


def resolve_rows(names: Sequence[str], configs: dict[str, Any], executed_steps: int) -> list[Row]:
    """Rows for checked `names`.

    Args:
        names: From `parse_decoders`.
        configs: ``CeedVLAConfig`` of ``"policy"`` and, where there is one, ``"teacher"``.
        executed_steps: Steps ``h`` executed before the next replan.

    Returns:
        One row a name.
    """
    rows = []
    for name in names:
        model = "teacher" if name.startswith(TEACHER_PREFIX) else "policy"
        early_exit = configs[model].decoding
        if early_exit.executed_steps is not None:
            early_exit = replace(early_exit, executed_steps=executed_steps)
        decoding = _named(name.removeprefix(TEACHER_PREFIX), executed_steps, early_exit)
        assert decoding is not None  # `parse_decoders` has checked the names
        rows.append(Row(name, model, decoding))
    return rows


def named_decoding(name: str, config: Any, executed_steps: int) -> DecodingConfig:
    """The decoding that one name stands for.

    Args:
        name: One decoder, for example ``"cap2"``.
        config: ``CeedVLAConfig`` of the policy.
        executed_steps: Steps ``h`` executed before the next replan.

    Raises:
        ConfigError: As `checked_name`.
    """
    return resolve_rows([checked_name(name)], {"policy": config}, executed_steps)[0].decoding


def checked_name(name: str) -> str:
    """The name of a decoder where there is one policy and no teacher beside it.

    Raises:
        ConfigError: An unknown name, a teacher's, or several.
    """
    if name.startswith(TEACHER_PREFIX):
        plain = name.removeprefix(TEACHER_PREFIX)
        raise ConfigError(
            f"Decoder {name[:_LONGEST_NAME]!r} is a teacher's, and only one policy decodes here; try "
            f"{plain[:_LONGEST_NAME]!r}."
        )
    names = parse_decoders(name, has_teacher=False)
    if len(names) > 1:
        raise ConfigError(f"{name[:_LONGEST_NAME]!r} names {len(names)} decoders; choose one of {DECODERS}.")
    return names[0]
