"""examples/openvla.py as printed, on three seeds, and with a published folder: fewer forwards after distillation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ceed_vla.checkpoints import load

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^  (\S.*?) +([\d.]+) forwards a chunk of (\d+) tokens, +([\d.]+)% of the greedy tokens$", re.M)
ERROR = re.compile(r"^  ([\d.]+) between greedy and demonstrated actions$", re.M)
GAIN = re.compile(r"after distillation: ([+-]\d+)% from a random start, ([+-]\d+)% from a warm start$")
STARTS = ("Jacobi, random start", "Jacobi, warm start")
AT_MOST_2 = "... and at most 2"


@dataclass
class Output:
    """What the example printed.

    Attributes:
        before: (forwards, percent of greedy tokens) of every decoder, before distillation.
        after: The same of the student.
        errors: Distance of greedy from demonstrated actions, before and after.
        gains: Change of forwards from a random and from a warm start [%].
    """

    before: dict[str, tuple[float, float]]
    after: dict[str, tuple[float, float]]
    errors: tuple[float, ...]
    gains: tuple[int, ...]


def run(block_length: int, *flags: str) -> Output:
    """Run the example."""
    pytest.importorskip("mujoco")
    environment = {**os.environ, "MUJOCO_GL": "egl", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "openvla.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    found = [(name, (float(f), float(share)), int(n)) for name, f, n, share in LINE.findall(done.stdout)]
    assert len(found) == 8
    assert {n for *_, n in found} == {block_length}
    gain = GAIN.search(done.stdout.strip())
    assert gain
    before, after = ({name: values for name, values, _ in found[i : i + 4]} for i in (0, 4))
    for decoders in (before, after):
        assert decoders["greedy (AR)"] == (block_length - 1, 100.0)
        for start in STARTS:
            assert decoders[start][1] == 100.0  # strict: every token
            assert decoders[start][0] < block_length
        assert decoders[AT_MOST_2][0] <= 2
    return Output(before, after, tuple(map(float, ERROR.findall(done.stdout))), tuple(map(int, gain.groups())))


# The first one as printed. Every mean is over the 93 frames of four episodes that nothing was trained on.
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("flags", [(), ("--seed", "1"), ("--seed", "2")], ids=["seed0", "seed1", "seed2"])
def test_forwards_fall_by_a_quarter_from_both_starts(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Measured: by 56 to 65 %, on any of the seeds and from either start."""
    output = run(56, "--output", str(tmp_path), *flags)
    for start, gain in zip(STARTS, output.gains, strict=True):
        before, after = output.before[start][0], output.after[start][0]
        assert before > 10  # there is something to gain: the fine-tune's tokens depend on each other
        assert after <= 0.75 * before
        assert gain == pytest.approx(100 * (after / before - 1), abs=2)
    assert output.after[AT_MOST_2][1] > output.before[AT_MOST_2][1]
    # Speed is not bought with the policy: greedy actions are about as near the demonstrations as before.
    assert output.errors[1] < output.errors[0] + 0.05
    checkpoints = ("base", *(f"{run}/checkpoints/final/pretrained_model" for run in ("fine-tune", "student")))
    for name in checkpoints:
        policy, _, _ = load(tmp_path / name)
        assert policy.config.backbone.type == "openvla"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_takes_a_folder_and_its_data(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    from benchmarks.models.openvla import write_openvla
    from sim.record import record
    from sim.recording.config import RecordConfig

    model = write_openvla(tmp_path / "model")
    record(RecordConfig(root=tmp_path / "data", episodes=2, progress=False))
    record(RecordConfig(root=tmp_path / "held-out", episodes=1, seed=1000, progress=False))
    flags = ("--model", str(model), "--data", str(tmp_path / "data"), "--unnorm_key", "tabletop")
    flags += ("--held_out", str(tmp_path / "held-out"), "--chunk_size", "4", "--steps", "2")
    run(28, *flags, "--output", str(tmp_path / "out"))
