"""The node's side of the process that stores a recording."""

from __future__ import annotations

import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from ceed_vla.ros_nodes.record.episode import Row
from ceed_vla.ros_nodes.record.plan import Plan
from ceed_vla.ros_nodes.record.protocol import CLOSE, FAILED, READY, ROW, WRITTEN, Reply, Request
from ceed_vla.ros_nodes.robot.child_process import end_child, start_child

CHILD = "ceed_vla.ros_nodes.record.child"


class RecordWorker:
    """Passes rows to the process, which may be behind; nothing here waits for it.

    Args:
        plan: What is recorded.
        notify: Called in another thread when there is a reply.
        python: Interpreter of the process; empty: the present one.

    Attributes:
        ready: Whether the process can store.
        failed: Why it never can again; None if it can.
        waiting: Bytes of the rows that it has not stored yet.
    """

    def __init__(self, plan: Plan, *, notify: Callable[[], None], python: str = "") -> None:
        self.ready = False
        self.failed: str | None = None
        self.waiting = 0
        self._notify = notify
        self._closed = False
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._sizes: deque[int] = deque()  # of rows that are not stored
        self._replied = time.monotonic()  # time of the last reply [s]
        self._process, self._pipe = start_child(CHILD, python)
        self._pipe.send(plan)
        for target in (self._send, self._receive):
            threading.Thread(target=target, name=f"record{target.__name__}", daemon=True).start()

    def request(self, request: Request) -> None:
        """Send a request."""
        if request.kind == ROW and request.row is not None:
            size = row_size(request.row)
            with self._lock:
                self._sizes.append(size)
                self.waiting += size
        self._requests.put(request)

    def poll(self) -> Reply | None:
        """Return the next reply, except those about single rows; None if there is none."""
        while True:
            try:
                reply = self._replies.get_nowait()
            except queue.Empty:
                return None
            if reply.kind == READY:
                self.ready = True
            elif reply.kind == FAILED and not self.ready:
                self.failed = reply.error
            if reply.kind != WRITTEN and (reply.kind != FAILED or reply.error):
                return reply

    def close(self, silence_s: float = 20.0) -> None:
        """End the process after all requests; an episode without `END` is lost.

        A process that does not reply for `silence_s` [s] is killed. May be called twice.
        """
        if self._closed:
            return
        self._closed = True
        self._requests.put(Request(CLOSE))
        self._replied = time.monotonic()
        while self._process.poll() is None and time.monotonic() - self._replied < silence_s:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
        end_child(self._process, timeout_s=0.0)

    def _send(self) -> None:
        while True:
            request = self._requests.get()
            try:
                self._pipe.send(request)
            except OSError:
                return  # `_receive` reports it
            if request.kind == CLOSE:
                return

    def _receive(self) -> None:
        while True:  # also while closing: a full pipe would stop the process
            try:
                reply: Reply = self._pipe.recv()
            except (EOFError, OSError):
                if not self._closed:
                    self.failed = self.failed or f"The process that stores ended ({self._code()})."
                    self._notify()
                return
            self._replied = time.monotonic()
            with self._lock:
                if reply.kind in (WRITTEN, FAILED) and self._sizes:
                    self.waiting -= self._sizes.popleft()
            self._replies.put(reply)
            if reply.kind != WRITTEN and not self._closed:
                self._notify()

    def _code(self) -> str:
        self._process.wait()
        return f"exit code {self._process.returncode}"


def row_size(row: Row) -> int:
    """Bytes of a row's images."""
    return sum(len(image.data) for image in row.images.values())
