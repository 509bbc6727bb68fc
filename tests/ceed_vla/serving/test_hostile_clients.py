"""Clients that want to keep a server from its work; those beside them get their answers."""

from __future__ import annotations

import io
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, WebSocketException

from ceed_vla.serving import encoded_images
from ceed_vla.serving.arrays import packed, unpacked
from ceed_vla.serving.client import PolicyClient
from ceed_vla.serving.encoded_images import jpeg
from ceed_vla.serving.predictor_types import Request
from tests.ceed_vla.serving.conftest import Served
from tests.helpers.serving_calls import error_of, http
from tests.helpers.worker_requests import FRONT, INSTRUCTION, observation

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def check_serves(served: Served) -> None:
    with PolicyClient(served.url) as client:
        assert client.predict(Request(1, observation(), INSTRUCTION)).actions.shape == (8, 7)


def open_socket(served: Served) -> socket.socket:
    """A connection after its handshake, without a library that reads for it."""
    client = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    client.sendall(HANDSHAKE)
    assert client.recv(12).startswith(b"HTTP/1.1 101")
    return client


def test_a_gigabyte_that_is_only_announced(served: Served) -> None:
    with open_socket(served) as client:
        client.sendall(b"\x82\xff" + struct.pack(">Q", 2**30) + b"\0\0\0\0" + b"x" * 1000)
        while client.recv(65536):  # until the server closes
            pass
    check_serves(served)


def test_two_hundred_connections(served: Served) -> None:
    refused: list[str] = []
    opened: list[Any] = []

    def work() -> None:
        try:
            connection = served.connect(open_timeout=30).__enter__()
            connection.recv(30)
            opened.append(connection)
        except (WebSocketException, OSError, EOFError, TimeoutError) as error:
            refused.append(type(error).__name__)

    threads = [threading.Thread(target=work) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(opened) + len(refused) == 200
    assert 1 <= len(opened) <= 64  # max_connections
    assert http(served.port, "/healthz")[0] == 200
    for connection in opened:
        connection.close()
    end = time.monotonic() + 20
    while "ceed_vla_connections 0" not in http(served.port, "/metrics")[1]:
        assert time.monotonic() < end
        time.sleep(0.05)
    check_serves(served)


def test_silent_connections_keep_nobody_out(served: Served) -> None:
    silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(140)]
    try:  # above twice --max_connections
        assert http(served.port, "/healthz")[0] == 200
        check_serves(served)
    finally:
        for one in silent:
            one.close()


@pytest.mark.slow
def test_a_client_that_never_reads_is_dropped(served: Served) -> None:
    """Its answers fill its own buffers; another client is served meanwhile."""
    with PolicyClient(served.url) as client:
        message = client._message(Request(1, observation(), INSTRUCTION), stream=False)

    payload = packed(message)
    frame = b"\x82\xff" + struct.pack(">Q", len(payload)) + b"\0\0\0\0" + payload
    with open_socket(served) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        stop = time.monotonic() + 60

        def send() -> None:
            while time.monotonic() < stop:
                try:
                    deaf.sendall(frame)
                except OSError:
                    return

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        for _ in range(5):
            check_serves(served)
            time.sleep(0.2)
        assert http(served.port, "/healthz")[0] == 200
    thread.join(70)
    assert not thread.is_alive()


def test_images_that_are_no_jpeg(served: Served) -> None:
    def asked(image: bytes) -> str:
        with PolicyClient(served.url) as client:
            request = Request(1, {**observation(), FRONT: image}, INSTRUCTION)
            message = client._message(request, stream=False)

        with served.connect() as connection:
            connection.recv(20)
            return error_of(connection, packed(message))

    good = jpeg(observation()[FRONT], 90)
    assert "that are no JPEG" in asked(good[:200])
    assert "that are no JPEG" in asked(b"x" * 100)
    png = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(png, "PNG")
    assert "that are no JPEG" in asked(png.getvalue())
    scans = good + b"\xff\xda\0\x02" * 500
    assert "a JPEG of more than 200 parts" in asked(scans)
    # not all of them are counted
    assert encoded_images._jpeg_parts(b"\xff\xd8\xff" + b"\xff\xc0" * 10**6) == 201
    wide = jpeg(np.zeros((8, 5000, 3), np.uint8), 50)
    assert "5000 x 8 px; at most 4096" in asked(wide)
    check_serves(served)


@pytest.mark.parametrize("name", ["prompt", "session", "decoding", "previous_tokens"])
def test_large_arrays_are_not_printed(served: Served, name: str) -> None:
    began = time.monotonic()
    array = np.zeros((7,) * 7, np.uint8)
    with PolicyClient(served.url) as client:
        message = client._message(Request(1, observation(), INSTRUCTION), stream=False)
    with served.connect() as connection:
        connection.recv(20)
        assert "array of uint8 (7, 7" in error_of(connection, packed({**message, name: array}))
    assert time.monotonic() - began < 30


KILLED = """
import sys
import numpy as np
from ceed_vla.serving.client import PolicyClient
from ceed_vla.serving.predictor_types import Request
with PolicyClient(sys.argv[1]) as client:
    spec = client.spec
    images = {name: np.zeros((h, w, 3), np.uint8) for name, (_, h, w) in spec.cameras.items()}
    states = {name: np.zeros(size, np.float32) for name, size in spec.states.items()}
    print("connected", flush=True)
    while True:
        client.predict(Request(1, {**images, **states}, spec.example_instruction))
"""


def test_a_client_that_is_killed(served: Served) -> None:
    client = subprocess.Popen(
        [sys.executable, "-c", KILLED, served.url], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "connected\n"
    time.sleep(0.2)
    client.send_signal(signal.SIGKILL)
    client.wait()
    client.stdout.close()
    check_serves(served)


def test_the_time_of_the_last_answer(served: Served) -> None:
    """As openpi's server tells it."""
    with PolicyClient(served.url) as client:
        message = client._message(Request(1, observation(), INSTRUCTION), stream=False)
    with served.connect() as connection:
        connection.recv(20)
        totals = []
        for _ in range(2):
            connection.send(packed(message))
            totals.append(unpacked(connection.recv(20))["server_timing"]["prev_total_ms"])
        assert totals[0] == 0.0 < totals[1]
        connection.close()
        with pytest.raises(ConnectionClosed):
            connection.recv()
