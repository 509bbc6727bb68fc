"""``ceed-vla serve --protocol vla_eval`` as a process, with messages like those of the harness."""

from __future__ import annotations

import io
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from ceed_vla.edge import EdgePolicy
from ceed_vla.edge.observation import random_observation
from ceed_vla.errors import ConfigError
from ceed_vla.export.cached import cached_export
from ceed_vla.serving.arrays import packed, unpacked
from ceed_vla.serving.serve import ServeConfig, serve
from tests.helpers.local_server import until
from tests.helpers.serving_calls import http, wait_until_ready

FRONT, WRIST, STATE = "observation.images.front", "observation.images.wrist", "observation.state"
MAP = f"images/agentview={FRONT},images/wrist={WRIST},states={STATE}"
EXECUTED = 4  # steps of the student's chunks


@pytest.fixture(scope="module")
def edge() -> EdgePolicy:
    pytest.importorskip("onnxscript", reason="the server is compared with an export")
    return EdgePolicy(cached_export("student"), threads=1)


@pytest.fixture(scope="module")
def harness(serving: Callable[..., Any]) -> Any:
    """A server of the student for the harness, ready."""
    server = serving("--protocol=vla_eval", f"--map={MAP}")
    wait_until_ready(server.port)
    return server


def message(kind: str, payload: Any, seq: Any = 1) -> bytes:
    envelope = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    return packed(envelope, str)


def ask(connection: ClientConnection, kind: str, payload: Any, seq: int = 1) -> dict[str, Any]:
    """The answer to a message, which has its number."""
    connection.send(message(kind, payload, seq))
    answer: dict[str, Any] = unpacked(bytes(connection.recv(30)))
    assert set(answer) == {"type", "payload", "seq", "timestamp"}
    assert answer["seq"] == seq
    return answer


@contextmanager
def greeted(server: Any) -> Iterator[ClientConnection]:
    """A connection on which both sides have said hello."""
    with server.connect() as connection:
        hello = {"harness_version": "0.8.0", "protocol_version": 1, "benchmark": "lift:Lift"}
        assert ask(connection, "hello", hello)["type"] == "hello"
        yield connection


def encoded(pixels: NDArray[np.uint8], kind: str = "png") -> dict[str, Any]:
    """An image as the harness sends it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind.upper())
    return {
        "__image__": True,
        "format": kind,
        "data": buffer.getvalue(),
        "shape": list(pixels.shape),
    }


def instruction_of(edge: EdgePolicy) -> str:
    """One that stays the same, as in an episode."""
    return str(random_observation(edge.settings, 0)[1])


def observed(edge: EdgePolicy, seed: int, **changes: Any) -> dict[str, Any]:
    """A payload in the form of the harness's benchmarks."""
    observation, _ = random_observation(edge.settings, seed)
    instruction = instruction_of(edge)
    return {
        "images": {
            "agentview": encoded(observation[FRONT]),
            "wrist": encoded(observation[WRIST]),
        },
        "states": observation[STATE].astype(np.float64),
        "task_description": instruction,
        "controller_states": np.zeros(3),  # more than the policy reads
        **changes,
    }


def decoded(edge: EdgePolicy, seed: int, previous: Any = None, **options: Any) -> Any:
    """What the policy itself makes of `observed`."""
    observation, _ = random_observation(edge.settings, seed)
    return edge.decode(observation, instruction_of(edge), "ceed", previous=previous, **options)


def test_the_hello_describes_the_policy(harness: Any) -> None:
    with harness.connect() as connection:
        answer = ask(connection, "hello", {"protocol_version": 1}, 7)
        assert ask(connection, "hello", {"protocol_version": 1}, 8)["type"] == "hello"
    said = answer["payload"]
    assert answer["type"] == "hello"
    assert said["protocol_version"] == 1
    assert said["observation_params"] == {"send_wrist_image": True, "send_state": True}
    assert said["checkpoint"] == "student"
    assert said["actions"]["n_action_steps"] == EXECUTED
    assert said["observation"]["images/wrist"]["feature"] == WRIST
    assert said["latency_ms"] == 0.0
    json.dumps(said)  # the harness does it
    assert re.fullmatch("[0-9a-f]{12}", said["checkpoint_hash"])


def test_every_observation_gets_one_step_of_a_chunk(harness: Any, edge: EdgePolicy) -> None:
    """The policy runs once per executed chunk, and starts warm from the last one."""
    with greeted(harness) as connection:
        for _ in range(2):  # the second episode starts cold again
            connection.send(message("episode_start", {"task": {"name": "lift"}, "mode": "sync"}))
            previous = None
            for chunk in range(3):
                wanted = decoded(edge, chunk, previous)
                for step in range(EXECUTED):
                    seq = 10 * chunk + step + 2
                    payload = observed(edge, chunk if step == 0 else 50 + step)
                    answer = ask(connection, "observation", payload, seq)
                    assert answer["type"] == "action"
                    found = answer["payload"]
                    assert found["actions"].dtype == np.float32
                    np.testing.assert_array_equal(found["actions"], wanted.actions[0][step])
                    if step == 0:
                        assert found["forwards"] == wanted.forwards
                        assert found["exit_reason"] == wanted.exit_reason[0]
                        assert found["server_timing"]
                    else:
                        assert set(found) == {"actions"}
                previous = np.asarray(wanted.tokens)
            connection.send(message("episode_end", {"metrics": {"success": False}, "steps": 12}))


def test_a_new_episode_forgets_the_running_chunk(harness: Any, edge: EdgePolicy) -> None:
    with greeted(harness) as connection, greeted(harness) as other:
        first = decoded(edge, 1).actions[0]
        for seq, step in enumerate((0, 1)):
            answer = ask(connection, "observation", observed(edge, 1), seq)
            np.testing.assert_array_equal(answer["payload"]["actions"], first[step])
        # Another connection has a chunk of its own.
        answer = ask(other, "observation", observed(edge, 2))
        second = decoded(edge, 2).actions[0]
        np.testing.assert_array_equal(answer["payload"]["actions"], second[0])
        for kind in ("episode_start", "episode_end"):
            connection.send(message(kind, {}))
            answer = ask(connection, "observation", observed(edge, 2))
            np.testing.assert_array_equal(answer["payload"]["actions"], second[0])


def test_a_live_episode_without_delay_is_that_of_sync_mode(harness: Any, edge: EdgePolicy) -> None:
    first = decoded(edge, 0, executed_steps=EXECUTED)
    observation, _ = random_observation(edge.settings, EXECUTED)
    second = edge.decode_behind(
        edge.prepare(observation, instruction_of(edge)),
        frozen_steps=0,
        executed_steps=EXECUTED,
        previous=np.asarray(first.tokens),
        shift_steps=EXECUTED,
    )
    wanted = [*first.actions[0][:EXECUTED], *second.actions[0][:EXECUTED]]
    with greeted(harness) as connection:
        connection.send(message("episode_start", {"task": {"name": "lift"}, "mode": "live"}))
        before = counted(harness.port).get("ok", 0)
        for tick, step in enumerate(wanted):
            answer = ask(connection, "observation", observed(edge, tick), tick)["payload"]
            np.testing.assert_array_equal(answer["actions"], step)
            assert ("forwards" in answer) == (tick in (0, EXECUTED))
        until(lambda: counted(harness.port)["ok"] == before + 2)
        connection.send(message("episode_end", {}))


def test_images_and_states_of_other_forms(harness: Any, edge: EdgePolicy) -> None:
    observation, _ = random_observation(edge.settings, 3)
    wanted = decoded(edge, 3).actions[0][0]
    raw = {"agentview": observation[FRONT], "wrist": observation[WRIST]}
    with greeted(harness) as connection:
        payload = observed(edge, 3, images=raw, states=observation[STATE].tolist())
        answer = ask(connection, "observation", payload)
        np.testing.assert_array_equal(answer["payload"]["actions"], wanted)
        connection.send(message("episode_start", {}))
        jpeg = {name: encoded(pixels, "jpeg") for name, pixels in raw.items()}
        assert ask(connection, "observation", observed(edge, 3, images=jpeg))["type"] == "action"


def test_a_client_may_leave_out_its_hello(harness: Any, edge: EdgePolicy) -> None:
    """As with the harness's own server."""
    with harness.connect() as connection:
        connection.send(message("error", {"error": "a client reports a failure"}))
        assert ask(connection, "observation", observed(edge, 0))["type"] == "action"


def images(**changes: Any) -> dict[str, Any]:
    good = encoded(np.zeros((96, 96, 3), np.uint8))
    return {"images": {"agentview": {**good, **changes}, "wrist": good}}


def png_of(width: int, height: int) -> bytes:
    """The first bytes of a PNG that declares this size."""
    data = bytearray(encoded(np.zeros((1, 1, 3), np.uint8))["data"])
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


GOOD = encoded(np.arange(96 * 96 * 3, dtype=np.uint8).reshape(96, 96, 3))["data"]
NO_PNG = "agentview has [0-9]+ bytes that are no PNG"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no state": (
        {"states": None},
        "states is None; it must be an array, an image, or a list of numbers",
    ),
    "no images": (
        {"images": {}},
        r"lacks 'images/agentview'; it has states, task_description, controller_states\.",
    ),
    "another camera": ({"images": {"primary": np.zeros(3)}}, "it has images/primary, states"),
    "a float image": (
        {"images": {"agentview": np.zeros((96, 96, 3)), "wrist": np.zeros((96, 96, 3))}},
        r"float64 \(96, 96, 3\), expected uint8",
    ),
    "a state of text": ({"states": ["x"] * 14}, "or a list of numbers"),
    "an empty state": ({"states": []}, "expected 14 finite numbers"),
    "a short state": ({"states": np.zeros(8)}, "expected 14 finite numbers"),
    "no instruction": ({"task_description": 3}, "task_description is 3; it must be text"),
    "a long instruction": ({"task_description": "lift " * 1000}, "at most 500 are read"),
    "unknown words": ({"task_description": "sing loudly"}, "of the instruction"),
    "another format": (images(format="tiff"), "must have bytes of one of the formats jpeg, png"),
    "a format as number": (images(format=1), "of the format 1; it must"),
    "no bytes": (images(data="x"), "agentview has 'x' of the format 'png'"),
    "a GIF called PNG": (
        images(data=b"GIF89a" + b"\0" * 20),
        NO_PNG,
    ),
    "JPEG called PNG": (
        images(data=encoded(np.zeros((8, 8, 3), np.uint8), "jpeg")["data"]),
        NO_PNG,
    ),
    "half a PNG": (
        images(data=GOOD[: len(GOOD) // 2]),
        NO_PNG,
    ),
    "many pixels": (images(data=png_of(5000, 5000)), "agentview is an image of 5000 x 5000 px"),
    "a wide image": (images(data=png_of(100_000, 1)), "agentview is an image of 100000 x 1 px"),
    "billions of pixels": (
        images(data=png_of(2**30, 2**30)),
        NO_PNG,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_observations(case: str, harness: Any, edge: EdgePolicy) -> None:
    """The error has the observation's number, and the connection goes on."""
    changes, expected = REFUSED[case]
    with greeted(harness) as connection:
        answer = ask(connection, "observation", observed(edge, 1, **changes), 41)
        assert answer["type"] == "error"
        assert re.search(expected, answer["payload"]["error"]), answer
        answer = ask(connection, "observation", observed(edge, 1), 42)
        np.testing.assert_array_equal(answer["payload"]["actions"], decoded(edge, 1).actions[0][0])


WHOLE = message("observation", {"task_description": "lift"})
BROKEN: dict[str, tuple[bytes | str, str]] = {
    "nothing": (b"", "is not msgpack"),
    "a truncated message": (WHOLE[:-3], "is not msgpack"),
    "text": ("observation", "The message is text"),
    "a list": (msgpack.packb([1]), r"The message is \[1\]; it must be a mapping"),
    "nested lists": (b"\x91" * 100_000, "is not msgpack"),
    "an observation of openpi": (packed({"prompt": "lift"}), "type is None; it must be one of"),
    "an unknown type": (message("reset", {}), "type is 'reset'; it must be one of hello"),
    "an action": (message("action", {}), "type is 'action'; it must be one of hello"),
    "a type of a list": (message([], {}), r"type is \[\]"),  # type: ignore[arg-type]
    "no payload": (message("hello", None), "payload is None; it must be a mapping"),
    "a number as text": (message("hello", {}, "1"), "seq is '1'; it must be a whole number"),
    "a negative number": (message("hello", {}, -1), "seq is -1; it must be a whole number"),
    "a boolean as number": (message("hello", {}, True), "seq is True; it must be a whole number"),
    "another version": (
        message("hello", {"protocol_version": 2}),
        "protocol_version is 2; it must be 1",
    ),
    "no version": (message("hello", {}), "protocol_version is None; it must be 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_messages_that_end_the_connection(case: str, harness: Any) -> None:
    raw, expected = BROKEN[case]
    with harness.connect() as connection:
        connection.send(raw)
        answer = unpacked(bytes(connection.recv(30)))
        assert answer["type"] == "error"
        assert answer["seq"] == (1 if "version" in case else 0)
        assert re.search(expected, answer["payload"]["error"]), answer
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(30)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011


def test_health_and_metrics(harness: Any, edge: EdgePolicy) -> None:
    assert http(harness.port, "/health") == (200, "OK\n")  # the harness's name for it
    with greeted(harness) as connection:
        before = counted(harness.port)
        for _ in range(EXECUTED):
            ask(connection, "observation", observed(edge, 0))
        ask(connection, "observation", {})
        after = counted(harness.port)
    assert after["ok"] == before.get("ok", 0) + 1
    assert after["refused"] == before.get("refused", 0) + 1


def counted(port: int) -> dict[str, int]:
    text = http(port, "/metrics")[1]
    found = re.findall(r'requests_total\{outcome="(\w+)"\} (\d+)', text)
    return {outcome: int(count) for outcome, count in found}


def test_the_instruction_cannot_be_a_feature() -> None:
    with pytest.raises(ConfigError, match="map has 'task_description="):
        serve(ServeConfig("student", protocol="vla_eval", port=0, map=f"task_description={STATE}"))
