"""Program of the child of `process.run_limited`: job on standard input, answer on standard output.

The limits are set before any third-party library is imported. Nothing of this package is imported,
so that a child starts in some 50 ms.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from typing import Any


def main() -> None:
    """Answer one job."""
    sent = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr, not into the answer
    sys.path[:] = sent["path"]
    sys.dont_write_bytecode = True
    _limit(sent["cpu_s"], sent["memory"])
    try:
        answer = _load(sent["work"]).work(sent["job"])
    except MemoryError:
        answer = {"error": "it took too much memory"}
    except BaseException as error:  # a panic of a Rust library is not an Exception
        answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    json.dump(answer, answers)
    answers.flush()
    os._exit(0)  # without the exit handlers of libraries


def _limit(cpu_s: int, memory: int) -> None:
    """Limit computation [s] and address space [bytes]; forbid files and core dumps."""
    with contextlib.suppress(ImportError):  # on other systems only the limit of wall time applies
        import resource

        limits = {
            resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),
            resource.RLIMIT_AS: (memory, memory),
            resource.RLIMIT_CORE: (0, 0),
            resource.RLIMIT_FSIZE: (0, 0),
        }
        for limit, values in limits.items():
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(limit, values)


def _load(file: str) -> Any:
    """The module in a file, imported without its package."""
    spec = importlib.util.spec_from_file_location("work", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
