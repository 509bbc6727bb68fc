"""Parameters: every default is allowed, bad values are refused with the valid ones, limits are
read-only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("rclpy")

import rclpy
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot import parameters
from ceed_vla.ros_nodes.robot.parameters import NodeParameter
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.simulated.parameters import SIM_PARAMETERS

BAD = [
    (
        "command_rate",
        1e9,
        r"command_rate is 1000000000.0; it must be a finite number in \[20, 500\]",
    ),
    ("command_rate", float("nan"), r"\[20, 500\]"),
    ("command_rate", "fast", r"\[20, 500\]"),
    ("command_rate", True, r"\[20, 500\]"),
    ("replan_steps", -1, r"a whole number in \[0, 64\]"),
    ("replan_steps", 2.5, "a whole number"),
    ("action_interface", "wheels", "one of forward_position, joint_trajectory, servo_twist"),
    ("decoding", 3, "a string"),
    ("start_enabled", "yes", "true or false"),
    ("instruction", 5, "a string"),
]


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = Context()
    rclpy.init(context=context, domain_id=10 + os.getpid() % 90)
    yield context
    rclpy.try_shutdown(context=context)


def make_node(context: Context, **overrides: Any) -> Node:
    given = [Parameter(name, value=value) for name, value in overrides.items()]
    return Node("policy", context=context, parameter_overrides=given)


def test_descriptors_say_what_is_allowed(context: Context) -> None:
    node = make_node(context)
    parameters.declare_parameters(node, POLICY_PARAMETERS)
    assert parameters.values(node, POLICY_PARAMETERS) == {
        parameter.name: parameter.default for parameter in POLICY_PARAMETERS
    }
    rate = node.describe_parameter("command_rate")
    assert (rate.floating_point_range[0].from_value, rate.floating_point_range[0].to_value) == (
        20.0,
        500.0,
    )
    assert "[Hz]" in rate.description
    assert node.describe_parameter("inference_threads").integer_range[0].to_value == 64
    constraints = node.describe_parameter("action_interface").additional_constraints
    assert constraints == "one of forward_position, joint_trajectory, servo_twist"


def test_whole_numbers_are_taken_for_floats(context: Context) -> None:
    node = make_node(context, command_rate=50)
    parameters.declare_parameters(node, POLICY_PARAMETERS)
    assert parameters.values(node, POLICY_PARAMETERS)["command_rate"] == 50.0
    assert isinstance(parameters.values(node, POLICY_PARAMETERS)["command_rate"], float)


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_values_are_refused(context: Context, name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parameters.declare_parameters(make_node(context, **{name: value}), POLICY_PARAMETERS)
    result = parameters.refusal(POLICY_PARAMETERS, [Parameter(name, value=value)], configured=False)
    assert not result.successful
    assert re.search(message, result.reason)


def test_setup_changes_only_while_unconfigured() -> None:
    change = [Parameter("checkpoint", value="teacher")]
    assert parameters.refusal(POLICY_PARAMETERS, change, configured=False).successful
    result = parameters.refusal(POLICY_PARAMETERS, change, configured=True)
    assert not result.successful
    assert "deactivate and clean up first" in result.reason
    assert parameters.refusal(
        POLICY_PARAMETERS, [Parameter("instruction", value="stop")], configured=True
    ).successful
    result = parameters.refusal(
        POLICY_PARAMETERS, [Parameter("use_sim_time", value=True)], configured=False
    )
    assert "only at the start" in result.reason


@pytest.mark.parametrize(
    "name", ["image_timeout", "joint_state_timeout", "max_joint_velocity", "max_joint_step"]
)
def test_safety_limits_are_read_only(context: Context, name: str) -> None:
    node = make_node(context)
    parameters.declare_parameters(node, POLICY_PARAMETERS)
    (result,) = node.set_parameters([Parameter(name, value=0.5)])
    assert not result.successful
    assert "read-only" in result.reason


@pytest.mark.parametrize(
    "parameter", POLICY_PARAMETERS + SIM_PARAMETERS, ids=lambda parameter: parameter.name
)
def test_every_parameter_is_described(parameter: NodeParameter) -> None:
    assert parameter.problem(parameter.default) is None
    assert parameter.description.endswith(".")
    assert parameter.when in (parameters.START, parameters.SETUP, parameters.LIVE)
    assert type(parameter.default) not in (int, float) or parameter.within[0] < parameter.within[1]


def test_a_parameter_that_the_node_does_not_have_is_refused(context: Context) -> None:
    node = make_node(context, comand_rate=50.0)
    parameters.declare_parameters(node, POLICY_PARAMETERS)
    with pytest.raises(
        ConfigError, match="'comand_rate' is unknown to the node policy; it has command_rate"
    ):
        parameters.refuse_unknown(node)
    node = make_node(context, command_rate=50.0, use_sim_time=True)
    parameters.declare_parameters(node, POLICY_PARAMETERS)
    parameters.refuse_unknown(node)
