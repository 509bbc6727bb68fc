"""A child process with a pipe, which ends with its parent because the pipe closes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection


def start_child(module: str, python: str = "") -> tuple[subprocess.Popen[bytes], Connection]:
    """Run a module, whose argument is the file descriptor of its end of a pipe.

    Args:
        module: Name of the module.
        python: Interpreter that runs it, with packages of its own; empty: the present one.

    Returns:
        The process, and this end of the pipe.
    """
    pipe, theirs = multiprocessing.Pipe()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if python:
        environment = dict(os.environ)
        # ROS's wheels set both only for this Python
        if environment.pop("_ROS_WHEELS_BOOTSTRAP_COMPLETE", None):
            environment.pop("LD_LIBRARY_PATH", None)
    command = [python or sys.executable, "-m", module, str(theirs.fileno())]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment
    )
    theirs.close()  # otherwise the pipe would stay open after the child's end
    return process, pipe


def end_child(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """End a child; kill it if it does not end in time [s]."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
