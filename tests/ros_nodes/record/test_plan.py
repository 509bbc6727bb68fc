"""What a recording stores: the robot's features, or those of a policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.record.plan import Plan, make_plan
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from ceed_vla.serving.predictor import declared_spec
from ceed_vla.serving.predictor_types import PolicySpec

ROBOT = load_robot_config()
NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")


def plan(spec: PolicySpec | None) -> Plan:
    return make_plan(ROBOT, spec, root=Path("data"), format="png", resume=False)


def test_without_a_policy_all_of_the_robots_file_is_stored() -> None:
    made = plan(None)
    assert made.action_names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert set(made.cameras) == {"observation.images.front", "observation.images.wrist"}
    assert all(camera.size is None for camera in made.cameras.values())
    assert (made.fps, made.states) == (10, {"observation.state": 14})


def test_with_a_policy_sizes_and_names_are_those_of_its_data() -> None:
    spec = replace(declared_spec("student"), action_names=NAMES)
    made = plan(spec)
    assert made.action_names == NAMES  # else training would refuse both together
    assert {camera.size for camera in made.cameras.values()} == {(96, 96)}
    assert plan(replace(spec, action_names=())).action_names == plan(None).action_names
    with pytest.raises(ConfigError, match="have 6 dimensions"):
        plan(replace(spec, action_dim=6))
    with pytest.raises(ConfigError, match=r"lacks observation\.images\.top"):
        plan(replace(spec, cameras={"observation.images.top": (3, 96, 96)}))
