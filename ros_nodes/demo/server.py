"""A server process (``ceed-vla serve``) for the demonstrations."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ceed_vla.discovery import discovered
from ceed_vla.errors import NodeError

_LISTENING = re.compile(r"Listening on (ws://\S+) ")


@contextmanager
def serving(checkpoint: str, flags: Mapping[str, Any], log: Path) -> Iterator[str]:
    """Serve a policy at a free port of this machine; ends with the block.

    Args:
        checkpoint: What is served.
        flags: Further flags of ``ceed-vla serve``, without dashes.
        log: File for its output.

    Yields:
        Its address. It listens; the policy may still be loading.

    Raises:
        NodeError: It ends before it listens.
    """
    command = [sys.executable, "-m", "ceed_vla.cli", "serve", f"--policy.path={checkpoint}"]
    command += [f"--{name}={value}" for name, value in {"port": 0, **flags}.items()]
    if discovered():
        command.append(f"--discover_packages_path={','.join(discovered())}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C reaches only this process
        )
    try:
        assert process.stdout is not None
        found = next(filter(None, map(_LISTENING.search, process.stdout)), None)
        if not found:  # it has ended
            process.wait()
            said = log.read_text(errors="replace").strip().splitlines() or ["(empty)"]
            raise NodeError(
                f"The server ended with code {process.returncode}. Last line: {log}: {said[-1]}"
            )
        yield found[1]
    finally:
        process.terminate()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
