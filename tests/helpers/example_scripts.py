"""The shell scripts of examples/, as they are and in small sizes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import warm_commands

ROOT = Path(__file__).resolve().parents[2]


def run_script(name: str, folder: Path, *, small: bool = False, seed: int = 0) -> None:
    """Run a script of examples/ with `folder` as its output; `small` trains for six steps only."""
    script = (ROOT / "examples" / name).read_text()
    script = script.replace('"$(dirname "${BASH_SOURCE[0]}")/.."', f'"{ROOT}"')
    if small:
        script = re.sub(r"--steps \d+", "--steps 6", script)
        script = re.sub(r"--episodes \d+", "--episodes 5", script)
    environment = {
        **os.environ,
        "PATH": warm_commands.path(),
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "SEED": str(seed),
    }
    done = subprocess.run(
        ["bash", "-c", script, name, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
