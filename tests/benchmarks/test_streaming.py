"""Streaming takes the memory that it is given, whatever the data set's size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "streaming.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_over_the_models() -> None:
    """Of 10,000 frames (0.55 GB decoded); the benchmark's own 100,000 take ten minutes."""
    command = [sys.executable, str(BENCHMARK), "--frames", "10000", "--steps", "5", "--memory", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-2000:]
    over = {name: float(gb) for name, gb in re.findall(r"^  (\w+) .* ([+-][\d.]+) GB over", done.stdout, re.MULTILINE)}
    assert over["stream"] < 0.3
    assert over["map"] > 0.4
