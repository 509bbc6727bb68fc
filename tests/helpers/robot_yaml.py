"""Robot files, written for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CONFIG = Path(__file__).resolve().parents[2] / "launch" / "config"


def write(folder: Path, values: Any) -> Path:
    """Write `folder`/robot.yaml with these values."""
    file = folder / "robot.yaml"
    file.write_text(yaml.safe_dump(values))
    return file
