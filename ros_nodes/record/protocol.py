"""What the record node and the process that stores tell each other."""

from __future__ import annotations

from dataclasses import dataclass

from ceed_vla.ros_nodes.record.episode import Row

ROW, END, DISCARD, CLOSE = "row", "end", "discard", "close"
READY, WRITTEN, STORED, DISCARDED, FAILED = "ready", "written", "stored", "discarded", "failed"


@dataclass(frozen=True)
class Request:
    """What to do with the present episode.

    Attributes:
        kind: `ROW` appends a row, `END` stores the episode, `DISCARD` drops it, `CLOSE` ends the
            process.
        episode: Number of the episode, as the node counts.
        row: The row to append.
        task: Its instruction.
        success: Whether the episode was solved.
    """

    kind: str
    episode: int = 0
    row: Row | None = None
    task: str = ""
    success: bool = False


@dataclass(frozen=True)
class Reply:
    """What was done.

    Attributes:
        kind: `READY` after the start, `WRITTEN` for a row, `STORED` or `DISCARDED` for an episode,
            `FAILED` if the episode is lost; later rows of it are ignored.
        episode: That of the request.
        episodes: Stored episodes.
        frames: Stored frames.
        damaged: Images of the episode that could not be decoded.
        error: Why it failed.
    """

    kind: str
    episode: int = 0
    episodes: int = 0
    frames: int = 0
    damaged: int = 0
    error: str = ""
