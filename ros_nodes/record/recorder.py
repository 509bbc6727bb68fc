"""The recorder's states: what operators may do, and what becomes of an episode. Free of ROS."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from ceed_vla.ros_nodes.record.episode import EpisodeRows
from ceed_vla.ros_nodes.record.protocol import (
    DISCARD,
    END,
    FAILED,
    READY,
    ROW,
    STORED,
    Reply,
    Request,
)
from ceed_vla.texts import instruction_problem
from ceed_vla.wording import counted

START, STOP, DROP = "start", "stop", "discard"
FULL = "full"  # the episode has ended by itself, and waits for `STOP` or `DROP`


class Phase(StrEnum):
    """What the recorder does."""

    LOADING = "loading"  # the process that stores is starting
    IDLE = "idle"  # no episode
    RECORDING = "recording"
    ENDED = "ended"  # the episode ended by itself; it waits for `stop` or `discard`
    STORING = "storing"  # the episode is over and is being stored
    FAILED = "failed"  # nothing can be stored any more


class Stores(Protocol):
    """What stores the rows, see `RecordWorker`."""

    ready: bool
    failed: str | None
    waiting: int

    def request(self, request: Request) -> None: ...

    def poll(self) -> Reply | None: ...


@dataclass(frozen=True)
class Answer:
    """The answer to an operator.

    Attributes:
        accepted: Whether it is done.
        text: What is done, or why it is not.
    """

    accepted: bool
    text: str


class Recorder:
    """Records one episode after the other.

    Args:
        rows: Joins the robot's messages.
        worker: Stores the rows.
        memory: Bytes of rows that may wait for the worker; with more, the episode ends.
        tell: Called with every event of an episode, as JSON, which bags record.

    Attributes:
        phase: What it does now.
        detail: What operators should know of it.
        instruction: Task of the next episode.
        episodes: Stored episodes.
        frames: Stored frames.
    """

    def __init__(
        self, rows: EpisodeRows, worker: Stores, memory: int, tell: Callable[[str], None]
    ) -> None:
        self.phase = Phase.LOADING
        self.detail = ""
        self.instruction = ""
        self.episodes = 0
        self.frames = 0
        self.rows = rows
        self._worker = worker
        self._memory = memory
        self._tell = tell
        self._task = ""
        self._number = 0  # of the episode, for requests
        self._success: bool | None = None  # after `stop`
        self._ended_at = math.inf  # when the episode ended by itself, because storing was slow [s]

    # ---- operators -------------------------------------------------------------------------------

    def start(self, now: float) -> Answer:
        """Begin an episode at the time `now` of the messages' clock [s]."""
        if self.phase is not Phase.IDLE:
            return self._refused("start")
        problem = instruction_problem(self.instruction)
        if not self.instruction.strip() or problem:
            why = problem or "publish one on ~/instruction or set the parameter instruction"
            return Answer(False, f"There is no instruction: {why}.")
        self._task = self.instruction
        self._number += 1
        self._ended_at = math.inf
        self.rows.start(now)
        silent = self.rows.silent(now - 1.0)
        wait = f"; it begins when {', '.join(silent)} send" if silent else ""
        self._enter(Phase.RECORDING, f"episode {self.episodes}{wait}")
        self._report({"event": START, "time": now, "instruction": self._task})
        return Answer(True, f"recording episode {self.episodes}{wait}")

    def stop(self, now: float, *, success: bool) -> Answer:
        """End the episode at the time `now` [s], and store it."""
        if self.phase not in (Phase.RECORDING, Phase.ENDED):
            return self._refused("stop")
        self._success = success
        now = min(now, self._ended_at)
        self.rows.stop(now)
        self._report({"event": STOP, "time": now, "success": success})
        outcome = "success" if success else "failure"
        self._enter(Phase.STORING, f"episode {self.episodes}, {outcome}")
        return Answer(True, f"storing {counted(self.rows.frames, 'frame')}, {outcome}")

    def discard(self) -> Answer:
        """Drop the episode."""
        if self.phase not in (Phase.RECORDING, Phase.ENDED):
            return self._refused("discard")
        self._report({"event": DROP})
        dropped = self.rows.frames
        self._drop(f"discarded {counted(dropped, 'frame')}")
        return Answer(True, self.detail)

    # ---- progress --------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Pass on the rows that are complete at the time `now` [s], and take replies."""
        while (reply := self._worker.poll()) is not None:
            self._take(reply)
        if self._worker.failed is not None and self.phase is not Phase.FAILED:
            self.rows.finish()  # nothing takes the rows any more
            self._enter(Phase.FAILED, self._worker.failed)
        if self.phase is Phase.RECORDING or (self.phase is Phase.STORING and not self._ending):
            self._pass_on(now)

    @property
    def _ending(self) -> bool:
        """Whether the worker stores the episode now."""
        return self._success is None

    def _pass_on(self, now: float) -> None:
        for row in self.rows.rows(now):
            self._worker.request(Request(ROW, self._number, row, self._task))
        if self.phase is Phase.STORING:
            if self.rows.done(now):
                self._store()
        elif self.rows.gap:
            self._enter(Phase.ENDED, f"{self.rows.gap}; call ~/stop to keep what was before")
        elif self._worker.waiting > self._memory:
            waiting = f"{self._worker.waiting / 1e6:.0f} MB of images wait to be stored"
            self.rows.stop(now)
            self._ended_at = now
            self._report({"event": FULL, "time": now})
            self._enter(Phase.ENDED, f"{waiting}: this computer is too slow; call ~/stop")

    def finish(self) -> None:
        """Store an episode that was stopped with the rows there are, because the node ends."""
        if self.phase is Phase.STORING and not self._ending:
            for row in self.rows.rows(math.inf):
                self._worker.request(Request(ROW, self._number, row, self._task))
            self._store()

    def _store(self) -> None:
        """Let the worker store the episode."""
        success = bool(self._success)
        self._success = None
        if not self.rows.frames:
            self._drop("nothing is stored: the episode has no frame")
            return
        self._worker.request(Request(END, self._number, success=success))
        self.rows.finish()

    def _take(self, reply: Reply) -> None:
        """Take a reply of the worker."""
        before = self.frames
        self.episodes = reply.episodes
        self.frames = reply.frames
        if reply.kind == READY:
            self._enter(Phase.IDLE, f"{counted(self.episodes, 'episode')} stored")
        elif reply.episode != self._number:
            return  # of an episode that was dropped before
        elif reply.kind == STORED:
            text = f"stored episode {self.episodes - 1}: {counted(self.frames - before, 'frame')}"
            damaged = f"; {reply.damaged} damaged images" if reply.damaged else ""
            losses = f"; {self.rows.losses}" if str(self.rows.losses) else ""
            self._enter(Phase.IDLE, text + damaged + losses)
        elif reply.kind == FAILED and self._worker.ready:
            self._success = None
            if self.phase is not Phase.IDLE:
                self._report({"event": DROP})
                self._drop(f"the episode is lost: {reply.error}")

    def _drop(self, why: str) -> None:
        """End the episode without storing it."""
        self.rows.finish()
        self._worker.request(Request(DISCARD, self._number))
        self._enter(Phase.IDLE, why)

    def _enter(self, phase: Phase, detail: str) -> None:
        self.phase = phase
        self.detail = detail

    def _refused(self, what: str) -> Answer:
        return Answer(False, f"{what} is not possible: the recorder is {self}")

    def _report(self, event: dict[str, Any]) -> None:
        self._tell(json.dumps(event))

    def __str__(self) -> str:
        return f"{self.phase}: {self.detail}" if self.detail else str(self.phase)
