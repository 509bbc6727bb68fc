"""A `ceed-vla serve` process for the benchmarks."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def serving(policy: str, **flags: object) -> Iterator[str]:
    """Run a server; yields its address, and ends it in every case.

    Args:
        policy: Checkpoint.
        flags: More flags of the command.

    Raises:
        SystemExit: It does not start; it has printed why.
    """
    command = [sys.executable, "-m", "ceed_vla.cli", "serve", f"--policy.path={policy}"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    server = subprocess.Popen([*command, "--port=0"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        found = re.search(r":(\d+) ", server.stdout.readline())
        if found is None:
            raise SystemExit("The server did not start; see the message above.")
        yield f"ws://127.0.0.1:{found[1]}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
