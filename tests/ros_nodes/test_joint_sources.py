"""Publishers of joint states are told apart by the numbers of their messages."""

from __future__ import annotations

import pytest

from ceed_vla.ros_nodes.robot.joint_sources import MEMORY, JointSources

ARM = ("shoulder", "elbow")
HAND = ("finger",)


def feed(sources: JointSources, messages: list[tuple[tuple[str, ...], int | None]]) -> list[str]:
    """Take messages, one every 10 ms; return the joints whose publishers restarted."""
    restarted = [
        sources.take(names, number, 0.01 * at) for at, (names, number) in enumerate(messages)
    ]
    return [name for name in restarted if name]


def test_one_publisher_is_no_conflict_even_where_messages_overtake_each_other_or_are_lost() -> None:
    sources = JointSources((*ARM, *HAND))
    numbers = [1, 2, 4, 3, 5, 9, 8, 10, 400, 401]
    assert feed(sources, [((*ARM, *HAND), number) for number in numbers]) == []
    assert sources.shared(2, 0.1) == []


def test_arm_and_gripper_of_their_own_are_no_conflict() -> None:
    sources = JointSources((*ARM, *HAND))
    messages: list[tuple[tuple[str, ...], int | None]] = []
    for step in range(50):
        messages += [(ARM, 500 + step), (HAND, 3 + step)]
    assert feed(sources, messages) == []
    assert sources.shared(2, 1.0) == []


@pytest.mark.parametrize("first", [1, 490, 500, 501, 9000])
def test_two_publishers_of_the_same_joint_are_found_whatever_their_numbers(first: int) -> None:
    sources = JointSources((*ARM, *HAND))
    messages: list[tuple[tuple[str, ...], int | None]] = []
    for step in range(10):
        messages += [((*ARM, *HAND), 500 + step), (("elbow", "other"), first + step)]
    feed(sources, messages)
    assert sources.shared(2, 0.2) == ["elbow"]
    assert sources.shared(1, 0.2) == []
    assert sources.shared(2, 0.2 + MEMORY) == []


def test_a_publisher_that_begins_anew_has_restarted() -> None:
    sources = JointSources(ARM)
    numbers = [*range(100, 150), *range(1, 50)]
    assert feed(sources, [(ARM, number) for number in numbers]) == ["elbow"]
    assert sources.shared(2, 1.0) == []  # the graph may still contain the killed publisher


def test_without_numbers_only_disjoint_publishers_can_be_told_apart() -> None:
    sources = JointSources((*ARM, *HAND))
    feed(sources, [(ARM, None), (HAND, None)] * 5)
    assert sources.shared(2, 0.1) == []
    assert sources.shared(3, 0.1) == ["elbow", "finger", "shoulder"]
    sources = JointSources(ARM)
    feed(sources, [(ARM, None)] * 5)
    assert sources.shared(1, 0.1) == []
    assert sources.shared(2, 0.1) == ["elbow", "shoulder"]
    sources = JointSources((*ARM, *HAND))  # of two arms, each with its topic
    for topic, names in (("left", ARM), ("right", HAND)):
        sources.take(names, None, 0.0, topic)
    assert sources.shared(2, 0.1, "left") == ["elbow", "shoulder"]
    assert sources.shared(1, 0.1, "right") == []
