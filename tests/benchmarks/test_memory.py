"""The memory plan holds for a real step."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory import MODES, plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert MODES["student_full"].bytes(7e9, 7e9) == pytest.approx(154e9)
    assert MODES["teacher_full"].bytes(7e9, 7e9, shards=8) == pytest.approx(15.75e9)
    plan()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + len(MODES)
    assert "shard" in rows[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_measured_step_is_near_the_plan() -> None:
    command = [sys.executable, str(BENCHMARKS / "memory.py"), "--parameters", "0.05"]
    modes = ["--modes", "student_lora,teacher_full"]
    done = subprocess.run([*command, *modes], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    ratios = [float(text) for text in re.findall(r"([\d.]+)x", done.stdout)]
    assert len(ratios) == 2
    assert all(0.9 < ratio < 3 for ratio in ratios)  # small models: work space counts
