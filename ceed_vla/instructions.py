"""The instructions of a batch, as whoever calls a policy passes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ceed_vla.errors import ObservationError


def batch_instructions(complementary: Mapping[str, Any] | None, rows: int | None = None) -> list[str]:
    """The ``task`` of a batch, in LeRobot's complementary data or the batch itself, as one text a row.

    One instruction counts for all `rows`, whose number is not checked if None. `ObservationError` if there are others.
    """
    task = (complementary or {}).get("task")
    tasks = [task] if isinstance(task, str) else list(task) if isinstance(task, list | tuple) else []
    texts = bool(tasks) and all(isinstance(text, str) and text.strip() for text in tasks)
    if rows is not None and len(tasks) == 1:
        tasks = tasks * rows
    if not texts or (rows is not None and len(tasks) != rows):
        shown = repr(task)[:200]
        raise ObservationError(
            f"The observation has the instructions {shown} for {'any number of' if rows is None else rows} rows; pass "
            "'task' as a non-empty text, or a list with one for every row."
        )
    return tasks
