"""Requests that are decoded together get the tokens that each gets alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from lerobot.processor import DeviceProcessorStep
from lerobot.processor.relative_action_processor import AbsoluteActionsProcessorStep

from ceed_vla.serving import served_checkpoint
from ceed_vla.serving.client import PolicyClient
from ceed_vla.serving.predictor import (
    BAD_INSTRUCTION,
    Predictor,
    PredictorSettings,
    Request,
    declared_spec,
)
from ceed_vla.serving.served_checkpoint import load_policy
from tests.ceed_vla.serving.conftest import STARTUP_SECONDS, Served
from tests.helpers.worker_requests import INSTRUCTION, STATE, observation

WORDS = (INSTRUCTION, "stack the green cube on the blue cube", "push the red cube to the left")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(PredictorSettings("student"))


def requests(count: int, first: int = 0) -> list[Request]:
    return [
        Request(number, observation(number), WORDS[number % len(WORDS)])
        for number in range(first, first + count)
    ]


def check_equal(predictor: Predictor, asked: list[Request]) -> None:
    together = predictor.predict_together([(request, None) for request in asked])
    for request, answer in zip(asked, together, strict=True):
        alone = predictor.predict(request)
        assert (answer.id, answer.error) == (request.id, alone.error)
        np.testing.assert_array_equal(answer.tokens, alone.tokens)
        np.testing.assert_array_equal(answer.actions, alone.actions)
        assert (answer.forwards, answer.exit_reason) == (alone.forwards, alone.exit_reason)


@pytest.mark.parametrize("decoding", ["ceed", "jacobi", "ar", "cap2"])
def test_cold_and_warm_chunks(predictor: Predictor, decoding: str) -> None:
    asked = [replace(request, decoding=decoding) for request in requests(5)]
    check_equal(predictor, asked)
    before = [predictor.predict(request).tokens for request in asked]
    warm = [
        replace(request, observation=observation(100 + i), previous=tokens, shift_steps=2)
        for i, (request, tokens) in enumerate(zip(asked, before, strict=True))
    ]
    check_equal(predictor, warm)
    check_equal(predictor, [replace(one, frozen_steps=2, executed_steps=3) for one in warm])


def test_one_bad_request_fails_alone(predictor: Predictor) -> None:
    good, bad, other = requests(3)
    bad = replace(bad, instruction="xyzzy plugh")
    first, second, third = predictor.predict_together([(one, None) for one in (good, bad, other)])
    assert (first.error, second.code, third.error) == (None, BAD_INSTRUCTION, None)


def test_a_device_that_fails_is_not_the_instructions_fault(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (request,) = requests(1)

    def lost(step: DeviceProcessorStep, transition: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(DeviceProcessorStep, "__call__", lost)
        answer = predictor.predict(request)
        assert answer.error is not None
        assert "illegal memory access" in answer.error
        assert (answer.code, predictor.failures) == ("", 1)
    for instruction in ("xyzzy plugh", "put " * 200):
        assert predictor.predict(replace(request, instruction=instruction)).code == BAD_INSTRUCTION
    assert predictor.failures == 1
    assert predictor.predict(request).error is None
    assert predictor.failures == 0


def test_states_are_numbers_of_any_precision(predictor: Predictor) -> None:
    (request,) = requests(1)
    state = request.observation[STATE]
    usual = predictor.predict(request)
    wide = replace(request, observation={**request.observation, STATE: state.astype(np.longdouble)})
    np.testing.assert_array_equal(predictor.predict(wide).tokens, usual.tokens)
    for wrong in (state > 0, np.full(len(state), 1e39), state.astype(str)):
        asked = replace(request, observation={**request.observation, STATE: wrong})
        error = predictor.predict(asked).error
        assert error is not None
        assert "finite numbers" in error
    assert predictor.failures == 0


@pytest.mark.parametrize("decoding", ["cap2_random", "deadline12", "ngram8", "no such decoder"])
def test_decoders_whose_rows_depend_on_each_other_are_not_joined(
    predictor: Predictor, decoding: str
) -> None:
    assert not predictor._joins(decoding)
    assert predictor._joins("ceed")


def test_actions_relative_to_the_state_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of their processor adds the state that was read last, of any row."""

    def relative(settings: PredictorSettings, kind: str) -> Any:
        policy, before, after = load_policy(settings, kind)
        after.steps = [*after.steps, AbsoluteActionsProcessorStep(enabled=True)]
        return policy, before, after

    monkeypatch.setattr(served_checkpoint, "load_policy", relative)
    settings = PredictorSettings("student")
    served = served_checkpoint.ServedCeed(settings, declared_spec("student"))
    assert not served.joins


@pytest.mark.slow
def test_clients_of_one_server_get_what_each_gets_alone(
    serving: Callable[..., Served], predictor: Predictor
) -> None:
    served = serving("--max_batch=4", "--max_wait_ms=20")
    wrong: list[str] = []

    def work(place: int) -> None:
        asked = requests(6, first=10 * place)
        with PolicyClient(served.url, timeout_s=30.0, connect_s=STARTUP_SECONDS) as client:
            for request in asked:
                answer = client.predict(request)
                if answer.tokens is None or answer.tokens.tolist() != wanted[request.id]:
                    wrong.append(f"{place}: {request.id}")

    wanted = {
        request.id: predictor.predict(request).tokens.tolist()  # type: ignore[union-attr]
        for place in range(6)
        for request in requests(6, first=10 * place)
    }
    threads = [threading.Thread(target=work, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert wrong == []
