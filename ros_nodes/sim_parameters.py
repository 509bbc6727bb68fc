"""Parameters of the simulated robot: defaults, ranges and what they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node

from sim.tabletop.scene import MAX_IMAGE_SIZE
from sim.tabletop.tasks import SPLITS, TASKS


@dataclass(frozen=True)
class SimParameter:
    """One parameter.

    Attributes:
        name: Its name.
        default: Its value unless it is set; also fixes its type.
        description: What it does, with its unit.
        low: Smallest value of a number.
        high: Largest value of a number.
        read_only: Whether it can be set only at the start.
    """

    name: str
    default: Any
    description: str
    low: float | None = None
    high: float | None = None
    read_only: bool = False

    def descriptor(self) -> ParameterDescriptor:
        """The same for ROS."""
        descriptor = ParameterDescriptor(description=self.description, read_only=self.read_only)
        if isinstance(self.default, float):
            descriptor.floating_point_range = [FloatingPointRange(from_value=self.low, to_value=self.high)]
        elif isinstance(self.default, int) and not isinstance(self.default, bool):
            descriptor.integer_range = [IntegerRange(from_value=self.low, to_value=self.high)]
        return descriptor


SIM_PARAMETERS = (
    SimParameter("task", "mixed", f"Task family of the next episode: mixed, {', '.join(TASKS)}."),
    SimParameter("seed", 0, "Seed of the next episode; it decides everything.", 0, 2**31 - 1),
    SimParameter("advance_seed", False, "Add 1 to the seed before every reset."),
    SimParameter(
        "split", "train", f"Combinations of colours and phrasings: {', '.join(SPLITS)}.", read_only=True
    ),
    SimParameter("camera_rate", 30.0, "Images per second of every camera [Hz].", 1.0, 60.0),
    SimParameter("image_size", 96, "Side of the images [px].", 16, MAX_IMAGE_SIZE, read_only=True),
    SimParameter(
        "command_timeout",
        0.05,
        "How long a position command or a twist lasts before the arm stops [s].",
        0.02,
        1.0,
        read_only=True,
    ),
    SimParameter("publish_instruction", True, "Publish the episode's instruction for the policy node."),
    SimParameter(
        "publish_clock",
        False,
        "Publish /clock and stamp with it; other nodes need use_sim_time.",
        read_only=True,
    ),
    SimParameter(
        "real_time_factor",
        1.0,
        "Simulated per real seconds; other values than 1 need publish_clock.",
        0.1,
        20.0,
        read_only=True,
    ),
)


def declare_parameters(node: Node) -> dict[str, Any]:
    """Declare all parameters; returns their values at the start."""
    return {
        parameter.name: node.declare_parameter(
            parameter.name, parameter.default, parameter.descriptor()
        ).value
        for parameter in SIM_PARAMETERS
    }
