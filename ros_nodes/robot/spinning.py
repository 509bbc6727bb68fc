"""Runs a node until SIGINT or SIGTERM without taking the ground from under its callbacks.

rclpy's own handlers shut the context down while a callback may be publishing, which then fails.
Here a signal only ends the loop: callbacks finish, and the node can still say something before it
goes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from ceed_vla.errors import CeedVLAError
from ceed_vla.ros_nodes.robot.texts import short

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_LARGEST_KEPT = 2**25  # blocks; the most that glibc takes [B]
_MOST_KEPT = 2**28  # of free memory [B]
# longest time between a signal and the end of the loop, without any message or timer [s]
_POLL = 0.2


def raise_priority(priority: int, *, only_this_thread: bool, second: int | None = None) -> str:
    """Let this process's threads go before all that run without real-time priority, as
    ros2_control's manager does.

    The thread `second` comes right behind them: commands do not wait for its work, and while it
    holds the interpreter's lock it does not wait for other processes. Threads and processes that
    are started later do not inherit it. The `priority` is of SCHED_FIFO, from 1 up; 0 leaves
    everything as it is. Returns how this thread is scheduled now, and why not better.
    """
    if not priority:
        return "normal"
    if not hasattr(os, "sched_setscheduler"):
        return "normal (this system has no SCHED_FIFO)"
    threads = [0] if only_this_thread else [int(name) for name in os.listdir("/proc/self/task")]
    try:
        for thread in threads:
            level = max(priority - 1, 1) if thread == second else priority
            with suppress(ProcessLookupError):  # it has ended since
                os.sched_setscheduler(
                    thread, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(level)
                )
    except OSError as error:
        return f"normal (no real-time priority: {error.strerror})"
    return f"fifo {priority}"


def keep_memory() -> None:
    """Let this process keep the memory that messages free, instead of returning it to the system.

    glibc returns large blocks at once and every page of the next message is faulted in anew: taking
    an image of 6 MB (1920 x 1080 pixels, raw) then takes 12 ms of the command thread instead of
    1.5. Other libraries have no such call.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_MMAP_THRESHOLD, _LARGEST_KEPT), (_TRIM_THRESHOLD, _MOST_KEPT)):
            mallopt(option, value)


def run(make_node: Callable[[], Node], name: str, arguments: Sequence[str] | None = None) -> int:
    """Make a node and spin it in this, the main thread.

    The executor is the single-threaded one by measurement: the multi-threaded one loses ticks (12 %
    of 100 Hz on two cores), and the events one has no guard conditions.

    `arguments` are the command line with the program's `name`; None takes `sys.argv`. Returns the
    exit code: 0, or 1 if the node cannot start; then one line says why.
    """
    received: list[int] = []
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # later ones cannot disturb the node's end either
        signal.signal(number, lambda number, _: received.append(number))
    rclpy.init(
        args=None if arguments is None else list(arguments),
        signal_handler_options=SignalHandlerOptions.NO,
    )
    node = None
    try:
        node = make_node()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        while not received and executor.context.ok():
            executor.spin_once(timeout_sec=_POLL)
    except (CeedVLAError, ParameterException) as error:
        print(f"{name}: error: {short(' '.join(str(error).split()), 1000)}", file=sys.stderr)
        return 1
    finally:
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return 0
