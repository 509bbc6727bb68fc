"""Saves over a checkpoint, each killed at another system call, and the files that they leave.

python killed_saves.py OLD NEW PLACE POINTS [FOLDER]: writes one JSON object per line. With FOLDER,
the checkpoint's folder also contains a folder of the user. One process loads; its forks save and
are killed.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ceed_vla.checkpoints import load, save
from ceed_vla.checkpoints.manifest import hash_of, own_files
from ceed_vla.errors import CheckpointError

FILE_EVENTS = ("open", "os", "shutil", "ctypes", "tempfile")
MOST_BYTES = 5000  # size of a file at which the disk is "full"


def content(folder: Path) -> dict[str, str]:
    return {name: hash_of(folder / name) for name in own_files(folder)}


class Saves:
    """Saves of one policy over fresh copies of a checkpoint."""

    def __init__(self, old: Path, new: Path, place: Path, folder: str) -> None:
        self.old, self.target, self.folder = old, place / "policy", folder
        self.bundle = load(new)
        self.before = content(old)
        self.after: dict[str, str] = {}

    def fresh(self) -> None:
        for left in self.target.parent.iterdir():
            shutil.rmtree(left)
        shutil.copytree(self.old, self.target)
        (self.target / "README.md").write_text("kept")
        if self.folder:
            (self.target / self.folder).mkdir()
            (self.target / self.folder / "mine").write_text("kept")

    def child(self, kill_at: int) -> tuple[int, int]:
        """Fork a process that saves; return its id and a pipe with its events."""
        reading, writing = os.pipe()
        number = os.fork()
        if number:
            os.close(writing)
            return number, reading
        count = 0

        def on_event(event: str, _: Any) -> None:
            nonlocal count
            if event.partition(".")[0] in FILE_EVENTS:
                os.write(writing, f"{event}\n".encode())
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(on_event)
        save(self.target, *self.bundle)
        os._exit(0)

    def events(self, kill_at: int) -> list[str]:
        """Save once, killed at an event (0: not killed); return the events."""
        self.fresh()
        number, reading = self.child(kill_at)
        with os.fdopen(reading) as pipe:
            found = pipe.read().split()
        _, status = os.waitpid(number, 0)
        assert os.WIFSIGNALED(status) == bool(kill_at), status
        return found

    def outcome(self) -> str:
        """Return which checkpoint is there; it must load, and all its files must be of one save."""
        load(self.target)
        found = content(self.target)
        assert (self.target / "README.md").read_text() == "kept"
        assert not self.folder or (self.target / self.folder / "mine").read_text() == "kept"
        if found == self.before:
            return "old"
        return "new" if found == self.after else f"neither: {found}"

    def run(self, points: int) -> Iterator[dict[str, Any]]:
        whole = self.events(0)
        self.after = content(self.target)
        assert self.before != self.after
        for kill_at in self.spread(len(whole), points):
            event = self.events(kill_at)[kill_at - 1]
            place = f"event {kill_at} of {len(whole)}"
            yield {"killed at": place, "event": event, "found": self.outcome()}
        for delay in (0.002, 0.01, 0.03):  # while Rust writes, which causes no events
            self.fresh()
            number, reading = self.child(0)
            time.sleep(delay)
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            os.close(reading)
            yield {"killed at": f"{delay} s", "event": "", "found": self.outcome()}
        yield {"killed at": "full disk", "event": self.full(), "found": self.outcome()}
        save(self.target, *self.bundle)
        both = (*self.target.parent.iterdir(), *self.target.iterdir())
        left = [path.name for path in both if path.name.startswith(".")]
        yield {"left over": left, "found": self.outcome()}

    @staticmethod
    def spread(events: int, points: int) -> list[int]:
        """Numbers of events; mostly the last ones, which replace the old checkpoint."""
        last = list(range(events - 3 * points // 4 + 1, events + 1))
        first = points - len(last)
        return [1 + index * (last[0] - 1) // first for index in range(first)] + last

    def full(self) -> str:
        """Error of a save whose files would exceed the size limit."""
        self.fresh()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, limits[1]))
        try:
            save(self.target, *self.bundle)
        except CheckpointError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return "saved"


if __name__ == "__main__":
    torch.set_num_threads(1)
    saves = Saves(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), "".join(sys.argv[5:]))
    for line in saves.run(int(sys.argv[4])):
        print(json.dumps(line), flush=True)
