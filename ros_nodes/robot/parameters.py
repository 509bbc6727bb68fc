"""Parameters of a node: their declaration with ranges, and the refusal of invalid values."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.node import Node
from rclpy.parameter import Parameter

from ceed_vla.errors import ConfigError
from ceed_vla.fields import Allowed, Interval, describe, fits
from ceed_vla.texts import short, shown

START = "start"
SETUP = "setup"
LIVE = "live"
"""Times at which a parameter may change: only at the start (read-only), while a lifecycle node is
unconfigured, or always.
"""


@dataclass(frozen=True)
class NodeParameter:
    name: str
    default: Any  # sets the type (an integer is accepted for a float)
    description: str  # with its unit
    when: str = SETUP
    within: tuple[float, float] = (0, 0)  # smallest and largest number; (0, 0): any
    choices: Collection[str] = ()  # allowed texts; any if empty
    # returns what is wrong with a text; None if it is valid
    check: Callable[[str], str | None] = lambda _: None

    @property
    def values(self) -> Allowed | None:
        """The allowed texts or numbers; None if all values of its type are allowed."""
        numbers = (
            Interval(f"[{self.within[0]:g}, {self.within[1]:.10g}]") if any(self.within) else None
        )
        return tuple(self.choices) or numbers

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        return describe(type(self.default), self.values)

    @property
    def descriptor(self) -> ParameterDescriptor:
        """The ROS descriptor of the parameter.

        Typing is dynamic because ROS would refuse `command_rate:=100` for a float; `problem` checks
        types instead.
        """
        kind = type(self.default)
        ends = dict(zip(("from_value", "to_value"), map(kind, self.within), strict=True))
        return ParameterDescriptor(
            description=self.description,
            additional_constraints=self.allowed,
            read_only=self.when == START,
            dynamic_typing=True,
            integer_range=[IntegerRange(**ends)] if kind is int and any(self.within) else [],
            floating_point_range=(
                [FloatingPointRange(**ends)] if kind is float and any(self.within) else []
            ),
        )

    def problem(self, value: Any) -> str | None:
        """Return why `value` is refused; None if it is allowed."""
        if not fits(value, type(self.default), self.values):
            return f"{self.name} is {shown(value)}; it must be {self.allowed}."
        wrong = self.check(value) if isinstance(value, str) else None
        return f"{self.name} is invalid: {wrong}." if wrong else None


Table = Sequence[NodeParameter]


def declare_parameters(node: Node, table: Table) -> None:
    """Declare all parameters of a table.

    `ConfigError`: A value set at the start is not allowed.
    """
    for parameter in table:
        # with ranges in the descriptor, rclpy would refuse with its own message
        untyped = ParameterDescriptor(dynamic_typing=True)
        problem = parameter.problem(
            node.declare_parameter(parameter.name, parameter.default, untyped).value
        )
        if problem:
            raise ConfigError(f"Parameter {problem}")
        node.set_descriptor(parameter.name, parameter.descriptor)


def refuse_unknown(node: Node) -> None:
    """Refuse values for parameters that the node does not have; call it after their declaration.

    `ConfigError`: A parameter is unknown; the message has the closest existing names.
    """
    overrides = node._parameter_overrides  # rclpy has no public access to the command line's values
    unknown = [
        n for n in overrides if not node.has_parameter(n) and not n.startswith("qos_overrides.")
    ]
    if not unknown:
        return
    known = sorted(name for name in node._parameters if not name.startswith("qos_overrides."))
    near = difflib.get_close_matches(unknown[0], known, n=3) or known
    raise ConfigError(
        f"Parameter {shown(unknown[0])} is unknown to the node {node.get_name()}; it has "
        f"{short(', '.join(near))}. Correct the name, or remove it."
    )


def refusal(table: Table, changes: Iterable[Parameter], *, configured: bool) -> SetParametersResult:
    """Return whether new values are allowed now, for `Node.add_on_set_parameters_callback`."""
    by_name = {parameter.name: parameter for parameter in table}
    for change in changes:
        known = by_name.get(change.name)
        reason = known.problem(change.value) if known is not None else None
        if change.name == "use_sim_time":
            reason = "use_sim_time can be set only at the start."
        elif reason is None and known is not None and configured and known.when == SETUP:
            reason = (
                f"{known.name} can change only while the node is unconfigured: deactivate and "
                "clean up first."
            )
        if reason is not None:
            return SetParametersResult(successful=False, reason=reason)
    return SetParametersResult(successful=True)


def defaults(table: Table) -> dict[str, Any]:
    """Return the default values of all parameters of a table."""
    return {parameter.name: parameter.default for parameter in table}


def values(node: Node, table: Table) -> dict[str, Any]:
    """Return the values of all parameters of a table, converted to their types."""
    return {p.name: type(p.default)(node.get_parameter(p.name).value) for p in table}
