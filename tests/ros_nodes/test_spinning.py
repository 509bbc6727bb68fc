"""Scheduling, retained memory and end of a node's process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from tests.ros_nodes.conftest import ROOT

PRIORITIES = """
import os, threading
from ceed_vla.scheduling import raise_priority

ended = threading.Event()
threads = [threading.Thread(target=ended.wait) for _ in range(2)]
for thread in threads:
    thread.start()
print(raise_priority(7, only_this_thread=False, second=threads[0].native_id))
for number in (0, threads[0].native_id, threads[1].native_id):
    policy = os.sched_getscheduler(number) & ~os.SCHED_RESET_ON_FORK
    print(policy, os.sched_getparam(number).sched_priority)
ended.set()
"""

MEMORY = """
import resource, sys
from ceed_vla.ros_nodes.robot.spinning import keep_memory

def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    keep_memory()
for _ in range(3):
    copies = [bytes(bytearray(6_000_000)) for _ in range(3)]
    del copies
before = faults()
for _ in range(10):
    copies = [bytes(bytearray(6_000_000)) for _ in range(3)]
    del copies
print(faults() - before)
"""

END = """
import atexit, threading, time
from ceed_vla.ros_nodes.robot.spinning import end_process

threading.Thread(target=time.sleep, args=(60.0,)).start()  # as in a library; nothing waits for it
atexit.register(print, "at exit")
print("ended")
end_process(3)
"""


def told(program: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_one_thread_comes_right_behind_the_others() -> None:
    scheduling, own, second, other = told(PRIORITIES)
    if "no real-time priority" in scheduling:
        pytest.skip(scheduling)
    assert scheduling == "fifo 7"
    assert own == other == "1 7"
    assert second == "1 6"


def test_memory_of_messages_is_not_faulted_in_anew() -> None:
    """Thirty blocks of 1,465 pages each are allocated and freed."""
    kept = int(told(MEMORY, "keep")[0])
    returned = int(told(MEMORY, "return")[0])
    assert kept < 1000
    assert returned > 10 * max(kept, 100)


def test_a_process_ends_at_once_with_its_code_and_what_was_registered() -> None:
    done = subprocess.run(
        [sys.executable, "-c", END], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == ["ended", "at exit"]
    assert not done.stderr


def test_a_reader_that_is_gone_does_not_change_the_code() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", END],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # the end writes what was printed
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(30) == 3
