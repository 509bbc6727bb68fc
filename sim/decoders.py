"""The decoders an evaluation knows by name, and how a name becomes a row of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.errors import ConfigError

TEACHER_PREFIX = "teacher_"
HONEST_RIVALS = ("teacher_ar", "teacher_cap4")
_STARTS = ("mid", "random")


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


def _base_decodings(executed_steps: int, early_exit: DecodingConfig) -> dict[str, DecodingConfig]:
    """Decodings by name; `early_exit` is the checkpoint's own."""
    warm = DecodingConfig(method="jacobi", guess="previous")
    named = {
        "ar": DecodingConfig(method="ar"),
        "ar_h": DecodingConfig(method="ar", executed_steps=executed_steps),
        "jacobi": warm,
        "ceed": early_exit,
        **{f"cap{k}": replace(warm, max_iterations=k, executed_steps=executed_steps) for k in range(1, 5)},
        "conf": replace(warm, confidence=0.5, max_iterations=4, executed_steps=executed_steps),
    }
    started = {
        f"{name}_{start}": replace(decoding, guess=start)
        for name, decoding in named.items()
        if decoding.method == "jacobi"
        for start in _STARTS
    }
    return {**named, **started}


def decoder_names() -> list[str]:
    """Every decoder name without the ``teacher_`` prefix, which each of them may carry."""
    return list(_base_decodings(1, DecodingConfig(method="jacobi")))


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
    known = decoder_names()
    if not names:
        raise ConfigError(f"--decoders is empty; name at least one of {', '.join(known)}.")
    for name in names:
        if name.removeprefix(TEACHER_PREFIX) not in known:
            raise ConfigError(
                f"Unknown decoder {name!r}; choose from {', '.join(known)}, "
                f"each also as {TEACHER_PREFIX}<name>."
            )
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
        decodings = _base_decodings(executed_steps, early_exit)
        rows.append(Row(name, model, decodings[name.removeprefix(TEACHER_PREFIX)]))
    return rows
