"""A server in a thread of the test, around a policy that the test controls."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ceed_vla.serving.openpi import OpenPi
from ceed_vla.serving.predictor_types import PolicySpec, Request, Response
from ceed_vla.serving.protocols import WireProtocol
from ceed_vla.serving.server import Limits, PolicyServer

STATE = "observation.state"


class Waiting:
    """A policy that answers when the test releases it, in place of a `Predictor`."""

    spec = PolicySpec("waiting", "ceed_vla", {}, {STATE: 2}, 1, 2, 1, 0.0)

    def __init__(self, *, joins: bool = False) -> None:
        self.joins = joins
        self.failures = 0
        self.calls: list[int] = []  # number of requests of each
        self.release = threading.Event()

    def predict_together(
        self, asked: Sequence[tuple[Request, float | None]], early: Any
    ) -> list[Response]:
        self.calls.append(len(asked))
        assert self.release.wait(30)
        return [Response(request.id, np.zeros((2, 1), np.float32)) for request, _ in asked]


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def running(
    load: Callable[[], Any],
    failure: list[str],
    protocol: WireProtocol | None = None,
    latency_s: float = 0.0,
    **limits: Any,
) -> Iterator[int]:
    """A server in a thread, of openpi's protocol by default; the error with which it ends is added
    to `failure`.
    """
    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    known = Limits(**{"message_bytes": 10**6, "connections": 20, "rate": 1e3} | limits)
    used = protocol or OpenPi({STATE: STATE}, {}, {})
    loops: list[Any] = []

    def work() -> None:
        async def main() -> None:
            server = PolicyServer(load, used, known, latency_s=latency_s)
            loops.append((asyncio.get_running_loop(), server))
            await server.run("127.0.0.1", 0, ports.put)

        try:
            asyncio.run(main())
        except Exception as error:
            failure.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield ports.get(timeout=10)
    finally:
        if loops and not failure:
            loop, server = loops[0]
            loop.call_soon_threadsafe(server.stop)
        thread.join(40)
    assert not thread.is_alive()
