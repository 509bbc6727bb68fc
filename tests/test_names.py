"""Import names: the long ones everywhere, the former ones in a clone, and folders of a user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The import names of a wheel and of an editable installation elsewhere.
INSTALLED = """
import importlib.util
training = importlib.util.find_spec("training")
assert training is None or "own" in training.origin
del training
import ceed_vla.training.losses, ceed_vla.sim.settings, ceed_vla.ros_nodes.robot.mode
"""


def run(script: str, cwd: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", script]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_package_imports_without_torch() -> None:
    script = (
        "import sys, ceed_vla; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = run(script, ROOT)
    assert not done.returncode, done.stderr


def test_the_long_names_work_from_anywhere(tmp_path: Path) -> None:
    done = run(INSTALLED, tmp_path)
    assert not done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["former", "present"])
def test_a_former_name_gives_the_same_module_and_warns(first: str) -> None:
    former = "import training.losses, ros_nodes.robot.mode; from sim import settings"
    present = (
        "import ceed_vla.training.losses, ceed_vla.ros_nodes.robot.mode, ceed_vla.sim.settings"
    )
    both = [former, present] if first == "former" else [present, former]
    script = "\n".join(
        [
            *both,
            "import sys",
            "assert settings is ceed_vla.sim.settings",
            "assert training is ceed_vla.training and training.losses is ceed_vla.training.losses",
            "assert ros_nodes.robot.mode is ceed_vla.ros_nodes.robot.mode",
            "assert training.losses.__spec__.name == 'ceed_vla.training.losses'",
            (
                "files = [m.__file__ for m in {id(m): m for m in sys.modules.values()}.values() if "
                "getattr(m, '__file__', None) and '/losses.py' in m.__file__ and 'training' in "
                "m.__file__]"
            ),
            "assert len(files) == 1, files",
        ]
    )
    done = run(script, ROOT, "-W", "always::DeprecationWarning:__main__")
    assert not done.returncode, done.stderr
    for name in ("training", "ros_nodes", "sim"):
        assert f"Import ceed_vla.{name} instead of {name}." in done.stderr


@pytest.mark.slow
def test_an_unknown_module_of_a_former_name_is_not_found() -> None:
    done = run("import sim.no_such_module", ROOT)
    assert "No module named 'sim.no_such_module'" in done.stderr


@pytest.mark.slow
def test_a_former_name_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "ros_nodes.demo.camera_load", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    assert "usage" in done.stdout


@pytest.mark.slow
def test_own_folders_of_the_same_names_break_nothing(tmp_path: Path) -> None:
    for name in ("sim", "training"):
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "__init__.py").write_text("OWN = True\n")
    done = run(
        INSTALLED + "import sim, training; assert sim.OWN and training.OWN", tmp_path / "own"
    )
    assert not done.returncode, done.stderr


@pytest.mark.slow
def test_a_wheel_has_the_long_names_alone(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build",
        "--build-base",
        str(tmp_path / "build"),
    ]
    command += ["bdist_wheel", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = {line.split()[0] for line in listing.splitlines()[1:]}
    assert {
        "ceed_vla/sim/rollout.py",
        "ceed_vla/training/distill.py",
        "ceed_vla/ros_nodes/robot/safety.py",
    } <= names
    assert not [name for name in names if name.startswith(("sim/", "training/", "ros_nodes/"))]
    script = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n" + INSTALLED
    script += f"assert ceed_vla.sim.__file__.startswith({str(tmp_path)!r})"
    subprocess.run(
        [sys.executable, "-m", "zipfile", "-e", str(wheel), str(tmp_path / "site")], check=True
    )
    done = run(script, tmp_path)
    assert not done.returncode, done.stderr
