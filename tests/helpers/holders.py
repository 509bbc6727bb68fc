"""Processes that write to a folder, for tests of its lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ceed_vla.locks import lock_file
from ceed_vla.workers import prepare

LONGEST_S = 60.0  # time that a process may take to start
HOLD = """
import sys
from pathlib import Path
from ceed_vla.locks import locked
with locked(Path(sys.argv[1]), "--output_dir is the holder's"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the lock of `folder` until its input is closed."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@contextmanager
def stopped_writer(
    folder: Path, function: Callable[..., Any], *arguments: Any, part: str = ""
) -> Iterator[Any]:
    """Start a process of `function`, and stop it as soon as it holds the lock of `folder`.

    `SIGCONT` continues it. It ends with the block.
    """
    file = lock_file(folder, part)
    context = prepare(function.__module__)
    process = context.Process(target=function, args=arguments)
    process.start()
    try:
        until = time.monotonic() + LONGEST_S
        while not file.exists() or not file.stat().st_size:
            assert process.is_alive()
            assert time.monotonic() < until
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGSTOP)
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.join()


def go_on(process: Any) -> int:
    """Continue a stopped process to its end; return its exit code."""
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    return int(process.exitcode)
