"""The client without torch, against a running server and against servers that misbehave."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from ceed_vla.edge import EdgePolicy
from ceed_vla.edge.observation import random_observation
from ceed_vla.errors import ConfigError
from ceed_vla.export.cached import cached_export
from ceed_vla.serving.arrays import packed
from ceed_vla.serving.client import PolicyClient
from ceed_vla.serving.faults import FOREIGN, LOST, REFUSED, SILENT, ServerError
from ceed_vla.serving.predictor_types import Request


@pytest.fixture(scope="module")
def edge() -> EdgePolicy:
    pytest.importorskip("onnxscript", reason="the server is compared with an export")
    return EdgePolicy(cached_export("student"), threads=1)


def test_it_gets_what_the_policy_decodes(served: Any, edge: EdgePolicy) -> None:
    with PolicyClient(f"ws://127.0.0.1:{served.port}") as client:
        assert client.spec.cameras == dict.fromkeys(edge.settings.images.cameras, (3, 96, 96))
        assert client.spec.states == {"observation.state": 14}
        assert (client.spec.chunk_steps, client.spec.action_dim) == (8, 7)
        assert client.spec.delta_dims == (0, 1, 2, 3, 4, 5)
        previous = None
        for seed in range(3):
            observation, instruction = random_observation(edge.settings, seed)
            wanted = edge.decode_behind(
                edge.prepare(observation, instruction),
                frozen_steps=0 if previous is None else 2,
                decoding="ceed",
                previous=None if previous is None else previous[None],
                shift_steps=None if previous is None else 4,
                executed_steps=4,
            )
            request = Request(
                seed,
                observation,
                instruction,
                previous,
                4,
                0 if previous is None else 2,
                deadline_s=10.0,
                decoding="ceed",
                executed_steps=4,
            )
            response = client.predict(request)
            assert response.tokens is not None
            np.testing.assert_array_equal(response.tokens, wanted.tokens[0])
            np.testing.assert_array_equal(response.actions, wanted.actions[0])
            assert (response.id, response.forwards) == (seed, wanted.forwards)
            assert {"prefill", "decode", "total"} <= set(response.seconds)
            previous = response.tokens


def test_a_refused_request_closes_the_connection(served: Any, edge: EdgePolicy) -> None:
    observation, instruction = random_observation(edge.settings, 0)
    client = PolicyClient(f"ws://127.0.0.1:{served.port}")
    with pytest.raises(ServerError, match="Unknown decoder 'beam'"):
        client.predict(Request(1, observation, instruction, decoding="beam"))
    with pytest.raises(ServerError, match="is lost"):
        client.predict(Request(2, observation, instruction))


def test_addresses(served: Any) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        PolicyClient("gpu:8000")
    for url in ("ws://h:99999", "ws://[::1", f"ws://{'x' * 70}"):
        with pytest.raises((ConfigError, ServerError)):
            PolicyClient(url, timeout_s=5)
    with pytest.raises(ConfigError, match="other characters"):
        PolicyClient("ws://127.0.0.1:9", key="secret\n")
    with pytest.raises(ServerError, match="cannot be reached"):
        PolicyClient("ws://127.0.0.1:9", timeout_s=5)
    with pytest.raises(ConfigError, match=r"missing\.pem cannot be used"):
        PolicyClient("wss://127.0.0.1:9", ca_file="missing.pem")


GREETING = {
    "policy_type": "ceed_vla",
    "observation": {"observation.state": {"shape": [2]}},
    "actions": {"shape": [2, 1], "n_action_steps": 1, "increments": []},
}


@contextmanager
def answering(greeting: Any, *answers: Any) -> Iterator[str]:
    """A server that sends prescribed messages; None waits."""

    def handle(connection: ServerConnection) -> None:
        for message in (greeting, *answers):
            if message is not greeting:
                connection.recv()
            if message is None:
                connection.recv()
            else:
                connection.send(message)
        connection.recv()

    with serve(handle, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("greeting", ["text", b"\xc1", packed([1]), packed({"a": 1})])
def test_other_greetings(greeting: Any) -> None:
    with answering(greeting) as url, pytest.raises(ServerError) as error:
        PolicyClient(url, timeout_s=5)
    assert error.value.code == (REFUSED if greeting == "text" else FOREIGN)


ANSWERS = {
    "nothing": None,
    "no actions": packed({}),
    "another shape": packed({"actions": np.zeros((3, 1), np.float32)}),
    "not finite": packed({"actions": np.array([[np.nan], [0]], np.float32)}),
    "too large for float32": packed({"actions": np.full((2, 1), 1e300)}),
    "the answer to another request": packed(
        {"actions": np.zeros((2, 1), np.float32), "request_id": 9}
    ),
    "whole numbers": packed({"actions": np.zeros((2, 1), np.int64)}),
    "tokens of floats": packed(
        {"actions": np.zeros((2, 1), np.float32), "tokens": np.zeros(2, np.float32)}
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_other_answers(case: str) -> None:
    with answering(packed(GREETING), ANSWERS[case]) as url:
        client = PolicyClient(url, timeout_s=0.5)
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"has answered|has not answered in") as error:
            client.predict(Request(1, {"observation.state": np.zeros(2, np.float32)}, "lift"))
        assert time.monotonic() - started < 4
        assert error.value.code == (SILENT if case == "nothing" else FOREIGN)
        with pytest.raises(ServerError, match="is lost") as error:
            client.predict(Request(2, {"observation.state": np.zeros(2, np.float32)}, "lift"))
        assert error.value.code == LOST


def test_it_imports_neither_torch_nor_lerobot() -> None:
    script = (
        "import sys, ceed_vla.serving.client\n"
        "print([name for name in ('torch', 'lerobot', 'draccus') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout in ("[]\n", "['draccus']\n"), done.stdout


def test_tls(serving: Callable[..., Any], tmp_path: Path) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    server = serving(f"--certificate={certificate}", f"--private_key={key}")
    url = f"wss://127.0.0.1:{server.port}"
    with PolicyClient(url, ca_file=str(certificate), timeout_s=60) as client:
        assert client.spec.chunk_steps == 8
    with pytest.raises(ConfigError, match="is not trusted"):
        PolicyClient(url)
    with pytest.raises(ServerError, match="cannot be reached"):
        PolicyClient(f"ws://127.0.0.1:{server.port}", timeout_s=5)
