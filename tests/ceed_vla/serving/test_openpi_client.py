"""openpi's own client, unmodified, in an environment of its own with numpy 1."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# typing_extensions is imported by the client, and missing from its requirements.
PACKAGES = ("openpi-client==0.1.2", "typing_extensions")
MAP = (
    "observation/image=observation.images.front,observation/wrist_image=observation.images.wrist,"
    "observation/state=observation.state"
)


@pytest.mark.slow
def test_its_client_is_served(serving: Callable[..., Any], tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    uv = [sys.executable, "-m", "uv", "-q"]
    subprocess.run([*uv, "venv", "--python", sys.executable, tmp_path / "venv"], check=True)
    subprocess.run([*uv, "pip", "install", "--python", python, *PACKAGES], check=True)
    server = serving(f"--map={MAP}")
    done = subprocess.run(
        [python, HERE / "openpi_black_box.py", str(server.port)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "metadata ['observation/image', 'observation/state', 'observation/wrist_image']",
        "actions (8, 7) float32 forwards 1",
        "broker True",
        "error The observation lacks 'observation/image'; it has 'prompt'.",
        "again True",
    ]
