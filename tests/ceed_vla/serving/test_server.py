"""``ceed-vla serve`` as a process, with openpi's protocol over real connections."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ceed_vla.edge import EdgePolicy
from ceed_vla.edge.observation import random_observation
from ceed_vla.errors import ConfigError
from ceed_vla.export.cached import cached_export
from ceed_vla.serving.arrays import packed, unpacked
from ceed_vla.serving.predictor_types import PredictorSettings
from ceed_vla.serving.serve import ServeConfig, serve, url
from tests.helpers.serving_calls import KEY, ask, error_of, http


@pytest.fixture(scope="module")
def edge() -> EdgePolicy:
    pytest.importorskip("onnxscript", reason="the server is compared with an export")
    return EdgePolicy(cached_export("student"), threads=1)


def message(edge: EdgePolicy, seed: int = 0, **options: Any) -> bytes:
    observation, instruction = random_observation(edge.settings, seed)
    return packed({**observation, "prompt": instruction, **options})


def test_the_greeting_describes_the_policy(served: Any, edge: EdgePolicy) -> None:
    with served.connect() as connection:
        metadata = unpacked(connection.recv(10))
    assert metadata["policy_type"] == "ceed_vla"
    assert metadata["checkpoint"] == "student"
    assert metadata["decoding"] == "ceed"
    assert metadata["actions"]["shape"] == [8, 7]
    assert metadata["observation"]["observation.state"]["shape"] == [14]
    for camera in edge.settings.images.cameras:
        assert metadata["observation"][camera]["shape"] == [96, 96, 3]
    assert re.fullmatch("[0-9a-f]{12}", metadata["checkpoint_hash"])


def test_answers_are_the_policys(served: Any, edge: EdgePolicy) -> None:
    with served.connect() as connection:
        connection.recv(10)
        previous = None
        for seed in range(3):
            observation, instruction = random_observation(edge.settings, seed)
            for decoding in ("ceed", "ar", "jacobi"):
                options: dict[str, Any] = {"decoding": decoding}
                wanted = edge.decode(observation, instruction, decoding)
                answer = ask(connection, message(edge, seed, **options))
                np.testing.assert_array_equal(answer["tokens"], wanted.tokens[0])
                np.testing.assert_array_equal(answer["actions"], wanted.actions[0])
                assert answer["forwards"] == wanted.forwards
                assert answer["exit_reason"] == wanted.exit_reason[0]
            if previous is not None:
                frozen = {"previous_tokens": previous, "shift_steps": 2, "frozen_steps": 3}
                answer = ask(connection, message(edge, seed, decoding="ar", **frozen))
                np.testing.assert_array_equal(answer["tokens"][:21], previous[14:35])
            previous = answer["tokens"]
    assert set(answer["server_timing"]) == {"queue_ms", "infer_ms", "prev_total_ms"}


def test_a_session_starts_warm_until_its_connection_ends(served: Any, edge: EdgePolicy) -> None:
    for _ in range(2):
        with served.connect() as connection:
            connection.recv(10)
            last = None
            for seed in range(3):
                observation, instruction = random_observation(edge.settings, seed)
                wanted = edge.decode(observation, instruction, "ceed", previous=last)
                answer = ask(connection, message(edge, seed, session="arm"))
                np.testing.assert_array_equal(answer["tokens"], wanted.tokens[0])
                assert answer["forwards"] == wanted.forwards
                last = np.asarray(wanted.tokens)
                cold = ask(connection, message(edge, seed))
                other = ask(connection, message(edge, seed, session=f"other {seed}"))
                np.testing.assert_array_equal(cold["tokens"], other["tokens"])


def test_a_session_continues_behind_its_executed_steps(served: Any, edge: EdgePolicy) -> None:
    with served.connect() as connection:
        connection.recv(10)
        first = ask(connection, message(edge, 0, session="arm", executed_steps=3))
        frozen = {"session": "arm", "frozen_steps": 2, "decoding": "ar"}
        second = ask(connection, message(edge, 1, **frozen))
        np.testing.assert_array_equal(second["tokens"][:14], first["tokens"][21:35])
        third = ask(connection, message(edge, 2, **frozen, shift_steps=0))
        np.testing.assert_array_equal(third["tokens"][:14], second["tokens"][:14])
        assert ask(connection, message(edge, 2, request_id=7))["request_id"] == 7


def test_a_deadline_ends_a_block(served: Any, edge: EdgePolicy) -> None:
    with served.connect() as connection:
        connection.recv(10)
        answer = ask(connection, message(edge, decoding="jacobi", deadline_ms=5))
    assert (answer["forwards"], answer["exit_reason"]) == (1, "deadline")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an option that does not exist": ({"frozen_step": 1}, "the unknown key 'frozen_step'"),
    "no image": ({"observation.images.front": None}, "front is None; it must be an array"),
    "float images": (
        {"observation.images.front": np.full((96, 96, 3), np.nan)},
        r"float64 \(96, 96, 3\), expected uint8",
    ),
    "one channel": ({"observation.images.front": np.zeros((96, 96), np.uint8)}, "expected uint8"),
    "a short state": ({"observation.state": [0.0] * 3}, "expected 14 finite numbers"),
    "an infinite state": ({"observation.state": [float("inf")] * 14}, "14 finite numbers"),
    "a state of text": ({"observation.state": ["x"] * 14}, "or a list of numbers"),
    "no prompt": ({"prompt": 3}, "prompt is 3: it is not text"),
    "a long prompt": ({"prompt": "lift " * 1000}, "at most 500 are read"),
    "unknown words": ({"prompt": "sing loudly"}, "of the instruction"),
    "unknown decoder": ({"decoding": "beam"}, "Unknown decoder 'beam'"),
    "tokens of a word": ({"previous_tokens": "x"}, "it must be the tokens"),
    "a huge image": (
        {"observation.images.front": np.zeros((1, 100_000, 3), np.uint8)},
        "both sides must have 1 to 4096 px",
    ),
    "frozen steps without a chunk": (
        {"frozen_steps": 1, "session": "new"},
        "frozen_steps is 1, but there is no last chunk",
    ),
    "numbers as text": ({"observation.state": "12"}, "or a list of numbers"),
    "too few tokens": ({"previous_tokens": np.zeros(3, np.int64), "shift_steps": 1}, "expected"),
    "frozen steps alone": ({"frozen_steps": 9, "previous_tokens": np.zeros(56, np.int64)}, "froz"),
    "a half step": ({"frozen_steps": 0.5}, "frozen_steps is 0.5; it must be a whole number"),
    "no deadline": ({"deadline_ms": float("nan")}, r"deadline_ms is nan; it must be in"),
    "a session of bytes": ({"session": b"x"}, "session is b'x'; it must be text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case: str, served: Any, edge: EdgePolicy) -> None:
    options, expected = BAD[case]
    with served.connect() as other, served.connect() as connection:
        other.recv(10)
        connection.recv(10)
        found = error_of(connection, message(edge, **options))
        assert re.search(expected, found), found
        assert "Traceback" not in found
        assert len(ask(other, message(edge))["actions"]) == 8  # undisturbed


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x91" * 100_000, "text", msgpack.packb([1])])
def test_messages_that_are_no_requests(raw: bytes | str, served: Any) -> None:
    with served.connect() as connection:
        connection.recv(10)
        assert re.search("message", error_of(connection, raw), re.IGNORECASE)


def test_health_and_metrics(served: Any, edge: EdgePolicy) -> None:
    assert http(served.port, "/healthz") == (200, "OK\n")
    with served.connect() as connection:
        connection.recv(10)
        ask(connection, message(edge))
        status, text = http(served.port, "/metrics")
    assert status == 200
    assert re.search(r'ceed_vla_requests_total\{outcome="ok"\} [1-9]', text)
    assert re.search(r'ceed_vla_seconds_total\{part="prefill"\} [0-9.e-]+', text)
    assert "ceed_vla_connections 1" in text


def test_clients_take_turns(served: Any, edge: EdgePolicy) -> None:
    """Four clients, each with one request after the other, get the same number of answers."""
    counts = [0] * 4
    end = time.monotonic() + 1.5

    def drive(index: int) -> None:
        with served.connect() as connection:
            connection.recv(10)
            while time.monotonic() < end:
                ask(connection, message(edge, index))
                counts[index] += 1

    threads = [threading.Thread(target=drive, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(counts) > 2
    assert max(counts) - min(counts) <= 2 + max(counts) // 4


def test_a_key_is_needed(serving: Callable[..., Any], tmp_path: Path, edge: EdgePolicy) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    server = serving(f"--api_key_file={tmp_path / 'key'}", "--max_message_mb=1")
    good = {"Authorization": f"Api-Key {KEY}"}
    with server.connect(additional_headers=good, open_timeout=60) as connection:
        connection.recv(60)
        assert ask(connection, message(edge))["forwards"] >= 1
        connection.send(b"\0" * 2_000_000)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(30)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009  # too big
    for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": f"Bearer {KEY}"}):
        with (
            pytest.raises(InvalidStatus, match="401"),
            server.connect(additional_headers=headers),
        ):
            pass
    assert http(server.port, "/metrics")[0] == 401
    assert http(server.port, "/healthz")[0] == 200


def test_too_many_connections(serving: Callable[..., Any]) -> None:
    server = serving("--max_connections=2")
    with server.connect(open_timeout=60) as first, server.connect() as second:
        first.recv(60)
        second.recv(60)
        with pytest.raises(InvalidStatus, match="503"), server.connect():
            pass
    deadline = time.monotonic() + 10
    while True:  # the places are free again
        try:
            with server.connect() as third:
                assert third.recv(10)
            break
        except InvalidStatus:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_sigterm_answers_what_runs(serving: Callable[..., Any], edge: EdgePolicy) -> None:
    server = serving("--engine=eager", "--decoding=ar")
    with server.connect(open_timeout=60) as connection, server.connect(open_timeout=60) as idle:
        connection.recv(120)
        idle.recv(60)
        connection.send(message(edge))
        time.sleep(0.02)  # it runs now: 55 forwards of torch
        server.process.send_signal(signal.SIGTERM)
        assert isinstance(connection.recv(30), bytes)
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv(30)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
    assert server.process.wait(30) == 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "others without a key": ({"host": "0.0.0.0"}, "set --api_key_file"),
    "a name without a key": ({"host": "robot.local"}, "which other machines can reach"),
    "half of TLS": ({"certificate": "x"}, "must be set together"),
    "no certificate": ({"certificate": "x", "private_key": "y"}, "cannot be used"),
    "a feature that is not there": ({"map": "image=observation.images.top"}, "map has 'image="),
    "a feature named twice": (
        {"map": "a=observation.state,b=observation.state"},
        "each once",
    ),
    "a key of ours": ({"map": "prompt=observation.state"}, "map has 'prompt="),
    "a pair without =": ({"map": "image"}, "it must be KEY=FEATURE"),
    "a protocol": ({"protocol": "grpc"}, "protocol is 'grpc'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(case: str) -> None:
    settings, expected = REFUSED[case]
    with pytest.raises(ConfigError, match=expected):
        serve(ServeConfig("student", port=0, **settings))


@pytest.mark.parametrize(("given", "used"), [({}, 0.1), ({"chunk_deadline": 0.25}, 0.25)])
def test_a_plan_may_take_a_step_of_the_robot(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, float], used: float
) -> None:
    def load(settings: PredictorSettings) -> None:
        raise ConfigError(f"{settings.chunk_deadline:g} s")

    monkeypatch.setattr("ceed_vla.serving.serve.Predictor", load)
    monkeypatch.setattr("ceed_vla.serving.server.PolicyServer", lambda load, *_: load())
    with pytest.raises(ConfigError, match=f"^{used} s"):  # of the student's robot
        serve(ServeConfig("student", port=0, **given))


def test_a_short_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("short")
    with pytest.raises(ConfigError, match="a key of 5 characters; it must have at least 16"):
        serve(ServeConfig("student", port=0, api_key_file=str(tmp_path / "key")))


def test_keys_of_other_robots(serving: Callable[..., Any], edge: EdgePolicy) -> None:
    front, wrist = edge.settings.images.cameras
    pairs = f"observation/image={front},observation/wrist_image={wrist},gripper="
    server = serving(f"--map={pairs},observation/state=observation.state")
    observation, instruction = random_observation(edge.settings, 1)
    with server.connect(open_timeout=60) as connection:
        metadata = unpacked(connection.recv(60))
        assert set(metadata["observation"]) == {
            "observation/image",
            "observation/wrist_image",
            "observation/state",
        }
        answer = ask(
            connection,
            packed(
                {
                    "observation/image": observation[front],
                    "observation/wrist_image": observation[wrist],
                    "observation/state": observation["observation.state"],
                    "gripper": 0.5,
                    "prompt": instruction,
                }
            ),
        )
    wanted = edge.decode(observation, instruction, "ceed")
    np.testing.assert_array_equal(answer["tokens"], wanted.tokens[0])


def usage(process: int) -> tuple[int, int]:
    """Open descriptors, and memory [kB], of a process."""
    folder = Path(f"/proc/{process}")
    memory = re.search(r"VmRSS:\s+(\d+) kB", (folder / "status").read_text())
    assert memory is not None
    return len(list((folder / "fd").iterdir())), int(memory[1])


@pytest.mark.slow
def test_a_thousand_clients_come_and_go(served: Any, edge: EdgePolicy) -> None:
    """Every third asks, every third leaves without a word, every third sends what is refused."""
    before = (0, 0)
    for index in range(1100):
        if index == 100:
            before = usage(served.process.pid)
        with served.connect() as connection:
            connection.recv(10)
            if index % 3 == 0:
                ask(connection, message(edge, index, session="arm"))
            elif index % 3 == 1:
                connection.socket.close()
            else:
                error_of(connection, b"")
    time.sleep(1)
    descriptors, memory = usage(served.process.pid)
    assert descriptors <= before[0] + 2
    assert memory - before[1] < 20_000


def test_addresses_of_a_server() -> None:
    assert url("ws", "0.0.0.0", 8000) == "ws://0.0.0.0:8000"
    assert url("wss", "::1", 8000) == "wss://[::1]:8000"
