"""Runs a node until SIGINT or SIGTERM without taking the ground from under its callbacks.

rclpy's own handlers shut the context down while a callback may be publishing, which then fails. Here a signal only ends
the loop: callbacks finish, and the node can still say something before it goes.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import Executor, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from ceed_vla.errors import CeedVLAError

_POLL = 0.2  # longest time between a signal and the end of the loop, without any message or timer [s]


class StopSignal:
    """Catches SIGINT and SIGTERM from its construction on; later ones cannot disturb the node's end either.

    Attributes:
        received: Whether one came.
    """

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, *_: Any) -> None:
        self.received = True


def run(
    make_node: Callable[[], Node],
    name: str,
    arguments: Sequence[str] | None = None,
    make_executor: Callable[[], Executor] = SingleThreadedExecutor,
    stop: StopSignal | None = None,
) -> int:
    """Make a node and spin it in this, the main thread.

    Args:
        make_node: Called once ROS is initialised.
        name: The program's, for error messages.
        arguments: Command line with the program's name; None takes `sys.argv`.
        make_executor: Makes the executor.
        stop: Ends the loop; its own if None.

    Returns:
        Exit code: 0, or 1 if the node cannot start; then one line says why.
    """
    stop = stop or StopSignal()
    rclpy.init(
        args=None if arguments is None else list(arguments), signal_handler_options=SignalHandlerOptions.NO
    )
    node = None
    try:
        node = make_node()
        executor = make_executor()
        executor.add_node(node)
        while not stop.received and executor.context.ok():
            executor.spin_once(timeout_sec=_POLL)
    except (CeedVLAError, ParameterException) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return 0
