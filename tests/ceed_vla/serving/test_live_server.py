"""A server and its clients in live episodes, and its added latency."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from ceed_vla.serving.arrays import unpacked
from ceed_vla.serving.predictor_types import Request, Response
from tests.helpers.live_messages import LIVE, PROTOCOL, SPEC, SYNC, H, M, chunk, message, observed
from tests.helpers.local_server import running, until
from tests.helpers.serving_calls import http


class Chunks:
    """A policy whose calls wait until the test releases them, one by one."""

    spec = SPEC
    joins = False

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.release = threading.Semaphore(0)

    def predict_together(
        self, asked: Sequence[tuple[Request, float | None]], early: Any
    ) -> list[Response]:
        self.requests += [request for request, _ in asked]
        number = len(self.requests)
        assert self.release.acquire(timeout=30)
        if asked[0][0].instruction == "sing":
            return [Response(0, error="unknown words")]
        return [Response(0, chunk(number), np.zeros(M, np.int64))]


@contextmanager
def opened(port: int, mode: dict[str, str] | None = None) -> Iterator[ClientConnection]:
    with connect(f"ws://127.0.0.1:{port}", compression=None) as connection:
        connection.send(message("episode_start", LIVE if mode is None else mode))
        yield connection


def received(connection: ClientConnection) -> tuple[int, Any]:
    """Number and action of the next answer, or its error."""
    answer = unpacked(bytes(connection.recv(20)))
    if answer["type"] == "error":
        return answer["seq"], answer["payload"]["error"]
    return answer["seq"], round(float(answer["payload"]["actions"][0]), 1)


def asked(connection: ClientConnection, seq: int, instruction: str = "lift") -> tuple[int, Any]:
    connection.send(observed(seq, instruction))
    return received(connection)


def close_code(connection: ClientConnection) -> int:
    with pytest.raises(ConnectionClosed) as closed:
        connection.recv(20)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code


def test_a_server_reads_on_while_the_policy_decodes() -> None:
    failure: list[str] = []
    policy = Chunks()
    with running(lambda: policy, failure, PROTOCOL) as port, opened(port) as client:
        for seq in range(3):
            client.send(observed(seq))
        until(lambda: len(policy.requests) == 1)
        client.send(message("hello", {"protocol_version": 1}, 90))
        assert unpacked(bytes(client.recv(20)))["seq"] == 90  # so the three are read, too
        policy.release.release()
        assert received(client) == (2, 1.0)
        expected = [(seq, round(1.0 + 0.1 * (seq - 2), 1)) for seq in range(3, 8)]
        assert [asked(client, seq) for seq in range(3, 8)] == expected  # 6 starts a call
        until(lambda: len(policy.requests) == 2)
        assert policy.requests[1].shift_steps == H
        assert policy.requests[1].frozen_steps == 3
        assert policy.requests[1].previous is not None
        policy.release.release()
        until(lambda: 'outcome="ok"} 2' in http(port, "/metrics")[1])
        assert asked(client, 8) == (8, 2.2)
        assert len(policy.requests) == 2
    assert not failure


def test_one_call_of_a_connection_at_a_time() -> None:
    """An episode waits for the call of an ended one, whose answer is thrown away."""
    failure: list[str] = []
    policy = Chunks()
    with running(lambda: policy, failure, PROTOCOL) as port, opened(port) as client:
        for mode in (LIVE, SYNC):
            before = len(policy.requests)
            client.send(message("episode_start", LIVE))
            client.send(observed(1))
            until(lambda count=before: len(policy.requests) == count + 1)
            client.send(message("episode_end", {}))
            client.send(message("episode_start", mode))
            client.send(observed(2))
            with opened(port, SYNC) as other:  # its call waits in the policy's queue
                other.send(observed(3))
                until(lambda: "ceed_vla_queue 2\n" in http(port, "/metrics")[1])
                for _ in range(3):
                    policy.release.release()
                assert received(other)[0] == 3
            seq, action = received(client)
            assert (seq, action % 1) == (2, 0.0)
            assert len(policy.requests) == before + 3
    assert not failure


def test_errors_and_lost_connections() -> None:
    failure: list[str] = []
    policy = Chunks()
    with running(lambda: policy, failure, PROTOCOL) as port:
        with opened(port) as client:
            policy.release.release()
            assert asked(client, 1, "sing") == (1, "unknown words")
            client.send(observed(2))
            until(lambda: len(policy.requests) == 2)
            client.send(b"")
            assert received(client)[1].startswith("The message of 0 bytes is not msgpack")
            assert close_code(client) == 1011
        until(lambda: "ceed_vla_connections 0\n" in http(port, "/metrics")[1])
        with opened(port, SYNC) as client:
            client.send(observed(3))
            policy.release.release()  # the call of the lost connection
            policy.release.release()
            assert received(client) == (3, 3.0)
    assert not failure


def test_observations_beyond_the_rate_wait() -> None:
    failure: list[str] = []
    policy = Chunks()
    with running(lambda: policy, failure, PROTOCOL, rate=20.0) as port, opened(port) as client:
        began = time.monotonic()
        for seq in range(5):
            client.send(observed(seq))
        until(lambda: policy.requests)
        client.send(message("hello", {"protocol_version": 1}, 90))
        assert unpacked(bytes(client.recv(20)))["seq"] == 90  # the seventh message
        assert time.monotonic() - began >= 5 / 20
        policy.release.release()
        assert received(client) == (4, 1.0)
    assert not failure


def test_a_server_that_stops_ends_the_call() -> None:
    failure: list[str] = []
    policy = Chunks()
    with ExitStack() as connections:
        with running(lambda: policy, failure, PROTOCOL) as port:
            client = connections.enter_context(opened(port))
            client.send(observed(1))
            until(lambda: policy.requests)
            threading.Timer(0.2, policy.release.release).start()
        assert received(client) == (1, 1.0)
        assert close_code(client) == 1001
    assert not failure


def test_latency_does_not_block_others() -> None:
    """The policy decodes for others while an answer is held back; a server that stops sends it."""
    failure: list[str] = []
    policy = Chunks()
    with ExitStack() as connections:
        with running(lambda: policy, failure, PROTOCOL, latency_s=60.0) as port:
            clients = [connections.enter_context(opened(port, SYNC)) for _ in range(2)]
            for client in clients:
                client.send(observed(1))
                policy.release.release()
            until(lambda: 'outcome="ok"} 2' in http(port, "/metrics")[1])
        assert sorted(received(client) for client in clients) == [(1, 1.0), (1, 2.0)]
    assert not failure


def test_no_chunk_is_sent_before_the_latency() -> None:
    failure: list[str] = []
    policy = Chunks()
    policy.release.release()
    with (
        running(lambda: policy, failure, PROTOCOL, latency_s=0.3) as port,
        opened(port, SYNC) as client,
    ):
        began = time.monotonic()
        assert asked(client, 1) == (1, 1.0)
        assert time.monotonic() - began >= 0.3
        assert asked(client, 2) == (2, 1.1)
    assert not failure
