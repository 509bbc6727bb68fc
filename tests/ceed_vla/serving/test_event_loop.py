"""The server's event loop around a slow policy: health, queue, and clients that misbehave."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from websockets.asyncio import client as asyncio_client
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from ceed_vla.serving import health
from ceed_vla.serving.arrays import packed
from ceed_vla.serving.connection import Connection
from tests.helpers.local_server import Waiting, running, until
from tests.helpers.serving_calls import KEY, ask, http


def state(**options: Any) -> bytes:
    return packed({"observation.state": np.zeros(2, np.float32), "prompt": "lift", **options})


def opened(port: int) -> ClientConnection:
    connection = connect(f"ws://127.0.0.1:{port}", compression=None).__enter__()
    connection.recv(10)
    return connection


def test_what_waits_for_an_inference() -> None:
    """Health and metrics answer; a late call runs, and one whose client has left does not."""
    failure: list[str] = []
    policy = Waiting()
    with running(lambda: policy, failure) as port:
        first, late, gone = opened(port), opened(port), opened(port)
        first.send(state())
        until(lambda: policy.calls)
        late.send(state(deadline_ms=1))
        gone.send(state())
        until(lambda: "ceed_vla_queue 3\n" in http(port, "/metrics")[1])
        gone.socket.shutdown(socket.SHUT_RDWR)
        assert http(port, "/healthz") == (200, "OK\n")  # after the server has seen that
        policy.release.set()
        assert isinstance(late.recv(20), bytes)
        assert isinstance(first.recv(20), bytes)
        assert isinstance(ask(opened(port), state()), dict)
    assert not failure
    assert policy.calls == [1, 1, 1]


def test_a_policy_that_cannot_answer_any_more_is_not_healthy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failure: list[str] = []
    policy = Waiting()
    with running(lambda: policy, failure) as port:
        until(lambda: http(port, "/healthz")[0] == 200)
        policy.failures = health.FAILURES
        assert http(port, "/healthz") == (
            503,
            "the last 10 requests failed; the log has the error\n",
        )
        policy.failures = 0
        monkeypatch.setattr(health, "STUCK_S", 0.05)
        client = opened(port)
        client.send(state())
        until(lambda: http(port, "/healthz")[0] == 503)
        assert http(port, "/healthz")[1].startswith("a request has been running for")
        policy.release.set()
        assert isinstance(client.recv(20), bytes)
        until(lambda: http(port, "/healthz")[0] == 200)
    assert not failure


def test_requests_of_one_kind_are_answered_together() -> None:
    failure: list[str] = []
    policy = Waiting(joins=True)
    with running(lambda: policy, failure, batch=3) as port:
        clients = [opened(port) for _ in range(6)]
        clients[0].send(state())
        until(lambda: policy.calls)
        for client, options in zip(
            clients[1:], ({}, {"decoding": "ar"}, {}, {"deadline_ms": 9e6}, {}), strict=True
        ):
            client.send(state(**options))
        until(lambda: "ceed_vla_queue 6\n" in http(port, "/metrics")[1])
        policy.release.set()
        for client in clients:
            assert isinstance(client.recv(20), bytes)
    assert not failure
    assert sorted(policy.calls) == [1, 2, 3] or sorted(policy.calls) == [1, 1, 1, 3]


def test_a_policy_that_decodes_one_request_at_a_time_is_not_batched() -> None:
    failure: list[str] = []
    with running(Waiting, failure, batch=2):
        until(lambda: failure)
    assert "max_batch is 2; the engine " in failure[0]


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


def test_a_burst_of_silent_connections_stays_within_the_limit() -> None:
    known: dict[Connection, None] = {}
    largest = 0

    def new(*arguments: Any, **options: Any) -> Connection:
        nonlocal largest
        largest = max(largest, len(known))
        return Connection(known, 5, *arguments, **options)

    async def serve_and_flood() -> None:
        async def answer(connection: ServerConnection) -> None:
            await connection.send("here")

        async with serve(answer, "127.0.0.1", 0, create_connection=new) as server:
            port = server.sockets[0].getsockname()[1]
            silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
            await asyncio.sleep(0.2)
            assert 1 <= len(known) <= 5
            assert largest <= 5
            async with asyncio_client.connect(f"ws://127.0.0.1:{port}") as client:
                assert await client.recv() == "here"
            for one in silent:
                one.close()

    asyncio.run(serve_and_flood())
