"""Decoder names of an evaluation, and the table row that a name defines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.names import named_config, names_help
from ceed_vla.errors import ConfigError

TEACHER_PREFIX = "teacher_"
HONEST_RIVALS = {  # rows added to every table with a teacher, and what they show
    "teacher_ar": "the teacher token by token",
    "teacher_cap4": "what the teacher reaches in 4 forwards without distillation",
}
ONLY = "only="  # prefix of a name in --decoders: the rivals are not added
DECODERS = f"{names_help()}; all also with the prefix {TEACHER_PREFIX}"


@dataclass(frozen=True)
class Row:
    """One row of a report."""

    name: str  # as requested, e.g. ``"teacher_cap4"``
    model: str  # ``"policy"`` or ``"teacher"``
    decoding: DecodingConfig  # the decoding with every field resolved
    delay: int = 0  # control steps that pass while a chunk is decoded
    suffix: str = ""  # the part of the name that states the delay

    def delayed(self, milliseconds: float, fps: int, suffix: str = "") -> Row:
        """Return this row with a delay, rounded up to whole control steps; itself for 0.

        Args:
            milliseconds: Time that a chunk takes [ms].
            fps: Control rate [Hz].
            suffix: End of the row's name; by default the delay.
        """
        if not milliseconds:
            return self
        suffix = suffix or f"@{milliseconds:g}ms"
        steps = math.ceil(milliseconds * fps / 1000 - 1e-9)
        return replace(self, name=self.name + suffix, delay=steps, suffix=suffix)

    @property
    def reference(self) -> str:
        """Name of the full autoregressive row of the same model."""
        return TEACHER_PREFIX + "ar" if self.model == "teacher" else "ar"


def parse_decoders(text: str, *, has_teacher: bool) -> list[str]:
    """Parse a comma-separated list of decoders into unique names, in the order of the table.

    With a teacher, missing `HONEST_RIVALS` are put in front, unless a name has the prefix `ONLY`.

    Raises:
        ConfigError: No name, an unknown name, or a teacher row without a teacher.
    """
    names = _listed(text)
    if not names:
        raise ConfigError(f"--decoders is empty; name at least one of {DECODERS}.")
    for name in names:
        named_config(name.removeprefix(TEACHER_PREFIX))
        if name.startswith(TEACHER_PREFIX) and not has_teacher:
            raise ConfigError(
                f"Decoder {name!r} needs the teacher; pass --teacher.path=<checkpoint folder>."
            )
    return added_rivals(text, has_teacher=has_teacher) + names


def added_rivals(text: str, *, has_teacher: bool) -> list[str]:
    """The names that `parse_decoders` adds to those of `text`."""
    if not has_teacher or any(part.strip().startswith(ONLY) for part in text.split(",")):
        return []
    return [rival for rival in HONEST_RIVALS if rival not in _listed(text)]


def _listed(text: str) -> list[str]:
    """The names in a comma-separated list, without repetition."""
    names = (part.strip().removeprefix(ONLY).strip() for part in text.split(","))
    return list(dict.fromkeys(name for name in names if name))


def resolve_rows(names: Sequence[str], configs: dict[str, Any]) -> list[Row]:
    """Resolve checked names to rows.

    Args:
        names: Names from `parse_decoders`.
        configs: ``CeedVLAConfig`` by model: "policy" and optionally "teacher".
    """
    rows = []
    for name in names:
        model = "teacher" if name.startswith(TEACHER_PREFIX) else "policy"
        decoding = configs[model].named(name.removeprefix(TEACHER_PREFIX))
        rows.append(Row(name, model, decoding))
    return rows
