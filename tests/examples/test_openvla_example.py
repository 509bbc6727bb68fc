"""examples/openvla.py as printed, and with a published folder: convert, distil, and fewer iterations afterwards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ceed_vla.checkpoints import load

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"^  (\S.*?) +([\d.]+) forwards a chunk of (\d+) tokens, +([\d.]+)% of the greedy tokens$", re.M
)


def run(*flags: str) -> list[dict[str, tuple[float, float]]]:
    """Run the example; (forwards, percent of greedy tokens) of every decoder, before and after distillation."""
    pytest.importorskip("mujoco")
    environment = {**os.environ, "MUJOCO_GL": "egl", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "openvla.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [(name, (float(f), float(share)), int(n)) for name, f, n, share in LINE.findall(done.stdout)]
    assert len(found) == 8
    assert {n for *_, n in found} == {28}
    return [{name: values for name, values, _ in found[i : i + 4]} for i in (0, 4)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_runs_as_printed(tmp_path: Path) -> None:
    before, after = run("--output", str(tmp_path))
    for decoders in (before, after):
        assert decoders["greedy (AR)"] == (27.0, 100.0)
        for name in ("Jacobi", "Jacobi, warm start"):
            assert decoders[name][1] == 100.0  # strict: every token
            assert decoders[name][0] < 27
        assert decoders["... and at most 2"][0] <= 2
    assert after["Jacobi"][0] < before["Jacobi"][0]
    checkpoints = ("base", *(f"{run}/checkpoints/final/pretrained_model" for run in ("fine-tune", "student")))
    for name in checkpoints:
        policy, _, _ = load(tmp_path / name)
        assert policy.config.backbone.type == "openvla"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_takes_a_folder_and_its_data(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    from ceed_vla.backbones.openvla_tiny import write_openvla
    from sim.record import record
    from sim.recording.config import RecordConfig

    model = write_openvla(tmp_path / "model")
    record(RecordConfig(root=tmp_path / "data", episodes=2, progress=False))
    flags = ("--model", str(model), "--data", str(tmp_path / "data"), "--unnorm_key", "tabletop")
    before, after = run(*flags, "--chunk_size", "4", "--steps", "2", "--output", str(tmp_path / "out"))
    for decoders in (before, after):
        assert all(decoders[name][1] == 100.0 for name in ("greedy (AR)", "Jacobi", "Jacobi, warm start"))
