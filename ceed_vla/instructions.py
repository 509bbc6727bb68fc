"""The instructions of a batch, and prompt templates for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ceed_vla.errors import ConfigError, InstructionError

PLACE = "{instruction}"  # replaced, not formatted, so that a template cannot read attributes
LONGEST_PROMPT = 100_000


def batch_instructions(
    complementary: Mapping[str, Any] | None, rows: int | None = None
) -> list[str]:
    """Read the ``task`` of a batch.

    Args:
        complementary: LeRobot's complementary data, or the batch itself.
        rows: Rows of the batch; None to accept any number.

    Returns:
        One text per row; a single instruction is repeated for all `rows`.

    Raises:
        InstructionError: There are no instructions, or not one for every row.
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
        raise InstructionError(
            f"The observation has the instructions {shown} for "
            f"{'any number of' if rows is None else rows} rows; pass 'task' as non-empty text, or "
            "as a list with one for every row."
        )
    return tasks


def check_template(template: object, name: str) -> None:
    """Raise `ConfigError` unless `template` is text with exactly one ``{instruction}`` and no other
    field.
    """
    fits = isinstance(template, str) and len(template) <= LONGEST_PROMPT
    if (
        not fits
        or str(template).count(PLACE) != 1
        or set("{}") & set(str(template).replace(PLACE, ""))
    ):
        raise ConfigError(
            f"{name} is {str(template)[:200]!r}; it must contain {PLACE} once, and no other field."
        )
