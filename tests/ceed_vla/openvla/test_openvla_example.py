"""examples/openvla.py as printed, and with a published folder: convert, distil, and fewer iterations afterwards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ceed_vla.checkpoints import load

ROOT = Path(__file__).parents[3]
LINE = re.compile(
    r"^  (\S.*?) +([\d.]+) forwards a chunk of (\d+) tokens, +([\d.]+)% of the greedy tokens$", re.M
)


def run(*flags: str) -> list[dict[str, tuple[float, float]]]:
    """Run the example; (forwards, percent of greedy tokens) of every decoder, before and after distillation."""
    pytest.importorskip("mujoco")
    environment = {**os.environ, "MUJOCO_GL": "egl", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "openvla.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [(name, (float(f), float(share)), int(n)) for name, f, n, share in LINE.findall(done.stdout)]
    assert len(found) == 8
    assert {n for *_, n in found} == {28}
    return [{name: values for name, values, _ in found[i : i + 4]} for i in (0, 4)]


@pytest.mark.slow
def test_the_example_runs_as_printed(tmp_path: Path) -> None:
    before, after = run("--output", str(tmp_path))
    for decoders in (before, after):
        assert decoders["greedy (AR)"] == (27.0, 100.0)
        for name in ("Jacobi", "Jacobi, warm start"):
            assert decoders[name][1] == 100.0  # strict: every token
            assert decoders[name][0] < 27
        assert decoders["... and at most 2"][0] <= 2
    assert after["Jacobi"][0] < before["Jacobi"][0]
    for name in (
        "base",
        "fine-tune/checkpoints/final/pretrained_model",
        "student/checkpoints/final/pretrained_model",
    ):
        policy, _, _ = load(tmp_path / name)
        assert policy.config.backbone.type == "openvla"
    # the same with a folder and its data, as for a real model
    flags = ("--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--unnorm_key", "tabletop")
    before, after = run(*flags, "--steps", "2", "--output", str(tmp_path / "again"))
    assert after["Jacobi"][1] == after["Jacobi, warm start"][1] == 100.0
