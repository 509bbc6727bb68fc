"""`ceed-vla seal`: write the manifest of a checkpoint that lacks one or was changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ceed_vla.checkpoints.manifest import Entries, own_files, read_manifest, write_manifest
from ceed_vla.checkpoints.policies import load
from ceed_vla.checkpoints.replacing import link, replacing_folder
from ceed_vla.errors import CheckpointError
from ceed_vla.files import read_json, saving
from ceed_vla.folders import CONFIG, MANIFEST, resolve_checkpoint, standing_for


@dataclass
class SealConfig:
    """Write a checkpoint's manifest: from then on a lost, exchanged or damaged file is an error.

    This package writes every checkpoint with a manifest. Seal those of `lerobot-train`, those of
    earlier versions, and sealed ones again after you change a file. The command loads the
    checkpoint before it seals it.

    Attributes:
        folder: Folder of the checkpoint.
    """

    folder: str


def seal_folder(config: SealConfig) -> str:
    """Run the command and return its output; raises the errors of `seal`."""
    folder = resolve_checkpoint(config.folder)
    changed = seal(folder)
    return f"{folder}: sealed" + (f"; new in the manifest: {', '.join(changed)}" if changed else "")


def seal(path: str | Path) -> list[str]:
    """Load a checkpoint, then write its manifest and the flag in config.json, in one step.

    Returns:
        Names of the files that differ from an earlier manifest; all files if there was none.

    Raises:
        CheckpointError: It is not a ceed_vla checkpoint, does not load, or cannot be written.
    """
    folder = resolve_checkpoint(path)
    if read_json(folder / CONFIG).get("type") != "ceed_vla":
        problem = f"{folder} holds no policy of type 'ceed_vla'"
        raise CheckpointError(f"{problem}; only such checkpoints are sealed.")
    before = _entries(folder)
    with saving(folder, {}), replacing_folder(folder, own_files) as stage:
        try:
            for name in own_files(folder) - {MANIFEST}:
                link(Path(os.path.realpath(folder / name)), stage / name)
            write_manifest(stage)
            with standing_for(stage, folder):
                load(stage)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(stage), str(folder))) from error
        after = _entries(stage)
    return [name for name, entry in after.items() if before.get(name) != entry]


def _entries(folder: Path) -> Entries:
    """The entries of a folder's manifest; empty if it is missing or damaged."""
    try:
        return read_manifest(folder) or {}
    except CheckpointError:
        return {}
