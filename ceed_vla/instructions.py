"""The instructions of a batch, as whoever calls a policy passes them, and the prompts they are put
into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ceed_vla.errors import ConfigError, ObservationError

PLACE = "{instruction}"  # replaced, not formatted: a template reads no attributes
LONGEST_PROMPT = 100_000


def batch_instructions(
    complementary: Mapping[str, Any] | None, rows: int | None = None
) -> list[str]:
    """The ``task`` of a batch, in LeRobot's complementary data or the batch itself, as one text a
    row.

    One instruction counts for all `rows`, whose number is not checked if None. `ObservationError`
    if there are others.
    """
    task = (complementary or {}).get("task")
    tasks = (
        [task] if isinstance(task, str) else list(task) if isinstance(task, list | tuple) else []
    )
    texts = bool(tasks) and all(isinstance(text, str) and text.strip() for text in tasks)
    if rows is not None and len(tasks) == 1:
        tasks = tasks * rows
    if not texts or (rows is not None and len(tasks) != rows):
        shown = repr(task)[:200]
        raise ObservationError(
            f"The observation has the instructions {shown} for "
            f"{'any number of' if rows is None else rows} rows; pass 'task' as a non-empty text, "
            "or a list with one for every row."
        )
    return tasks


def check_template(template: object, name: str) -> None:
    """Raise `ConfigError` unless `template` is a text with exactly one ``{instruction}`` and no
    other field.
    """
    fits = isinstance(template, str) and len(template) <= LONGEST_PROMPT
    if (
        not fits
        or str(template).count(PLACE) != 1
        or set("{}") & set(str(template).replace(PLACE, ""))
    ):
        raise ConfigError(
            f"{name} is {str(template)[:200]!r}; it must hold {PLACE} once, and no other field."
        )
