"""The process that encodes and stores a recording, so that the node needs neither torch nor time.

    python -m ceed_vla.ros_nodes.record.child FILE_DESCRIPTOR

The pipe carries a `Plan`, then `Request` objects; every reply is a `Reply`.
"""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from ceed_vla.errors import CeedVLAError
from ceed_vla.ros_nodes.record.protocol import (
    CLOSE,
    DISCARD,
    DISCARDED,
    END,
    FAILED,
    READY,
    ROW,
    STORED,
    WRITTEN,
    Reply,
    Request,
)

if TYPE_CHECKING:
    from ceed_vla.ros_nodes.record.store import EpisodeStore


def main(number: int) -> None:
    """Serve the parent until it closes the pipe with this file descriptor."""
    # These reach the whole process group; the parent decides when each process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    pipe = Connection(number)
    try:
        plan = pipe.recv()
        from ceed_vla.outputs import owned_folder
        from ceed_vla.ros_nodes.record.store import EpisodeStore

        # The process that writes is the folder's owner, also if the node is killed.
        with owned_folder("root", str(plan.root)):
            _serve(pipe, EpisodeStore(plan))
    except EOFError:
        return
    except Exception as error:
        with suppress(OSError):  # the parent may have ended
            pipe.send(Reply(FAILED, error=_reason(error)))


def _serve(pipe: Connection, store: EpisodeStore) -> None:
    """Serve requests until the parent ends."""
    pipe.send(Reply(READY, 0, store.episodes, store.frames))
    failed = False
    try:
        while (request := pipe.recv()).kind != CLOSE:
            reply = replace(_served(store, request, failed=failed), episode=request.episode)
            failed = reply.kind == FAILED
            pipe.send(reply)
    except (EOFError, OSError):
        pass  # the parent has ended
    store.discard()


def _served(store: EpisodeStore, request: Request, *, failed: bool) -> Reply:
    """Serve a request; `failed` is whether the present episode is lost already."""
    if failed and request.kind != DISCARD:
        return Reply(FAILED, 0, store.episodes, store.frames)
    damaged = store.damaged
    try:
        if request.kind == ROW:
            assert request.row is not None
            store.add(request.row, request.task)
            return Reply(WRITTEN)
        if request.kind == END:
            store.end(success=request.success)
            return Reply(STORED, 0, store.episodes, store.frames, damaged)
        store.discard()
        return Reply(DISCARDED, 0, store.episodes, store.frames, damaged)
    except Exception as error:
        store.discard()
        return Reply(FAILED, 0, store.episodes, store.frames, error=_reason(error))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, CeedVLAError) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(int(sys.argv[1]))
