"""The policy node's parameters: declared with ranges and reasons, refused with the valid ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from ceed_vla.errors import ConfigError
from ros_nodes.robot_config import INTERFACES

START, SETUP, LIVE = "start", "setup", "live"
"""When a parameter may change: only at the start (read-only), while the node is unconfigured, or always."""


@dataclass(frozen=True)
class PolicyParameter:
    """One parameter.

    Attributes:
        name: Its name.
        default: Its default, whose type it keeps (a whole number is taken for a float).
        description: What it does, with its unit.
        when: `START`, `SETUP` or `LIVE`.
        low: Smallest number.
        high: Largest number.
        choices: Allowed texts; any if empty.
    """

    name: str
    default: Any
    description: str
    when: str = SETUP
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    @property
    def is_number(self) -> bool:
        """Whether it has a range."""
        return isinstance(self.default, int | float) and not isinstance(self.default, bool)

    @property
    def allowed(self) -> str:
        """What may be set, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.is_number:
            whole = "a whole number" if isinstance(self.default, int) else "a number"
            return f"{whole} in [{self.low:g}, {self.high:g}]"
        return "true or false" if isinstance(self.default, bool) else "a text"

    @property
    def descriptor(self) -> ParameterDescriptor:
        """The same for ROS.

        Typing is dynamic because ROS would refuse `command_rate:=100` for a float; `problem` checks types instead.
        """
        descriptor = ParameterDescriptor(
            description=self.description,
            additional_constraints=self.allowed,
            read_only=self.when == START,
            dynamic_typing=True,
        )
        if self.is_number:
            if isinstance(self.default, int):
                descriptor.integer_range = [IntegerRange(from_value=int(self.low), to_value=int(self.high))]
            else:
                descriptor.floating_point_range = [
                    FloatingPointRange(from_value=self.low, to_value=self.high)
                ]
        return descriptor

    def problem(self, value: Any) -> str | None:
        """Why `value` is refused; None if it is allowed."""
        kinds: tuple[type, ...] = (int, float) if isinstance(self.default, float) else (type(self.default),)
        fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(self.default, bool)
        if fits and self.choices:
            fits = value in self.choices
        elif fits and self.is_number:
            fits = self.low <= value <= self.high
        return None if fits else f"{self.name} is {value!r}; it must be {self.allowed}."


PARAMETERS = (
    PolicyParameter(
        "checkpoint", "student", "LeRobot checkpoint folder, or teacher or student for the shipped ones."
    ),
    PolicyParameter(
        "robot_config", "", "Robot's YAML file (topics, joints, limits); empty: the simulated arm's."
    ),
    PolicyParameter(
        "action_interface", "forward_position", "How commands reach the arm.", choices=INTERFACES
    ),
    PolicyParameter("instruction", "", "What to do; ~/instruction sets it too, the last one counts.", LIVE),
    PolicyParameter(
        "autostart", False, "Configure and activate at the start, without a lifecycle manager.", START
    ),
    PolicyParameter(
        "start_enabled", True, "Enable motion when activated; false: wait for ~/enable (dry run)."
    ),
    PolicyParameter(
        "command_rate",
        100.0,
        "Commands per second [Hz]; a multiple of the robot's steps per second.",
        low=5.0,
        high=500.0,
    ),
    PolicyParameter(
        "replan_steps",
        0,
        "Steps after which the next chunk is due; 0: the checkpoint's n_action_steps.",
        low=0,
        high=64,
    ),
    PolicyParameter("decoding", "ceed", "How CEED-VLA checkpoints decode.", choices=("ceed", "jacobi", "ar")),
    PolicyParameter("device", "cpu", "Where the policy runs: cpu, cuda, cuda:1, mps."),
    PolicyParameter("inference_mode", "process", "Where inference runs.", choices=("process", "thread")),
    PolicyParameter("inference_threads", 1, "Threads of inference on the CPU.", low=1, high=64),
    PolicyParameter(
        "inference_delay", 0.0, "Slows every chunk, to test slow inference [s].", low=0.0, high=5.0
    ),
    PolicyParameter(
        "realtime_priority",
        50,
        "SCHED_FIFO priority of the command stream where the system allows it; 0: none.",
        low=0,
        high=90,
    ),
    PolicyParameter("image_timeout", 0.5, "Age of an image at which the arm holds [s].", START, 0.02, 5.0),
    PolicyParameter(
        "joint_state_timeout", 0.2, "Age of the joint states at which the arm holds [s].", START, 0.02, 2.0
    ),
    PolicyParameter(
        "max_joint_velocity",
        10.0,
        "Velocity limit of every joint; the robot's own if lower [rad/s].",
        START,
        0.01,
        10.0,
    ),
    PolicyParameter(
        "max_joint_step",
        1.0,
        "Largest distance of a command from the measured position; the robot's own if lower [rad].",
        START,
        0.001,
        1.0,
    ),
)
_BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


def declare_parameters(node: Node) -> None:
    """Declare all parameters and refuse bad values from then on.

    Raises:
        ConfigError: A value given at the start is not allowed.
    """
    for parameter in PARAMETERS:
        untyped = ParameterDescriptor(dynamic_typing=True)  # with its ranges, rclpy would word the refusal
        problem = parameter.problem(node.declare_parameter(parameter.name, parameter.default, untyped).value)
        if problem:
            raise ConfigError(f"Parameter {problem}")
        node.set_descriptor(parameter.name, parameter.descriptor)


def refusal(parameters: Iterable[Parameter], *, configured: bool) -> SetParametersResult:
    """Whether parameters may take new values now; for `Node.add_on_set_parameters_callback`."""
    for parameter in parameters:
        known = _BY_NAME.get(parameter.name)
        if known is None:
            continue  # use_sim_time and the like
        reason = known.problem(parameter.value)
        if reason is None and configured and known.when == SETUP:
            reason = (
                f"{known.name} can change only while the node is unconfigured: deactivate and clean up first."
            )
        if reason is not None:
            return SetParametersResult(successful=False, reason=reason)
    return SetParametersResult(successful=True)


def values(node: Node) -> dict[str, Any]:
    """All parameters' values, floats as floats."""
    return {
        name: type(parameter.default)(node.get_parameter(name).value) for name, parameter in _BY_NAME.items()
    }
