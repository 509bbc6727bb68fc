"""Ray nodes of this machine, for tests, each in a process group, so that one can be killed."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

READY_S = 120  # for a node to start [s]


class RayNodes:
    """A cluster on this machine whose nodes are started one by one.

    It has a token and a folder of its own. `environment` is that of a driver.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets need a short path
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.token = secrets.token_hex(32)
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self, name: str, **variables: str) -> None:
        """Start a node of one CPU with these environment variables; the first one is the head.

        It returns once the node is part of the cluster. (Several at once may time out.)
        """
        place = [f"--address={self.address}"]
        if not self.nodes:
            port = self.address.rpartition(":")[2]
            place = ["--head", f"--port={port}", "--include-dashboard=false"]
            place += [f"--temp-dir={self.folder}"]
        options = ["--num-cpus=1", f"--node-name={name}", "--disable-usage-stats"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
        output = self.folder.with_name(f"{self.folder.name}-{name}.log")
        with output.open("w") as log:
            self.nodes[name] = subprocess.Popen(
                [*command, *place, *options],
                env={**self.environment, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + READY_S
        while "Ray runtime started" not in (text := output.read_text()):
            assert self.nodes[name].poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        """Kill a node and its workers, as a power failure would."""
        process = self.nodes.pop(name)
        for pid in descendants(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for name in reversed(list(self.nodes)):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)
        for log in self.folder.parent.glob(f"{self.folder.name}-*.log"):
            log.unlink()


def descendants(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found
