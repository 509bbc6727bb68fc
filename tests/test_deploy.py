"""Units of systemd and container files: commands with flags that exist, and units that parse."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ceed_vla.cli.commands import COMMANDS, config_of
from ceed_vla.cli.help import Page
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
IMAGES = sorted(DEPLOY.glob("Dockerfile.*"))


def test_flags_and_parameters_exist() -> None:
    serve = {f"--{row[0]}" for row in Page.of(config_of(COMMANDS["serve"]), "").flags}
    parameters = {parameter.name for parameter in POLICY_PARAMETERS}
    texts = {file.name: file.read_text() for file in (*UNITS, *IMAGES)}
    assert len(texts) == 4
    for name, start in (("ceed-vla-server.service", " serve"), ("Dockerfile.server", '"serve"')):
        command = texts[name].partition(f"ceed-vla{start}" if start[0] == " " else start)[2]
        found = set(re.findall(r"--[a-z_.]+(?=[ \"])", command))
        assert {"--host", "--policy.path", "--api_key_file"} <= found <= serve
    found = set(re.findall(r"-p (\w+):=", texts["ceed-vla-policy-node.service"]))
    assert {"autostart", "start_enabled"} <= found <= parameters


def test_units_have_caches_of_their_own() -> None:
    found = [re.findall("^CacheDirectory=(.+)$", unit.read_text(), re.MULTILINE) for unit in UNITS]
    assert len({name for (name,) in found}) == len(UNITS) == 2


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_accepts_a_unit(unit: Path, tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    text = unit.read_text().replace("/opt/ceed_vla/bin", str(Path(sys.executable).parent))
    copy = tmp_path / unit.name
    copy.write_text(text)
    done = subprocess.run([verify, "verify", str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
