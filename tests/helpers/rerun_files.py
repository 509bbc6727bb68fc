"""Recordings for Rerun, read by its SDK."""

from __future__ import annotations

from pathlib import Path

from rerun.experimental import RrdReader


def entities_of(file: Path) -> set[str]:
    """Paths of the entities in a recording."""
    schema = RrdReader(file).store().schema()
    return {column.entity_path for column in schema.component_columns()}


def components_of(file: Path) -> set[str]:
    """Types of the components in a recording, such as "rerun.components.TensorData"."""
    schema = RrdReader(file).store().schema()
    return {column.component_type for column in schema.component_columns()}
