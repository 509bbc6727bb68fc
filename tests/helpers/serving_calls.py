"""Calls of a running server: messages of openpi's protocol, and plain HTTP."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from ceed_vla.serving.arrays import unpacked

KEY = "a-key-of-more-than-sixteen-characters"


def ask(connection: ClientConnection, request: bytes) -> dict[str, Any]:
    connection.send(request)
    answer = connection.recv(30)
    assert isinstance(answer, bytes), answer
    found: dict[str, Any] = unpacked(answer)
    return found


def error_of(connection: ClientConnection, request: bytes | str) -> str:
    """The error that a request gets, after which the server closes the connection."""
    connection.send(request)
    answer = connection.recv(30)
    assert isinstance(answer, str)
    with pytest.raises(ConnectionClosed) as closed:
        connection.recv(30)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011
    return answer


def http(port: int, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait_until_ready(port: int, seconds: float = 180) -> None:
    """Wait until the policy of a server is loaded, perhaps with an export that is made first."""
    end = time.monotonic() + seconds
    while http(port, "/healthz")[0] != 200:
        assert time.monotonic() < end
        time.sleep(0.1)
