"""A function that processes share, in a module that they can import."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from ceed_vla.errors import TokenError


def make(offset: int) -> Callable[[int], tuple[int, bool]]:
    def call(item: int) -> tuple[int, bool]:
        if item == -1:
            raise TokenError("item -1 is none")
        if item == -2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01 * (item % 3))
        return item + offset, "package_of_a_user" in sys.modules

    return call


def reader() -> Callable[[int], tuple[bytes, str]]:
    """Read standard input: the system's and Python's."""
    return lambda _: (os.read(0, 4), sys.stdin.read(4))
