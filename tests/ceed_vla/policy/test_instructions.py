"""Instructions as word ids, and unreadable instructions."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from ceed_vla import CeedVLAPolicy
from ceed_vla.backbones.compact.words import InstructionWordsStep, make_instruction_step
from ceed_vla.errors import ConfigError, ObservationError

FRONT, WRIST, STATE = "observation.images.front", "observation.images.wrist", "observation.state"
TOKENS = "observation.language.tokens"
TASKS = ["put the red cube in the bin", "push the blue cube"]


@pytest.fixture
def words() -> InstructionWordsStep:
    return make_instruction_step(TASKS, 12, 256)


def test_words_become_ids(words: InstructionWordsStep, caplog: pytest.LogCaptureFixture) -> None:
    vocabulary = ["bin", "blue", "cube", "in", "push", "put", "red", "the"]
    assert words.vocabulary == vocabulary
    ids = words.encode("Put the RED cube, in the bin!")
    assert [vocabulary[i - 2] for i in ids[:7]] == ["put", "the", "red", "cube", "in", "the", "bin"]
    assert ids[7:] == [0] * 5
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        assert words.encode("put the mug in the mug")[:6] == [7, 9, 1, 5, 9, 1]
    assert caplog.text.count("'mug'") == 1  # logged once


@pytest.mark.parametrize(
    ("task", "message"),
    [("", "for any number of rows"), (" ?! ", "has no word"), ("go " * 13, "13 words")],
)
def test_an_instruction_that_cannot_be_read(
    processors: tuple[Any, Any], task: str, message: str, raw_observation: Any
) -> None:
    with pytest.raises(ObservationError, match=message):
        processors[0]({**raw_observation(), "task": [TASKS[0], task]})


def test_no_instruction(processors: tuple[Any, Any], raw_observation: Any) -> None:
    observation = raw_observation()
    del observation["task"]
    with pytest.raises(ObservationError, match="instructions None"):
        processors[0](observation)


def test_one_observation_without_a_batch_dimension(
    policy: CeedVLAPolicy, processors: tuple[Any, Any], raw_observation: Any
) -> None:
    observation = raw_observation()
    one = processors[0]({**{k: observation[k][0] for k in (FRONT, WRIST, STATE)}, "task": TASKS[0]})
    assert one[TOKENS].shape == (1, 12)
    expected = policy.decode(processors[0](observation), "ar").tokens[:1]
    assert torch.equal(policy.decode(one, "ar").tokens, expected)


def test_one_instruction_serves_a_batch(processors: tuple[Any, Any], raw_observation: Any) -> None:
    batch = processors[0]({**raw_observation(3), "task": TASKS[1]})
    assert batch[TOKENS].shape == (3, 12)
    assert (batch[TOKENS] == batch[TOKENS][0]).all()


def test_instructions_that_do_not_fit_the_configuration() -> None:
    with pytest.raises(ConfigError, match="max_instruction_words is 3"):
        make_instruction_step(TASKS, 3, 256)
    with pytest.raises(ConfigError, match="holds 7"):
        make_instruction_step(TASKS, 12, 9)
    with pytest.raises(ConfigError, match=r"'\.\.\.' has no word"):
        make_instruction_step([*TASKS, "..."], 12, 256)
    with pytest.raises(ConfigError, match="There is no instruction"):
        make_instruction_step([], 12, 256)
