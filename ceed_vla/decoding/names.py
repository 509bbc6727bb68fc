"""One name says a whole decoding, everywhere: ``ar``, ``jacobi``, ``ceed``, ``cap2``,
``conf0.2_cap2_mid``, ``ar_h``.

A name is ``ceed`` (the checkpoint's own), a decoder, or exit rules of the Jacobi decoder, joined by
underscores; then ``h`` if only the executed steps must be right (exit rules imply it), ``fresh`` if
the tail behind them is computed with every iteration, then the guess. A checkpoint may have names
of its own, for what was measured on it: ``risk0.05``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.registry import DECODERS, EXITS, LONGEST_NAME, meanings
from ceed_vla.errors import ConfigError
from ceed_vla.fields import short

CEED = "ceed"
EXECUTED = "h"
FRESH = "fresh"
_GUESSES = ("mid", "random")
_STRICT = DecodingConfig()
# What commands write into a checkpoint; a digit is matched in one way only, so that no text takes
# long.
OWN = re.compile(r"(risk|plan)(\d+(\.\d+)?|\.\d+)|plan|learned", re.ASCII)
MOST_OWN = 256  # names of its own that a checkpoint may have


def names_help() -> str:
    """What a decoding's name may be."""
    return (
        f"{CEED} (the checkpoint's), {meanings()}; rules can be joined (conf<P>_cap<K>); Jacobi "
        "ones also with _fresh (the tail), _mid or _random (the guess); of a checkpoint: risk<E>, "
        "plan<MS>, learned"
    )


def named_config(
    decoding: str | DecodingConfig,
    ceed: DecodingConfig = _STRICT,
    own: Mapping[str, str] | None = None,
) -> DecodingConfig:
    """The decoding that a name stands for; `ConfigError` if it is unknown, or has values outside
    their range.

    "ceed" stands for `ceed`, the decoding of a checkpoint (strict without one), and the
    checkpoint's own names for what `own` says; where that is None, no checkpoint is known, and they
    are only checked.
    """
    if isinstance(decoding, DecodingConfig):
        return decoding
    if not isinstance(decoding, str) or len(decoding) > LONGEST_NAME:
        raise _unknown(decoding)
    if OWN.fullmatch(decoding):
        if own is not None and decoding not in own:
            raise ConfigError(
                f"The checkpoint has no decoding {decoding!r}; it has "
                f"{', '.join(sorted(own)) or 'none of its own'}. `ceed-vla calibrate` measures "
                "risk<E>, `tune` finds plan<MS>, `reinforce` learned."
            )
        return ceed if own is None else _parse(own[decoding], ceed)
    return _parse(decoding, ceed)


@lru_cache(maxsize=256)  # a robot asks for the same name with every chunk
def _parse(decoding: str, ceed: DecodingConfig) -> DecodingConfig:
    if len(decoding) > LONGEST_NAME:  # of what a checkpoint's own name stands for
        raise _unknown(decoding)
    head, *parts = decoding.split("_")
    changes = {} if head == "ar" else _endings(parts)
    if head == CEED and not parts:
        return replace(ceed, **changes)
    if DECODERS.match(head):
        changes["method"] = head
    else:
        parts = [head, *parts]
    if parts[-1:] == [EXECUTED] and head != EXECUTED:
        parts.pop()
        changes["watch"] = "executed"
    for part in parts:
        if not _add_exit(part, changes):
            raise _unknown(decoding)
    if not changes:
        raise _unknown(decoding)
    try:
        return DecodingConfig(**changes)
    except ConfigError as error:
        reason = str(error).replace("max_iterations", "its cap K")
        reason = reason.replace("confidence", "its confidence P")
        raise ConfigError(f"Decoder {decoding!r}: {reason}") from error


def _endings(parts: list[str]) -> dict[str, Any]:
    """What the last `parts` of a name say of guess and tail; they are removed."""
    changes: dict[str, Any] = {}
    if parts and parts[-1] in _GUESSES:
        changes["guess"] = parts.pop()
    if parts and parts[-1] == FRESH:
        changes["tail"] = parts.pop()
    return changes


def _add_exit(part: str, changes: dict[str, Any]) -> bool:
    """Add the exit rule that a part of a name stands for; false if there is none, or one of its
    kind already.
    """
    kind = EXITS.match(part)
    if kind is None or kind.rule.field in changes:
        return False
    changes["watch"] = "executed"
    if field := kind.rule.field:
        changes[field] = kind.rule.kind(kind.groups(part)[field])
    else:
        changes["exits"] = (*changes.get("exits", ()), part)
    return True


def _unknown(decoding: object) -> ConfigError:
    shown = (
        repr(decoding[:30])
        if isinstance(decoding, str) and len(decoding) > LONGEST_NAME
        else short(decoding)
    )
    return ConfigError(
        f"Unknown decoder {shown}; choose from {names_help()}. One of another package needs "
        "--discover_packages_path; those of an axis are known once ceed_vla.axes is imported."
    )
