"""Commands of this package that run side by side, with one thread each: faster than as many threads in one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

from lerobot.envs.configs import EnvConfig

from ceed_vla.discovery import FLAG, discovered
from ceed_vla.errors import SimulationError
from sim.environment import flags

logger = logging.getLogger(__name__)


def command(module: str, env: EnvConfig, **options: Any) -> list[str]:
    """``python -m module --option=value ...``, with the environment's flags and the packages that were discovered."""
    packages = {FLAG: ",".join(discovered())} if discovered() else {}
    words = [f"--{name}={value}" for name, value in {**options, **packages}.items()]
    return [sys.executable, "-m", module, *words, *flags(env)]


def run_all(commands: Sequence[Sequence[str]]) -> Iterator[str]:
    """Run all commands side by side and yield the lines that they print.

    Raises:
        SimulationError: One of them failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=environment) for c in commands]
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read(process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            lines.put(line)
        if process.wait():
            logger.error("a process failed; the others go on: %s", " ".join(map(str, process.args)))  # type: ignore[arg-type]
        lines.put(None)

    try:
        for process in running:
            Thread(target=read, args=(process,), daemon=True).start()
        for _ in running:
            while (line := lines.get()) is not None:
                yield line
        for words, process in zip(commands, running, strict=True):
            if process.wait():
                raise SimulationError(f"{' '.join(words[1:])} failed with exit status {process.returncode}; see above.")
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
