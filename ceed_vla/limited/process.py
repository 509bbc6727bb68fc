"""Start limited work and return its answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WALL_S = 30.0  # in all, including the interpreter's start on a busy machine [s]
CPU_S = 10  # [s]
MEMORY = 2**31  # of address space [bytes]
_HERE = Path(__file__).resolve().parent


class LimitError(Exception):
    """Limited work failed; the message has the reason, and the caller adds the subject."""


def run_limited(work: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Call the function ``work(job)`` in ``<work>.py`` of this folder, in a separate process.

    Args:
        work: Name of the file, which imports nothing of this package.
        job: The argument, of JSON types.

    Returns:
        The value that the function returns.

    Raises:
        LimitError: The function raised, wrote no JSON, crashed, or took more than `CPU_S`, `WALL_S`
            or `MEMORY`.
    """
    sent = {
        "work": str(_HERE / f"{work}.py"),
        "job": dict(job),
        "path": [entry for entry in sys.path if os.path.isabs(entry)],
        "cpu_s": CPU_S,
        "memory": MEMORY,
    }
    # each thread takes address space
    one_thread = {
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        done = subprocess.run(
            # -I -S: the child skips `site` and PYTHONPATH, which is faster; it receives this
            # process's path.
            [sys.executable, "-I", "-S", str(_HERE / "child.py")],
            input=json.dumps(sent),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=WALL_S,
            check=False,
            env={**os.environ, **one_thread},
        )
    except subprocess.TimeoutExpired as error:
        raise LimitError(f"it took longer than {WALL_S:g} s") from error
    if done.returncode:
        raise LimitError(_reason(done.returncode, done.stderr))
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        raise LimitError("it wrote no answer") from error
    if "error" in answer:
        raise LimitError(str(answer["error"])[:300])
    return dict(answer)


def _reason(code: int, errors: str) -> str:
    """Why a child ended with that exit code."""
    if -code in (signal.SIGXCPU, signal.SIGKILL):
        return f"it took more than {CPU_S} s of computation, or too much memory"
    if "allocat" in errors or "MemoryError" in errors:
        return f"it took more than {MEMORY / 1e9:.1f} GB of memory"
    last = (errors.strip().splitlines() or [""])[-1][:200]
    return f"it ended with exit code {code}" + (f": {last}" if last else "")
