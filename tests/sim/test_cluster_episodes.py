"""Commands on a Ray cluster of two nodes: the episodes are those of one process."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from episodes import episodes_of
from ray_nodes import RayNodes
from rich.console import Console

from ceed_vla.folders import pretrained_path
from ceed_vla.sim.evaluate import EvalConfig, evaluate
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv

pytest.importorskip("ray", reason="needs the extra cluster")
pytestmark = pytest.mark.slow

EPISODES = 40
# A relative path, which leads nowhere in the folders of the nodes: they receive the checkpoint.
POLICY = "own/policy"
FLAGS = (
    f"eval --policy.path {POLICY} --decoders only=cap1,jacobi_random --episodes {EPISODES} "
    "--batch 2 --seed 40000 --env.type ceed_tabletop --env.task mixed --env.episode_length 24 "
    "--timing_chunks 0 --clips false --output_dir cluster"
)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A cluster of two nodes, of one CPU each."""
    cluster = RayNodes()
    try:
        cluster.start("head")
        cluster.start("second")
        yield cluster
    finally:
        cluster.close()


class Command:
    """`ceed-vla eval` on the cluster, started in a folder."""

    def __init__(self, nodes: RayNodes, folder: Path, *more: str, limit: str = "") -> None:
        program = Path(sys.executable).with_name("ceed-vla")
        line = f"{limit} exec {program} {FLAGS} --cluster.address {nodes.address} {' '.join(more)}"
        self.log = folder / "cluster/episodes.jsonl"
        self.process = subprocess.Popen(
            ["bash", "-c", line],
            env=nodes.environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def interrupt_after(self, lines: int) -> None:
        """Interrupt it as soon as its episode file has more than this many lines."""
        while self.process.poll() is None and len(self.log.read_text().splitlines()) <= lines:
            time.sleep(0.01)
        self.process.send_signal(signal.SIGINT)

    def ended(self, *codes: int) -> str:
        """Wait for its end with one of these codes; return the last line that it wrote to standard
        error, "" after success.
        """
        _, errors = self.process.communicate(timeout=300)
        assert self.process.returncode in codes, errors
        assert "Traceback" not in errors
        return re.split(r"[\r\n]", errors.strip())[-1] if self.process.returncode else ""


def interrupted(nodes: RayNodes, folder: Path, lines: int) -> str:
    """Interrupt a resumed run as soon as its episode file has more than this many lines; return its
    last line. On a busy machine it may end before the interrupt arrives: then it begins again.
    """
    shutil.copytree(folder / "cluster", folder / "before")
    for _ in range(5):
        command = Command(nodes, folder, "--resume true")
        command.interrupt_after(lines)
        if last := command.ended(130, 0):
            return last
        shutil.rmtree(folder / "cluster")
        shutil.copytree(folder / "before", folder / "cluster")
    pytest.fail("No run was interrupted before its end.")


def test_a_run_that_ends_early_twice_has_the_episodes_of_one_process(
    nodes: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pretrained_path("student"), tmp_path / POLICY)
    # No file is larger than 8 KiB. Python would keep bytecode that was cut off there.
    full = Command(nodes, tmp_path, limit="export PYTHONDONTWRITEBYTECODE=1; ulimit -f 8;")
    assert "File too large" in full.ended(1)
    kept = episodes_of(tmp_path / "cluster")
    assert 3 < len(kept) < 1 + 2 * EPISODES
    assert "interrupted; " in interrupted(nodes, tmp_path, len(kept) + 3)
    more = episodes_of(tmp_path / "cluster")
    assert len(kept) < len(more) < 1 + 2 * EPISODES
    Command(nodes, tmp_path, "--resume true").ended(0)

    monkeypatch.chdir(tmp_path)
    alone: dict[str, Any] = {
        "env": CeedTabletopEnv(task="mixed", episode_length=24),
        "decoders": "only=cap1,jacobi_random",
        "episodes": EPISODES,
        "batch": 2,
        "seed": 40_000,
        "timing_chunks": 0,
        "clips": False,
    }
    for workers in (1, 2):
        config = EvalConfig(
            CheckpointPath(POLICY), output_dir=str(workers), workers=workers, **alone
        )
        evaluate(config, Console(quiet=True))
        assert episodes_of(tmp_path / str(workers)) == episodes_of(tmp_path / "cluster")
    # what was sent to the nodes is removed
    assert not list(Path(tempfile.gettempdir()).glob("ceed_vla-" + "[0-9a-f]" * 16))
