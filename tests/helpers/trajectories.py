"""Collected trajectories as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def table_of(folder: Path) -> Any:
    """The shards of a folder by name."""
    return {file.name: pq.read_table(file) for file in sorted(folder.glob("*.parquet"))}
