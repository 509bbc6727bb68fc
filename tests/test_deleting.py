"""Each axis of early exit can be deleted: its folder, trainer, rollouts and tests.

Tests of decoding, policy and bench pass without it in CI, and all others in an external test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AXES = sorted(file.parent.name for file in (ROOT / "ceed_vla" / "axes").glob("*/axis.py"))
BESIDE = ("training", "sim", "ros_nodes")  # install inside `ceed_vla`
REST = (
    "tests/ceed_vla/test_decoding_block.py",
    "tests/ceed_vla/test_decoding_config.py",
    "tests/ceed_vla/test_decoding_exits.py",
    "tests/ceed_vla/test_decoding_frozen.py",
    "tests/ceed_vla/test_decoding_guesses.py",
    "tests/ceed_vla/test_decoding_stop.py",
    "tests/ceed_vla/policy/test_acting.py",
    "tests/ceed_vla/policy/test_configuration.py",
    "tests/ceed_vla/policy/test_frozen.py",
    "tests/ceed_vla/policy/test_real_time.py",
    "tests/sim/test_bench.py",
)
ALL = ("tests/ceed_vla", "tests/training/axes", "tests/sim")  # and the tests of other axes


def copied(folder: Path) -> Path:
    """The parts of the repository that the tests need, with the links of a clone."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    parts = ("ceed_vla/", *(f"{name}/" for name in BESIDE), "benchmarks/", "tests/", "pyproject")
    for name in listing.split("\0"):
        if name.startswith(parts) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for name in BESIDE:
        (folder / "ceed_vla" / name).symlink_to(Path("..") / name)
    return folder


def built_on(axis: str) -> list[str]:
    """The axes to delete with `axis`: those that require it."""
    lines = {
        other: (ROOT / "ceed_vla" / "axes" / other / "__init__.py").read_text() for other in AXES
    }
    return [other for other, text in lines.items() if f'REQUIRES = ("{axis}"' in text]


def delete(folder: Path, axis: str) -> None:
    """Delete an axis as a maintainer would: its folder, and the files named after it."""
    shutil.rmtree(folder / "ceed_vla" / "axes" / axis)
    shutil.rmtree(folder / "tests" / "ceed_vla" / "axes" / axis)
    for beside in ("training", "sim"):
        (folder / beside / "axes" / f"{axis}.py").unlink(missing_ok=True)
        (folder / "tests" / beside / "axes" / f"test_{axis}.py").unlink(missing_ok=True)


def failures(folder: Path, tests: tuple[str, ...]) -> str:
    """Run the `tests` in a copy; return their output, empty if they pass."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=2700
    )
    return "" if not done.returncode else done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    "tests",
    [
        pytest.param(REST, marks=pytest.mark.slow, id="rest"),
        pytest.param(ALL, marks=pytest.mark.external, id="all"),  # an hour on two cores
    ],
)
def test_an_axis_can_be_deleted(tests: tuple[str, ...], axis: str, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    for name in (axis, *built_on(axis)):
        delete(folder, name)
    assert failures(folder, tests) == ""


def test_every_axis_is_found() -> None:
    assert AXES == [
        "context",
        "depth",
        "drafts",
        "launch_ahead",
        "learned",
        "programs",
        "rate",
    ]
    assert built_on("depth") == ["rate"]
