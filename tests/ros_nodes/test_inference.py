"""The worker answers, reports errors, never blocks and never outlives its owner, in a thread and in
a process.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from workers import load_error, process_of, running

import ceed_vla
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import NotFiniteError
from ceed_vla.real_time import decode_behind
from ceed_vla.ros_nodes.robot.inference import InferenceWorker
from ceed_vla.ros_nodes.robot.local_policy import MODES, local_policy
from ceed_vla.serving.predictor import Request
from tests.helpers.worker_requests import FRONT, INSTRUCTION, STATE, WRIST, ask, observation, wait

A = 7


@pytest.fixture(scope="module", params=MODES)
def worker(request: pytest.FixtureRequest) -> Iterator[InferenceWorker]:
    """student_all_tokens, in a thread and in a process."""
    with running("student_all_tokens", mode=request.param, replan_steps=4) as started:
        yield started


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any, Any]:
    return ceed_vla.load("student_all_tokens")


def test_the_spec_is_the_checkpoints(worker: InferenceWorker) -> None:
    spec = worker.spec
    assert spec.cameras == {FRONT: (3, 96, 96), WRIST: (3, 96, 96)}
    assert spec.states == {STATE: 14}
    assert (spec.action_dim, spec.chunk_steps, spec.n_action_steps) == (A, 8, 4)
    assert spec.policy_type == "ceed_vla"
    assert spec.warmup_s > 0


def test_the_answer_is_the_policys(worker: InferenceWorker, policy: tuple[Any, Any, Any]) -> None:
    model, pre, _ = policy
    raw = observation()
    batch = {
        key: (
            torch.tensor(value).permute(2, 0, 1)[None].float() / 255
            if value.ndim == 3
            else torch.tensor(value)[None]
        )
        for key, value in raw.items()
    }
    batch = pre({**batch, "task": [INSTRUCTION]})
    first = ask(worker, Request(1, raw, INSTRUCTION))
    expected = model.decode(batch, "ceed")
    assert first.error is None
    assert first.id == 1
    assert first.tokens.tolist() == expected.tokens[0].tolist()
    np.testing.assert_array_equal(first.actions, expected.actions[0].numpy())
    assert first.actions.dtype == np.float32
    assert (first.forwards, first.exit_reason) == (expected.forwards, expected.exit_reason[0])
    assert set(first.seconds) == {"preprocess", "prefill", "decode", "total"}
    second = ask(worker, Request(2, raw, INSTRUCTION, first.tokens, shift_steps=3, frozen_steps=2))
    warm = {"decoding": "ceed", "previous": torch.tensor(first.tokens)[None], "shift_steps": 3}
    expected = decode_behind(model, batch, 2, **warm)
    assert second.tokens.tolist() == expected.tokens[0].tolist()
    np.testing.assert_array_equal(second.actions[:2], first.actions[3:5])


def test_one_request_at_a_time(worker: InferenceWorker) -> None:
    assert worker.idle
    assert worker.poll() is None
    assert worker.submit(Request(7, observation(), INSTRUCTION))
    assert not worker.idle
    assert not worker.submit(Request(8, observation(), INSTRUCTION))
    assert wait(worker).id == 7
    assert worker.poll() is None
    assert worker.idle


@pytest.mark.parametrize(
    ("mode", "decoding", "parts"),
    [
        ("thread", "ar", 7),
        ("thread", "jacobi", 1),
        ("thread", "cap1", 0),
        pytest.param("process", "ar", 7, marks=pytest.mark.slow),
    ],
)
def test_steps_that_are_certain_come_before_the_chunk(mode: str, decoding: str, parts: int) -> None:
    with running("student_all_tokens", mode=mode, decoding=decoding) as worker:
        request = Request(5, observation(), INSTRUCTION, stream=True)
        assert worker.submit(request)
        answers = [wait(worker)]
        while not answers[-1].whole:
            assert not worker.idle
            answers.append(wait(worker))
        assert worker.idle
        *early, whole = answers
        assert parts <= len(early) <= 7
        assert [len(one.actions) for one in early] == sorted({len(one.actions) for one in early})
        for one in early:
            np.testing.assert_array_equal(one.actions, whole.actions[: len(one.actions)])
            assert (one.id, one.error, one.forwards <= whole.forwards) == (5, None, True)
        again = ask(worker, replace(request, stream=False))  # without early parts
        np.testing.assert_array_equal(again.actions, whole.actions)
        # frozen steps that are copied, not decoded
        behind = replace(request, previous=whole.tokens, frozen_steps=1)
        assert ask(worker, behind).whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FRONT: None}, f"lacks '{FRONT}'; it has {WRIST}, {STATE}"),
        ({FRONT: np.zeros((96, 96, 3), np.float32)}, r"float32 \(96, 96, 3\), expected uint8"),
        ({FRONT: np.zeros((96, 96), np.uint8)}, r"expected uint8 \(H, W, 3\)"),
        ({STATE: np.full(14, np.nan, np.float32)}, "14 finite numbers"),
        ({STATE: np.zeros(9, np.float32)}, "14 finite numbers"),
    ],
)
def test_a_bad_observation_is_answered_and_the_worker_goes_on(
    worker: InferenceWorker, change: dict[str, Any], message: str
) -> None:
    bad = {key: value for key, value in {**observation(), **change}.items() if value is not None}
    answer = ask(worker, Request(3, bad, INSTRUCTION))
    assert answer.error is not None
    assert re.search(message, answer.error)
    assert answer.actions.shape == (0, 0)
    assert worker.failed is None
    assert ask(worker, Request(4, observation(), INSTRUCTION)).error is None


@pytest.mark.parametrize("text", ["  ", "%%% ???", "xyzzy plugh", "red " * 50])
def test_an_instruction_that_the_policy_does_not_take_is_told_from_other_errors(
    worker: InferenceWorker, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = ask(worker, Request(3, observation(), text))
    assert answer.error is not None
    assert len(answer.error) <= 200
    assert answer.code == "bad_instruction"
    bad = {**observation(), STATE: np.zeros(9, np.float32)}
    assert ask(worker, Request(4, bad, INSTRUCTION)).code == ""
    for _ in range(50):
        ask(worker, Request(5, observation(), text))
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert len(out + err) < 2000


def test_scores_that_are_not_finite_are_told_from_other_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise NotFiniteError("The scores are not finite.")

    with running("student", mode="thread", warmup=1) as worker:
        monkeypatch.setattr(worker._policy._predictor._policy, "decode", broken)  # type: ignore[union-attr]
        answer = ask(worker, Request(1, observation(), INSTRUCTION))
    assert (answer.error, answer.code) == ("The scores are not finite.", "not_finite")


def test_tokens_that_do_not_fit_are_answered(worker: InferenceWorker) -> None:
    answer = ask(worker, Request(3, observation(), INSTRUCTION, np.arange(5), 1, 1))
    assert answer.error is not None
    assert "previous chunk" in answer.error


def test_a_deadline_in_the_past_leaves_one_iteration() -> None:
    with running("student", mode="thread", decoding="jacobi") as strict:
        answer = ask(strict, Request(1, observation(), INSTRUCTION, deadline_s=1e-6))
        assert (answer.forwards, answer.exit_reason) == (1, "deadline")
        answer = ask(strict, Request(2, observation(), INSTRUCTION, deadline_s=1e6))
        assert answer.exit_reason == "converged"
        assert answer.forwards > 1


def test_ar_decodes_every_step_so_that_the_next_chunk_freezes_no_guess(
    policy: tuple[Any, Any, Any],
) -> None:
    with running("student", mode="thread", decoding="ar", replan_steps=2) as greedy:
        answer = ask(greedy, Request(1, observation(), INSTRUCTION, deadline_s=1e-6))
    assert answer.error is None
    assert (answer.forwards, answer.exit_reason) == (8 * A - 1, "complete")
    assert policy[0].decoding_config("ar") == DecodingConfig(method="ar")


def test_the_added_delay_is_part_of_the_time_and_ends_at_close() -> None:
    with running("student", mode="thread", warmup=1, delay_s=0.2) as slow:
        assert slow.spec.warmup_s >= 0.2
        assert slow.submit(Request(1, observation(), INSTRUCTION))
    assert not slow.idle
    assert not slow.submit(Request(2, observation(), INSTRUCTION))
    slow.close()


def test_an_unforeseen_error_beside_the_policy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with running("student", mode="thread", warmup=1) as worker:
        monkeypatch.setattr("ceed_vla.ros_nodes.robot.inference.decoded", lambda _: 1 / 0)
        assert worker.submit(Request(1, observation(), INSTRUCTION))
        answer = wait(worker)
        assert answer.error == worker.failed
        assert "ZeroDivisionError" in str(worker.failed)
        assert not worker.idle


# ---- processes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_stands_still_or_dies_never_blocks_the_control_loop() -> None:
    worker = InferenceWorker(local_policy("student", mode="process", warmup=1))
    assert load_error(worker) is None
    process = process_of(worker)
    assert process != os.getpid()
    os.kill(process, signal.SIGINT)  # Ctrl-C in a terminal reaches the child, which must ignore it
    os.kill(process, signal.SIGSTOP)
    # far more than a pipe holds
    assert worker.submit(Request(1, observation(side=1200), INSTRUCTION))
    assert worker.poll() is None
    os.kill(process, signal.SIGCONT)
    assert wait(worker).error is None
    os.kill(process, signal.SIGSTOP)
    assert worker.submit(Request(2, observation(), INSTRUCTION))
    os.kill(process, signal.SIGKILL)
    answer = wait(worker)
    assert answer.error == worker.failed == "The inference process ended (exit code -9)."
    assert not worker.idle
    assert not worker.submit(Request(3, observation(), INSTRUCTION))
    worker.close()


def test_a_process_that_stands_still_while_it_loads_is_killed_at_close() -> None:
    worker = InferenceWorker(local_policy("student", mode="process"))
    worker.begin()
    process = process_of(worker)
    os.kill(process, signal.SIGSTOP)
    time.sleep(0.5)
    assert not worker.ready
    worker.close(timeout_s=1.0)
    assert not alive(process)
    assert worker.failed is None  # it ended on request


@pytest.mark.slow
def test_the_process_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        "import time\n"
        "from workers import process_of, running\n"
        "with running('student', warmup=1) as worker:\n"
        "    print(process_of(worker), flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests' / 'helpers'}"}
    owner = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    pid = int(owner.stdout.readline().split()[-1])
    assert alive(pid)
    owner.kill()
    owner.wait()
    end = time.monotonic() + 20
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Return whether a process runs (an ended process counts as ended before it is reaped)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"
