"""The server's event loop around a slow policy: health, queue, and clients that misbehave."""

from __future__ import annotations

import asyncio
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from ceed_vla.serving.arrays import packed
from ceed_vla.serving.openpi import OpenPi
from ceed_vla.serving.predictor_types import PolicySpec, Request, Response
from ceed_vla.serving.server import Limits, PolicyServer
from tests.helpers.serving_calls import KEY, ask, http


class Waiting:
    """A policy that answers when the test releases it, in place of a `Predictor`."""

    spec = PolicySpec("waiting", "ceed_vla", {}, {"observation.state": 2}, 1, 2, 1, 0.0)

    def __init__(self) -> None:
        self.calls = 0
        self.release = threading.Event()

    def predict(self, request: Request, deadline: float | None) -> Response:
        self.calls += 1
        assert self.release.wait(30)
        return Response(request.id, np.zeros((2, 1), np.float32))


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def running(load: Callable[[], Any], failure: list[str], **limits: Any) -> Iterator[int]:
    """A server in a thread; the error with which it ends is added to `failure`."""
    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    known = Limits(**{"message_bytes": 10**6, "connections": 20, "rate": 1e3} | limits)
    keys = {"observation.state": "observation.state"}
    loops: list[Any] = []

    def work() -> None:
        async def main() -> None:
            server = PolicyServer(load, OpenPi(keys, {}), known)
            loops.append((asyncio.get_running_loop(), server))
            await server.run("127.0.0.1", 0, ports.put)

        try:
            asyncio.run(main())
        except Exception as error:
            failure.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    yield ports.get(timeout=10)
    loop, server = loops[0]
    if not failure:
        loop.call_soon_threadsafe(server.stop)
    thread.join(40)
    assert not thread.is_alive()


def state(**options: Any) -> bytes:
    return packed({"observation.state": np.zeros(2, np.float32), "prompt": "lift", **options})


def opened(port: int) -> ClientConnection:
    connection = connect(f"ws://127.0.0.1:{port}", compression=None).__enter__()
    connection.recv(10)
    return connection


def test_what_waits_for_an_inference() -> None:
    """Health and metrics answer; a late call, and one whose client has left, do not run."""
    failure: list[str] = []
    policy = Waiting()
    with running(lambda: policy, failure) as port:
        first, late, gone = opened(port), opened(port), opened(port)
        first.send(state())
        until(lambda: policy.calls == 1)
        late.send(state(deadline_ms=1))
        gone.send(state())
        until(lambda: "ceed_vla_queue 3\n" in http(port, "/metrics")[1])
        gone.socket.shutdown(socket.SHUT_RDWR)
        assert http(port, "/healthz") == (200, "OK\n")  # after the server has seen that
        policy.release.set()
        answer = late.recv(20)
        assert isinstance(answer, str)
        assert re.match(r"The deadline has passed: the request has waited for \d+ ms", answer)
        assert isinstance(first.recv(20), bytes)
        assert isinstance(ask(opened(port), state()), dict)
    assert not failure
    assert policy.calls == 2


def test_a_policy_that_cannot_be_loaded_ends_the_server() -> None:
    failure: list[str] = []

    def load() -> Any:
        raise RuntimeError("out of memory")

    with running(load, failure):
        until(lambda: failure)
    assert failure == [
        "The policy cannot be loaded (RuntimeError: out of memory); correct this, and start again."
    ]


def test_web_pages_and_doubled_keys_are_refused() -> None:
    failure: list[str] = []
    with running(Waiting, failure, key=KEY) as port:
        url = f"ws://127.0.0.1:{port}"
        good = ("Authorization", f"Api-Key {KEY}")
        for headers in ([good, ("Origin", "https://example.org")], [good, good]):
            with (
                pytest.raises(InvalidStatus, match=r"40[13]"),
                connect(url, additional_headers=headers),
            ):
                pass


def flood(client: socket.socket) -> None:
    """Send pings, and read none of the answers."""
    ping = b"\x89\xfd\0\0\0\0" + b"x" * 125  # masked with zeros
    for _ in range(200):  # 26 MB
        client.sendall(ping * 1000)


def test_a_client_that_only_pings_is_dropped() -> None:
    failure: list[str] = []
    with (
        running(Waiting, failure) as port,
        closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as client,
    ):
        client.sendall(
            b"GET / HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 101")
        with pytest.raises(ConnectionError):
            flood(client)
        assert http(port, "/healthz")[0] == 200
