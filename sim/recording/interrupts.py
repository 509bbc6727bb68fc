"""Interrupts that wait until a write is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handled_by(handler: Any = signal.default_int_handler) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler`, by default as `KeyboardInterrupt`; Python allows it in
    the main thread.
    """
    main = threading.current_thread() is threading.main_thread()
    previous = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM) if main
    }
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold interrupts back until the block is left; raise them then (unless an error is on its
    way).
    """
    waiting: list[int] = []
    with handled_by(lambda number, _: waiting.append(number)):
        yield
    if waiting:
        raise KeyboardInterrupt
