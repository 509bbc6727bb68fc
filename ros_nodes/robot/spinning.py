"""Runs a node until SIGINT or SIGTERM, and ends it without interrupting its callbacks.

rclpy's own signal handlers shut the context down while a callback may be publishing, which then
fails. Here a signal only ends the loop: callbacks finish, and the node can still publish before it
is destroyed.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from ceed_vla.errors import CeedVLAError
from ceed_vla.texts import short

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_LARGEST_BLOCK = 2**25  # largest block that is not returned; glibc's maximum [B]
_MOST_FREE = 2**28  # largest amount of free memory that is not returned [B]
# longest time between a signal and the end of the loop if no message or timer comes [s]
_POLL = 0.2


def keep_memory() -> None:
    """Let this process retain the memory that messages free, instead of returning it to the system.

    glibc returns large blocks at once, and then every page of the next message is faulted in again:
    taking an image of 6 MB (1920 x 1080 pixels, raw) then takes 12 ms of the command thread instead
    of 1.5. Other C libraries have no such call.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_MMAP_THRESHOLD, _LARGEST_BLOCK), (_TRIM_THRESHOLD, _MOST_FREE)):
            mallopt(option, value)


def run(make_node: Callable[[], Node], name: str, arguments: Sequence[str] | None = None) -> int:
    """Create a node and spin it in the calling thread, which must be the main thread.

    Measurements chose the single-threaded executor: the multi-threaded one loses ticks (12 % of
    100 Hz on two cores), and the events executor has no guard conditions.

    Args:
        make_node: Creates the node.
        name: Name of the program in error messages.
        arguments: Command line with the program's name; None uses `sys.argv`.

    Returns:
        The exit code: 0, or 1 if the node cannot start; one line on stderr then has the reason.
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


def end_process(code: int) -> NoReturn:
    """End this process after its node has ended, without the destructors of native libraries.

    The middleware's threads run beside those destructors: of 230 policy nodes with ONNX Runtime in
    the same process, one crashed after its node and Python had ended.

    Args:
        code: The exit code.
    """
    atexit._run_exitfuncs()  # what Python itself does at an exit
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # none, or its reader is gone
            stream.flush()
    os._exit(code)
