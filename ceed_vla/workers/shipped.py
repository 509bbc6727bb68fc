"""Checkpoints that are sent to the nodes of a cluster, once through its object store."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ceed_vla.checkpoint_files import base_path
from ceed_vla.checkpoints.manifest import config_text
from ceed_vla.files import read_json
from ceed_vla.folders import CONFIG, MANIFEST, base_folder, relocate, resolve_checkpoint

HELD = ".held"  # suffix of the file that every worker of a job locks while it lives
_held: dict[str, IO[str]] = {}  # by job


@dataclass(frozen=True)
class Shipped:
    """The files of a checkpoint.

    Attributes:
        path: The path by which the command names it.
        files: Contents by their path in its folder. A model that it refers to is not among them;
            its path is absolute.
        digest: Hash of the files.
    """

    path: str
    files: Mapping[str, bytes]
    digest: str


def read_checkpoint(path: str) -> Shipped:
    """Read a checkpoint to be sent.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    folder = resolve_checkpoint(path)
    files = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    _refer_absolutely(folder, files)
    digest = hashlib.sha256()
    for name, contents in files.items():
        digest.update(name.encode() + hashlib.sha256(contents).digest())
    return Shipped(path, files, digest.hexdigest()[:16])


def _refer_absolutely(folder: Path, files: dict[str, bytes]) -> None:
    """Let the files of a checkpoint name the model that it refers to by an absolute path.

    The copy on a node is in another folder, so a relative path would lead elsewhere.
    """
    values = read_json(folder / CONFIG)
    path = base_path(values)
    if not path or Path(path).is_absolute():
        return
    values["backbone"]["path"] = str(base_folder(folder.absolute(), path))
    files[CONFIG] = config_text(values).encode()
    if MANIFEST in files:
        manifest = read_json(folder / MANIFEST)
        entry = {"bytes": len(files[CONFIG]), "sha256": hashlib.sha256(files[CONFIG]).hexdigest()}
        manifest["files"][CONFIG] = entry
        files[MANIFEST] = json.dumps(manifest).encode()


def unpack(shipped: Shipped, job: str) -> None:
    """Write a checkpoint to a folder of this node, and let its path lead there.

    Workers of the same `job` on the same machine share the folder. The folders of jobs that were
    killed, and so could not remove them, are removed.
    """
    _hold(job)
    folder = folder_of(job) / shipped.digest
    if not folder.exists():
        remove_abandoned()
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent))
        for name, contents in shipped.files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(contents)
        try:
            new.rename(folder)
        except OSError:  # another worker was faster
            shutil.rmtree(new)
    relocate(shipped.path, folder)


def folder_of(job: str) -> Path:
    """The folder of a job's checkpoints on this node."""
    return Path(tempfile.gettempdir(), f"ceed_vla-{job}")


def remove(job: str) -> None:
    """Remove the folder of a job's checkpoints on this node."""
    shutil.rmtree(folder_of(job), ignore_errors=True)
    folder_of(job).with_suffix(HELD).unlink(missing_ok=True)


def remove_abandoned() -> None:
    """Remove the folders of jobs of which no process is left on this node."""
    for path in Path(tempfile.gettempdir()).glob(f"ceed_vla-*{HELD}"):
        try:
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path.stem.removeprefix("ceed_vla-"))
        except OSError:  # a process holds it, or another one was faster
            continue


def _hold(job: str) -> None:
    """Mark the job as alive until this process ends."""
    if job not in _held:
        file = folder_of(job).with_suffix(HELD).open("a")
        fcntl.flock(file, fcntl.LOCK_SH)
        _held[job] = file
