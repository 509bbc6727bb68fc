"""A policy on a server: the answers of a local one, and a named fault for everything else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workers import load_error, running

from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.ros_nodes.robot.inference import InferenceWorker
from ceed_vla.ros_nodes.robot.parameters import defaults
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.policy_setup import make_policy
from ceed_vla.ros_nodes.robot.remote_policy import RemotePolicy, RemoteSettings
from ceed_vla.serving.data_ranges import ACTION, Range
from ceed_vla.serving.faults import CHANGED, FOREIGN, LOST, REFUSED, SILENT, ServerError
from ceed_vla.serving.predictor_types import BAD_INSTRUCTION, Request
from tests.ceed_vla.serving.conftest import Served, start
from tests.helpers.message_proxy import (
    CUT,
    DELAY,
    DOUBLE,
    DROP,
    NONE,
    STALL,
    STRANGE,
    SWAP,
    proxied,
)
from tests.helpers.worker_requests import INSTRUCTION, STATE, ask, observation, wait

A = 7
FLAGS = ("--engine=eager",)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = start(*FLAGS, log=tmp_path_factory.mktemp("served") / "log")
    yield server
    server.process.kill()
    server.process.wait()


def worker_of(url: str, **settings: Any) -> InferenceWorker:
    """A worker whose server has answered."""
    worker = InferenceWorker(RemotePolicy(RemoteSettings(url, decoding="ceed", **settings)))
    assert load_error(worker) is None
    return worker


def question(number: int, seed: int = 0) -> Request:
    return Request(number, observation(seed), INSTRUCTION)


@pytest.mark.slow
def test_a_server_answers_as_a_local_policy_does(served: Served) -> None:
    with (
        running("student", replan_steps=3) as local,
        closing(worker_of(served.url, replan_steps=3)) as remote,
    ):
        mine, theirs = local.spec, remote.spec
        assert replace(theirs, warmup_s=0.0) == replace(mine, warmup_s=0.0)
        before = None
        for number in range(1, 6):
            request = question(number, seed=number)
            if before is not None:
                request = replace(request, previous=before, shift_steps=2, frozen_steps=1)
            here, there = ask(local, request), ask(remote, request)
            assert (here.error, there.error) == (None, None)
            np.testing.assert_array_equal(here.actions, there.actions)
            np.testing.assert_array_equal(here.tokens, there.tokens)
            assert (here.forwards, here.exit_reason) == (there.forwards, there.exit_reason)
            assert there.seconds["total"] > there.seconds["network"] >= 0.0
            before = here.tokens
        for text, code in (("xyzzy plugh", BAD_INSTRUCTION), ("x" * 600, REFUSED)):
            refused = ask(remote, replace(request, instruction=text))
            assert refused.code == code
            assert refused.error
        assert ask(remote, question(9)).error is None


def test_certain_steps_come_before_the_chunk(served: Served) -> None:
    remote = RemotePolicy(RemoteSettings(served.url, decoding="ar"))
    worker = InferenceWorker(remote)
    assert load_error(worker) is None
    with closing(worker):
        assert worker.submit(replace(question(1), stream=True))
        parts = [wait(worker)]
        while not parts[-1].whole:
            parts.append(wait(worker))
        *early, whole = parts
        assert [len(part.actions) for part in early] == list(range(1, 8))
        for part in early:
            np.testing.assert_array_equal(part.actions, whole.actions[: len(part.actions)])
        assert ask(worker, question(2)).error is None


def test_what_a_server_promises(served: Served) -> None:
    policy = RemotePolicy(RemoteSettings(served.url))
    spec = policy.declared()
    assert (spec.control_rate, spec.action_names[0], spec.action_dim) == (10.0, "dx", A)
    ranges = policy.ranges({STATE: 14, ACTION: A, "observation.other": 2})
    assert isinstance(ranges[STATE], Range)
    assert isinstance(ranges[ACTION], Range)
    assert "no statistics" in str(ranges["observation.other"])
    assert "no statistics" in str(policy.ranges({STATE: 6})[STATE])
    policy.stop(0.0)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (CUT, LOST),
        (DROP, SILENT),
        (SWAP, FOREIGN),
        (STRANGE, FOREIGN),
        (DOUBLE, FOREIGN),
        (DELAY, ""),
        (STALL, SILENT),
    ],
)
def test_a_fault_has_its_code_and_ends_with_its_cause(
    served: Served, fault: str, code: str
) -> None:
    with (
        proxied(served.url) as (proxy, url),
        closing(worker_of(url, timeout_s=1.5 if code == SILENT else 20.0)) as worker,
    ):
        wanted = ask(worker, question(1)).actions
        proxy.fault = fault
        codes = {ask(worker, question(number, seed=number)).code for number in range(2, 6)}
        assert proxy.harmed
        # Every second answer is right if each comes twice, and after a swap.
        assert codes - {""} == {code} - {""}
        proxy.fault = NONE
        answers = [ask(worker, question(number)) for number in (6, 7)]
        assert answers[-1].error is None
        np.testing.assert_array_equal(answers[-1].actions, wanted)
        assert worker.failed is None


@pytest.mark.slow
def test_servers_that_stop_die_and_change(tmp_path: Path) -> None:
    with ExitStack() as opened:

        def begin(name: str, **options: Any) -> Served:
            server = start(*FLAGS, log=tmp_path / name, **options)
            opened.callback(server.process.wait)
            opened.callback(server.process.kill)  # also one that is stopped
            return server

        server = begin("first")
        worker = opened.enter_context(closing(worker_of(server.url, timeout_s=20.0)))
        os.kill(server.process.pid, signal.SIGSTOP)  # half-open: no answer to pings
        assert ask(worker, question(1)).code == LOST  # and not SILENT, after 20 s
        os.kill(server.process.pid, signal.SIGCONT)
        assert eventually(worker, "")
        server.process.kill()
        server.process.wait()
        assert eventually(worker, LOST)
        assert "cannot be reached" in str(ask(worker, question(3)).error)
        other = begin("second", policy="student_all_tokens", port=server.port)
        assert eventually(worker, CHANGED)
        assert "weights was" in str(ask(worker, question(4)).error)
        other.process.terminate()
        assert other.process.wait(30) == 0
        begin("third", port=server.port)
        assert eventually(worker, "")


def eventually(worker: InferenceWorker, code: str) -> bool:
    """Whether the answers get this code within a minute, while a server starts."""
    end = time.monotonic() + 60.0
    while time.monotonic() < end:
        if ask(worker, question(1)).code == code:
            return True
        time.sleep(0.2)
    return False


def test_bad_addresses_and_keys(served: Served, tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:1", "ws://", "nothing"):
        with pytest.raises(CeedVLAError, match=r"must be ws://HOST:PORT|cannot be reached"):
            RemotePolicy(RemoteSettings(url)).declared()
    with pytest.raises(CeedVLAError, match="missing"):
        RemotePolicy(RemoteSettings(served.url, key_file=str(tmp_path / "missing")))
    with pytest.raises(CeedVLAError, match="cannot be used"):
        RemotePolicy(
            RemoteSettings("wss://127.0.0.1:1", ca_file=str(tmp_path / "missing"))
        ).declared()
    with pytest.raises(ServerError, match="cannot be reached") as error:
        RemotePolicy(RemoteSettings("ws://127.0.0.1:9")).declared()
    assert error.value.code == LOST
    worker = InferenceWorker(RemotePolicy(RemoteSettings(served.url, decoding="beam")))
    assert "Unknown decoder 'beam'" in str(load_error(worker))
    worker.close()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"inference_url": "ws://gpu:8000", "engine": "eager"},
            "engine is 'eager'; with",
        ),
        ({"inference_url": "ws://gpu:8000", "inference_delay": 0.1}, "Give it to ceed-vla serve"),
        ({"inference_url": "ws://gpu:8000", "chunk_deadline": 0.2}, "Give it to ceed-vla serve"),
        ({"inference_url": "ws://gpu:8000", "inference_threads": 2}, "Give it to ceed-vla serve"),
        ({"inference_timeout": 3.0}, "3.0; it is used with inference_url only"),
        ({"inference_jpeg_quality": 90}, "90; it is used with inference_url only"),
        ({"inference_key_file": "key"}, "'key'; it is used with inference_url only"),
    ],
)
def test_settings_of_the_other_place(changes: dict[str, Any], expected: str) -> None:
    values = {**defaults(POLICY_PARAMETERS), **changes}
    with pytest.raises(ConfigError, match=expected):
        make_policy(values, 0.1)


def test_closing_during_a_request_is_prompt(served: Served) -> None:
    with proxied(served.url) as (proxy, url):
        worker = worker_of(url)
        proxy.fault = DROP
        assert worker.submit(question(1))
        time.sleep(0.1)
        began = time.monotonic()
        worker.close()
        assert time.monotonic() - began < 1.5
        assert not worker._thread.is_alive()


def test_a_connection_that_was_lost_in_between_is_made_anew(served: Served) -> None:
    with proxied(served.url) as (proxy, url), closing(worker_of(url)) as worker:
        policy: Any = worker._policy
        policy._client.abort()
        time.sleep(0.3)
        assert ask(worker, question(1)).error is None
        assert proxy.harmed == 0


def test_many_reconnects_leave_nothing_behind(served: Served) -> None:
    policy = RemotePolicy(RemoteSettings(served.url))
    policy.declared()

    def more() -> bool:
        """Whether there are more descriptors or threads than at first."""
        descriptors = len(os.listdir("/proc/self/fd"))
        return descriptors > before[0] or threading.active_count() > before[1]

    # A test before this one may still be closing.
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(200):
        policy._disconnect()
        policy._connected()
    end = time.monotonic() + 20.0
    while more() and time.monotonic() < end:
        time.sleep(0.05)
    assert not more()
    policy.stop(0.0)


def test_images_as_jpeg(served: Served) -> None:
    with closing(worker_of(served.url, jpeg_quality=95)) as worker:
        assert ask(worker, question(1)).error is None
