"""HTML elements. Every text is escaped, so text of a run cannot inject markup."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from typing import Any

_VOID = ("meta", "img")  # elements without an end tag


class Markup(str):
    """Text that is HTML already."""


def text(value: object) -> Markup:
    """Escape a text, or return it if it is `Markup`."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def joined(parts: Iterable[object]) -> Markup:
    """Escape and join texts."""
    return Markup("".join(text(part) for part in parts))


def element(tag: str, /, *children: object, **attributes: object) -> Markup:
    """An element; an attribute that is None is left out.

    In the names of attributes, an underscore at the end is dropped and others are hyphens: `class_`
    is ``class``, and `aria_label` is ``aria-label``.
    """
    listed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if tag in _VOID else f"</{tag}>"
    return Markup(f"<{tag}{listed}>{joined(children)}{end}")


def script(source: str) -> Markup:
    """An inline script; the source is ours or a library's, never of a run."""
    return Markup(f"<script>{source.replace('</script', '<\\/script')}</script>")


def _finite(values: Any) -> Any:
    """The values with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def data(identifier: str, values: Any) -> Markup:
    """Values for scripts, as JSON in which no tag can begin; NaN and infinity are null."""
    text_of = json.dumps(_finite(values), allow_nan=False)
    safe = text_of.replace("<", "\\u003c").replace(">", "\\u003e")
    return Markup(f'<script type="application/json" id="{text(identifier)}">{safe}</script>')
