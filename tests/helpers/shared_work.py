"""A function that processes share, in a module that they can import."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

from ceed_vla.errors import TokenError


class UnsendableError(Exception):
    """An error that pickle cannot restore, because its arguments differ from its text."""

    def __init__(self, item: int, what: str) -> None:
        super().__init__(f"item {item} is {what}")


def make(offset: int) -> Callable[[int], Iterator[tuple[int, bool]]]:
    def call(item: int) -> Iterator[tuple[int, bool]]:
        if item == -1:
            raise TokenError("item -1 is none")
        if item == -2:
            os.kill(os.getpid(), signal.SIGKILL)
        if item == -3:
            raise UnsendableError(item, "none")
        time.sleep(0.01 * (item % 3))
        yield item + offset, "package_of_a_user" in sys.modules

    return call


def reader() -> Callable[[int], list[tuple[bytes, str]]]:
    """Read standard input: the system's and Python's."""
    return lambda _: [(os.read(0, 4), sys.stdin.read(4))]
