"""Which commit of the repository this package was built from."""

from __future__ import annotations

import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parent


def commit() -> str:
    """The commit of a wheel, or of the clone that the package is in; "" where it is unknown."""
    written = PACKAGE / "commit.txt"  # by setup.py
    if written.is_file():
        return written.read_text(encoding="utf-8").strip()
    if not (PACKAGE.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
