"""Decoder names: ``ar``, ``jacobi``, ``ceed``, ``cap2``, ``conf0.2_cap2_mid``, ``ar_h``.

One name specifies a whole decoding, everywhere. It starts with ``ceed`` (the checkpoint's own
decoding), a decoder, or exit rules of the Jacobi decoder, joined by underscores. Then follow ``h``
if only the executed steps must be right (exit rules imply it), ``fresh`` if every iteration
computes the tail behind them, and the guess. A checkpoint can define names of its own for settings
that were measured on it, for example ``risk0.05``.
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
# Names that commands write into a checkpoint. Each digit matches in one way only, so that matching
# takes linear time.
OWN = re.compile(r"(risk|plan)(\d+(\.\d+)?|\.\d+)|plan|learned", re.ASCII)
MOST_OWN = 256  # limit on the names that a checkpoint defines


def names_help() -> str:
    """A description of all decoder names, for help and messages."""
    return (
        f"{CEED} (the checkpoint's), {meanings()}; exit rules can be joined (conf<P>_cap<K>); "
        "endings: _h (only the executed steps), _fresh (the tail), _mid or _random (the guess); "
        "names of a checkpoint: risk<E>, plan<MS>, learned"
    )


def named_config(
    decoding: str | DecodingConfig,
    ceed: DecodingConfig = _STRICT,
    own: Mapping[str, str] | None = None,
) -> DecodingConfig:
    """The decoding that a name specifies.

    Args:
        decoding: A decoder name; a configuration is returned as it is.
        ceed: The checkpoint's decoding, for the name "ceed"; strict without a checkpoint.
        own: Decoder names by the checkpoint's own names. If None, no checkpoint is loaded: its own
            names are only validated, and give `ceed`.

    Raises:
        ConfigError: The name is unknown, or a value in it is out of range.
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


@lru_cache(maxsize=256)  # a robot uses the same name for every chunk
def _parse(decoding: str, ceed: DecodingConfig) -> DecodingConfig:
    if len(decoding) > LONGEST_NAME:  # a checkpoint's own name may map to any text
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
    """Remove the last `parts` of a name that set guess and tail; return these settings."""
    changes: dict[str, Any] = {}
    if parts and parts[-1] in _GUESSES:
        changes["guess"] = parts.pop()
    if parts and parts[-1] == FRESH:
        changes["tail"] = parts.pop()
    return changes


def _add_exit(part: str, changes: dict[str, Any]) -> bool:
    """Add the exit rule that a part of a name specifies to `changes`.

    Returns:
        Whether it was added: not if the rule is unknown, or sets a field that is set already.
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
    decoders = [decoder.shown for decoder in DECODERS.values()]
    rules = [kind.shown for kind in EXITS.values()]
    known = ", ".join((CEED, *decoders, *rules))
    return ConfigError(
        f"Unknown decoder {shown}; choose from {known}. A checkpoint's own names are risk<E>, "
        "plan<MS> and learned. A decoder of another package needs --discover_packages_path; those "
        "of an axis need `import ceed_vla.axes`."
    )
