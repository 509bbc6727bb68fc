"""Joint states that arrive in several messages, each with its own stamp."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from sensor_msgs.msg import JointState

from ceed_vla.ros_nodes.robot.joint_table import JointTable
from ceed_vla.ros_nodes.robot.pose_trust import by_name
from tests.ros_nodes.loop import stamp


def state(now: float, **positions: float) -> JointState:
    message = JointState(name=list(positions), position=list(positions.values()))
    message.header.stamp = stamp(now)
    return message


def test_the_newest_of_every_joint_counts() -> None:
    table = JointTable(("a", "b", "finger"))
    first, stamps = table.take(state(1.0, a=0.1, b=0.2))
    assert (list(first.name), stamps) == (["a", "b"], [1.0, 1.0])
    both, stamps = table.take(state(1.5, finger=0.3, other=9.0))
    assert dict(zip(both.name, both.position, strict=True)) == {"a": 0.1, "b": 0.2, "finger": 0.3}
    assert stamps == [1.0, 1.0, 1.5]
    assert both.header.stamp == stamp(1.0)
    both, stamps = table.take(state(2.0, b=0.5, a=0.4))
    assert dict(zip(both.name, both.position, strict=True)) == {"a": 0.4, "b": 0.5, "finger": 0.3}
    assert (stamps, table.lacks) == ([2.0, 2.0, 1.5], "The joint state lacks finger; it has b, a.")
    table.forget()
    assert list(table.take(state(3.0, finger=0.0))[0].name) == ["finger"]


def test_velocities_and_efforts_are_merged_and_nan_where_a_driver_gives_none() -> None:
    table = JointTable(("a", "b"))
    one, other = state(1.0, a=0.1), state(1.0, b=0.2)
    one.velocity, one.effort, other.velocity = [1.0], [5.0], [2.0]
    table.take(one)
    merged, _ = table.take(other)
    assert list(merged.velocity) == [1.0, 2.0]
    # the message of a gripper's driver does not change the arm's values
    np.testing.assert_array_equal(merged.effort, [5.0, np.nan])
    by_name(list(merged.name), merged.effort, ["a"], "efforts")


def test_messages_that_contradict_themselves_come_back_and_change_nothing() -> None:
    table = JointTable(("a", "b"))
    table.take(state(1.0, a=0.1, b=0.2))
    for names, positions in ((["a", "a"], [1.0, 2.0]), (["a"], []), (["a"], [1.0, 2.0])):
        broken = JointState(name=names, position=positions)
        assert table.take(broken)[0] is broken
    merged, _ = table.take(state(2.0, c=1.0))
    assert dict(zip(merged.name, merged.position, strict=True)) == {"a": 0.1, "b": 0.2}
    strange = JointTable(("a",))
    foreign = state(1.0, c=1.0)
    assert strange.take(foreign)[0] is foreign  # no joint is known yet, so it is returned unchanged
