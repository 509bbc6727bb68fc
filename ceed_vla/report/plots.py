"""Figures for plotly.js, as plain dictionaries of traces and layout."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Okabe and Ito's palette, readable without colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8A8F98")


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        title: Its title, which is also its description for screen readers.
        traces: Traces of plotly.js.
        layout: Its layout, without title and style.
        height: Height [px].
    """

    title: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    height: int = 380

    def specification(self) -> dict[str, Any]:
        """What the page's script draws."""
        return {"traces": list(self.traces), "layout": {"height": self.height, **self.layout}}


def label(name: object) -> str:
    """A text in a figure; plotly.js reads tags in texts, so they are escaped."""
    return html.escape(str(name), quote=False)


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, "automargin": True, **more}


def log_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis of positive values, with labels at 1, 2 and 5 times powers of ten."""
    low = math.floor(math.log10(min(values, default=1)))
    high = math.ceil(math.log10(max(values, default=1)))
    ticks = [step * 10.0**power for power in range(low, high + 1) for step in (1, 2, 5)]
    text = [f"{tick:g}" for tick in ticks]
    return axis(title, type="log", tickvals=ticks, ticktext=text)


def interval_bars(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Error bars from values to the ends of their intervals."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, (_, high) in zip(values, intervals, strict=True)],
        "arrayminus": [value - low for value, (low, _) in zip(values, intervals, strict=True)],
        "thickness": 1.2,
    }
