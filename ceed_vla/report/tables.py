"""Tables whose columns can be sorted by keyboard and mouse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ceed_vla.report.html import Markup, element

MISSING = "-"
LONG = 60  # characters of a text that is wrapped


@dataclass(frozen=True)
class Cell:
    """A cell that is sorted by a number.

    Attributes:
        shown: Its text.
        value: The number; None sorts last.
    """

    shown: str
    value: float | None = None


def number(value: Any, form: str = "{:.2f}") -> Cell:
    """A cell of a number, or of a missing one."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(form.format(value), float(value)) if known else Cell(MISSING)


def percent(entry: Any) -> Cell:
    """A cell of a success entry: solved of episodes, rate and interval."""
    if not entry or not entry["episodes"]:
        return Cell(MISSING)
    low, high = (100 * end for end in entry["success_ci95"])
    rate = 100 * entry["success_rate"]
    shown = f"{entry['success']} of {entry['episodes']} = {rate:.1f} % [{low:.0f}, {high:.0f}]"
    return Cell(shown, rate)


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Cell]], title: str) -> Markup:
    """A table in a box that scrolls sideways; its header cells are buttons that sort it.

    Columns without any value are left out.
    """
    filled = [
        place
        for place in range(len(columns))
        if not rows or any(_text(row[place]) != MISSING for row in rows)
    ]
    columns = [columns[place] for place in filled]
    rows = [[row[place] for place in filled] for row in rows]
    head = element(
        "tr",
        *(
            element("th", element("button", name, type="button"), scope="col", aria_sort="none")
            for name in columns
        ),
    )
    body = (element("tr", *map(_cell, row)) for row in rows)
    content = (element("caption", title), element("thead", head), element("tbody", *body))
    return element(
        "div",
        element("table", *content),
        class_="wide",
        tabindex="0",
        role="region",
        aria_label=title,
    )


def _text(cell: str | Cell) -> str:
    return cell if isinstance(cell, str) else cell.shown


def _cell(cell: str | Cell) -> Markup:
    if isinstance(cell, str):
        return element("td", cell, class_="text" if len(cell) > LONG else None)
    value = "" if cell.value is None else repr(cell.value)
    return element("td", cell.shown, data_value=value, class_="number")
