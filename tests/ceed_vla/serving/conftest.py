"""A real server process for the tests of a module, and connections to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

STARTUP_SECONDS = 180  # with an export that is made first


@dataclass
class Served:
    """A running ``ceed-vla serve``."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def connect(self, **options: Any) -> ClientConnection:
        return connect(self.url, compression=None, max_size=None, **options)


def start(*flags: str, log: Path, policy: str = "student", port: int = 0) -> Served:
    """Start a server, on a free port by default, and wait until it listens."""
    command = [sys.executable, "-m", "ceed_vla.cli", "serve"]
    command += [f"--policy.path={policy}", f"--port={port}"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"Listening on wss?://[^ ]*:(\d+) ", line)
    assert found, line + log.read_text()
    return Served(process, int(found[1]))


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Starts servers, which end with the module."""
    running: list[Served] = []

    def make(*flags: str) -> Served:
        folder = tmp_path_factory.mktemp("served")
        running.append(start(*flags, log=folder / "errors.log"))
        return running[-1]

    yield make
    for served in running:
        served.process.send_signal(signal.SIGTERM)
    for served in running:
        assert served.process.wait(60) == 0
        with closing(served.process.stdout):  # type: ignore[type-var]
            pass


@pytest.fixture(scope="module")
def served(serving: Callable[..., Served]) -> Served:
    """A server of the student with all defaults, ready."""
    server = serving()
    with server.connect(open_timeout=STARTUP_SECONDS) as connection:
        connection.recv(STARTUP_SECONDS)
    return server
