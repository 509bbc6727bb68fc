"""Deferred interrupts, so that a write completes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handled_by(handler: Any = signal.default_int_handler) -> Iterator[None]:
    """Handle SIGINT and SIGTERM with `handler`; the default raises `KeyboardInterrupt`.

    It has no effect outside the main thread, where Python allows no signal handlers.
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
    """Defer interrupts until the end of the block; raise them then, unless it raises an error."""
    deferred: list[int] = []
    with handled_by(lambda number, _: deferred.append(number)):
        yield
    if deferred:
        raise KeyboardInterrupt
