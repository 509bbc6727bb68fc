"""`colcon build` installs what `ros2 run` and `ros2 launch` need. Needs colcon, in PATH or named by
$COLCON.

For example: python -m venv V && V/bin/pip install colcon-common-extensions 'empy<4' catkin-pkg,
then COLCON=V/bin/colcon pytest -m external tests/ros_nodes/test_colcon.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLCON = os.environ.get("COLCON") or shutil.which("colcon")
EXECUTABLES = ("ceed-vla", "gripper_relay", "policy_node", "record_node", "sim_node")

pytestmark = [
    pytest.mark.external,
    pytest.mark.skipif(COLCON is None, reason="colcon is not installed"),
]


@pytest.fixture(params=[(), ("--symlink-install",)], ids=["copy", "symlink"])
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Install folder of the package, built from a copy of the sources in a workspace of its own."""
    package = tmp_path / "src" / "ceed_vla"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/images/")):
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, package / name)
    assert COLCON is not None
    folder = Path(COLCON).absolute().parent
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    build = subprocess.run(
        [COLCON, "build", "--paths", "src/ceed_vla", *request.param],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "AMENT_PREFIX_PATH": str(folder.parent)},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    return tmp_path / "install" / "ceed_vla"


def test_build_puts_everything_where_ros_looks(installed: Path) -> None:
    for name in EXECUTABLES:
        assert os.access(installed / "lib/ceed_vla" / name, os.X_OK), name
    share = installed / "share"
    assert (share / "ament_index/resource_index/packages/ceed_vla").exists()
    assert (share / "ceed_vla/package.xml").exists()
    launch = {path.name for path in (ROOT / "launch").glob("*.launch.py")}
    assert {
        path.name for path in (share / "ceed_vla/launch").iterdir() if path.suffix == ".py"
    } == launch
    config = {path.name for path in (ROOT / "launch/config").iterdir() if path.is_file()}
    assert {path.name for path in (share / "ceed_vla/launch/config").iterdir()} == config


def test_installed_executables_run(installed: Path) -> None:
    pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")
    (site,) = {*installed.glob("lib/python*/site-packages")} or {installed}
    source = installed.parents[1] / "build" / "ceed_vla"  # where --symlink-install points to
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(site), str(source)))}

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(installed / "lib/ceed_vla" / name), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    version = run("ceed-vla", "--version")
    assert version.returncode == 0, version.stderr
    refused = run("sim_node", "--ros-args", "-p", "task:=juggle")
    assert refused.returncode == 1
    assert "juggle" in refused.stderr
    missing = run("policy_node", "--ros-args", "-p", "command_rate:=0.0")
    assert missing.returncode == 1
    assert "command_rate" in missing.stderr
