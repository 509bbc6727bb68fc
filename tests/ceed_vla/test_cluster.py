"""Work on Ray clusters, of real nodes on this machine: faults, refused nodes, refused drivers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cluster_driver
import pytest
from ray_nodes import RayNodes, descendants

pytest.importorskip("ray", reason="needs the extra cluster")
pytestmark = pytest.mark.slow
HELPERS = Path(cluster_driver.__file__).parent


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A cluster of one node, to which tests add others."""
    cluster = RayNodes()
    try:
        cluster.start("head", NODE="head")
        yield cluster
    finally:
        cluster.close()


def driver(nodes: RayNodes, folder: Path, **variables: str) -> subprocess.Popen[str]:
    address = variables.pop("address", nodes.address)
    return subprocess.Popen(
        [sys.executable, cluster_driver.__file__, address, str(folder)],
        env={**nodes.environment, "PYTHONPATH": str(HELPERS), **variables},
        cwd=folder,  # Ray lets its workers import from there
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stub(folder: Path, module: str, text: str) -> str:
    """A folder that hides a module behind another one."""
    (folder / module).parent.mkdir(parents=True)
    (folder / module).write_text(text)
    return str(folder)


def workers_of(pid: int) -> list[str]:
    """Actors that run below a process."""
    names = [Path(f"/proc/{one}/cmdline") for one in descendants(pid)]
    return [text for name in names if name.exists() and "_Actor" in (text := name.read_text())]


def test_every_item_counts_once_whatever_is_lost(nodes: RayNodes, tmp_path: Path) -> None:
    """A worker is killed, one hangs, a node is killed; nodes that do not fit are not used."""
    without = stub(tmp_path / "a", "mujoco.py", "raise ImportError('no library of GL')")
    other = stub(tmp_path / "b", "ceed_vla/__init__.py", '__version__ = "0.0.7"\n')
    nodes.start("second", NODE="second")
    nodes.start("without", NODE="without", PYTHONPATH=without)
    nodes.start("other", NODE="other", PYTHONPATH=other)
    seen = tmp_path / "nodes"
    seen.touch()
    with driver(nodes, tmp_path) as process:
        while seen.read_text().split().count("second") < 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        nodes.kill("second")
        output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    found = json.loads(output)
    assert found["mapped"] == [[[item, 0], [item, 1]] for item in cluster_driver.ITEMS]
    wrong, deadly = found["errors"]
    assert wrong == "TokenError: this item is wrong"
    assert deadly.startswith("CeedVLAError: The same work ended 3 workers.")
    assert set(seen.read_text().split()) == {"head", "second"}
    lines = errors.splitlines()
    assert all(line.startswith("WARNING ") for line in lines), errors
    refused = {line.split()[2]: line for line in lines if "is not used" in line}
    assert set(refused) == {"without", "other"}
    assert "mujoco none (ImportError: no library of GL) instead of" in refused["without"]
    assert "ceed_vla 0.0.7 (code " in refused["other"]
    lost = [line for line in lines if "A worker on " in line]
    assert any("It sent nothing for 6 s" in line for line in lost)
    assert sum("on second was lost; its work goes to the others" in line for line in lost) == 1
    nodes.kill("without")
    nodes.kill("other")


def test_a_driver_that_is_killed_leaves_no_worker(nodes: RayNodes, tmp_path: Path) -> None:
    (tmp_path / "nodes").touch()
    head = nodes.nodes["head"].pid
    with driver(nodes, tmp_path) as process:
        while not (tmp_path / "nodes").read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        assert workers_of(head)
        process.kill()
    end = time.monotonic() + 60
    while workers_of(head):
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": "127.0.0.1:1"}, "No Ray cluster listens at 127.0.0.1:1"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "it refuses the token of this machine"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_error(
    nodes: RayNodes, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with driver(nodes, tmp_path, **changes) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith("ConfigError: ")
    assert message in line
