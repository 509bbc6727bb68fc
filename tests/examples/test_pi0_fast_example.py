"""examples/pi0_fast.py as printed: LeRobot's tokens by every decoder, in fewer forwards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^  (\S.*?) +(\d+) of (\d+) chunks equal LeRobot's tokens, +([\d.]+) forwards", re.M)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_runs_as_printed(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "pi0_fast.py"), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "24 chunks, 0 malformed" in done.stdout
    found = {name: (int(equal), int(all_), float(f)) for name, equal, all_, f in LINE.findall(done.stdout)}
    assert set(found) == {"greedy (AR)", "Jacobi", "Jacobi, warm start"}
    assert all(equal == all_ == 24 for equal, all_, _ in found.values())
    assert found["Jacobi, warm start"][2] < found["Jacobi"][2] < found["greedy (AR)"][2]
