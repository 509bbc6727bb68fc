"""The pass over a bag: which of its messages belong to which episode."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ceed_vla.errors import DatasetError
from ceed_vla.ros_nodes.record.bag_topics import (
    COMMANDS,
    EVENT,
    IMAGE,
    INSTRUCTION,
    BagMessage,
    messages,
)
from ceed_vla.ros_nodes.record.episode import EpisodeRows
from ceed_vla.ros_nodes.record.recorder import DROP, FULL, START, STOP
from ceed_vla.ros_nodes.record.store import EpisodeStore
from ceed_vla.texts import shown

SUCCESS, FAILURE, DISCARDED = "success", "failure", "discarded"
UNFINISHED = "not stored: the bag ends before the episode"
EMPTY = "not stored: it has no frame"
UNTOLD = "not stored: no instruction until its end"


@dataclass(frozen=True)
class Converted:
    """An episode of the bag.

    Attributes:
        frames: Number of its frames.
        task: Its instruction.
        outcome: `SUCCESS`, `FAILURE`, `DISCARDED`, `UNFINISHED`, `EMPTY` or `UNTOLD`.
        remarks: What it lacked.
    """

    frames: int
    task: str
    outcome: str
    remarks: list[str]


class Conversion:
    """Stores the episodes of a bag.

    Args:
        rows: Joins the messages.
        store: Stores the rows.
        instruction: Task of episodes without one in the bag; "" if there is none.
        by_arrival: Whether commands have no stamp.

    Attributes:
        rows: As given.
        episodes: The episodes so far.
    """

    def __init__(
        self, rows: EpisodeRows, store: EpisodeStore, instruction: str, *, by_arrival: bool
    ) -> None:
        self.rows = rows
        self.episodes: list[Converted] = []
        self._store = store
        self._instruction = instruction
        self._by_arrival = by_arrival
        self._task = ""
        self._running = False
        self._outcome = ""  # after the event `STOP`
        self._whole = False  # no event says where episodes begin
        self._told = True  # false before the first instruction, if none is given

    def run(self, reader: Any, path: Path, wanted: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        """Convert a bag.

        Args:
            reader: The opened bag.
            path: Its path, for errors.
            wanted: See `topics_of`.

        `DatasetError`: The bag is damaged, has no instruction, or cannot be stored. `OSError`: The
        disk is full.
        """
        topics = {one.topic for one in reader.connections if one.msgcount}
        self._whole = not any((EVENT, "") in wanted.get(topic, ()) for topic in topics)
        if self._whole:
            told = {topic: uses for topic, uses in wanted.items() if (INSTRUCTION, "") in uses}
            texts = (str(message.data.data) for message in messages(reader, path, told))
            first = next(filter(str.strip, texts), "")  # it may come after the first frames
            self._told = bool(self._instruction)
            self._begin(-math.inf, self._instruction or first)
        for message in messages(reader, path, wanted):
            self._take(message)
            self._advance(self.rows.clock)
        if self._whole and self._running:
            self._end_whole()
        elif self._outcome:
            self._advance(math.inf)
        elif self._running:
            self._finish(UNFINISHED)
        silent = self.rows.silent(-math.inf)
        if silent and not any(one.frames for one in self.episodes):
            raise DatasetError(f"{path} has no message of {', '.join(silent)}.")

    def _take(self, message: BagMessage) -> None:
        if message.kind == IMAGE:
            self.rows.take_image(message.feature, message.data)
        elif message.kind == COMMANDS and self._by_arrival:
            self.rows.take_positions(message.data, message.arrived)
        elif message.kind == COMMANDS:
            self.rows.take_commands(message.data)
        elif message.kind == EVENT:
            self._take_event(str(message.data.data))
        elif message.kind == INSTRUCTION:
            if self._whole and str(message.data.data).strip():
                self._task = str(message.data.data)
                self._told = True
        else:
            self.rows.take_joints(message.data, message.feature)

    def _take_event(self, text: str) -> None:
        """Take an event of the record node, see `Recorder`."""
        try:
            event = json.loads(text)
            kind = event["event"]
            if kind == START:
                self._advance(math.inf)  # a stopped episode is complete
                self._drop()
                self._begin(float(event["time"]), str(event["instruction"]))
            elif kind == STOP and self._running:
                self.rows.stop(float(event["time"]))
                self._outcome = SUCCESS if event["success"] else FAILURE
            elif kind == FULL and self._running:
                self.rows.stop(float(event["time"]))
            elif kind == DROP and self._running:
                self._drop()
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"The event {shown(text)} is none of the record node ({error})."
            ) from error

    def _begin(self, time: float, task: str) -> None:
        self._task = task
        self._outcome = ""
        self._running = True
        self.rows.start(time)

    def _advance(self, now: float) -> None:
        """Store the rows that are complete at the time `now`, and the episode if it is over."""
        if not self._running:
            return
        for row in self.rows.rows(now):
            if not self._task.strip():
                raise DatasetError("The bag has no instruction; give --instruction.")
            self._store.add(row, self._task)
        if self._outcome and self.rows.done(now):
            self._finish(self._outcome)
        elif self._whole and self.rows.gap:
            clock = self.rows.clock
            self._finish(SUCCESS if self._told else UNTOLD)
            self._begin(clock, self._task)

    def _end_whole(self) -> None:
        """Store what is left at the end of a bag without events."""
        self.rows.stop(self.rows.clock)
        self._outcome = SUCCESS
        self._advance(math.inf)

    def _drop(self) -> None:
        if self._running:
            self._finish(DISCARDED)

    def _finish(self, outcome: str) -> None:
        """End the episode: store it, or drop it."""
        self._running = False
        self._outcome = ""
        rows = self.rows
        damaged = self._store.damaged
        if not rows.frames and outcome in (SUCCESS, FAILURE):
            outcome = EMPTY
        rows.finish()
        if outcome in (SUCCESS, FAILURE):
            self._store.end(success=outcome == SUCCESS)
        else:
            self._store.discard()
        remarks = [
            rows.gap,
            str(rows.losses),
            f"{rows.clipped} clipped actions" if rows.clipped else "",
            f"{damaged} damaged images" if damaged else "",
        ]
        self.episodes.append(
            Converted(rows.frames, self._task, outcome, [remark for remark in remarks if remark])
        )
