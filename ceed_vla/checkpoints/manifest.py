"""The manifest of a checkpoint: its files with size and SHA-256.

With it, a file that is lost, exchanged or half written is an error. A sealed checkpoint has a
``manifest.json``, and ``"sealed": true`` in its config.json, so that a lost manifest is also an
error. The flag belongs to the folder and not to the policy: configuration objects do not contain
it, and LeRobot's ``save_pretrained`` does not write it. A manifest protects against accidents and
mix-ups. It is not a signature.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ceed_vla.checkpoints.replacing import finish_replacing
from ceed_vla.errors import CheckpointError
from ceed_vla.fields import short
from ceed_vla.files import plain_name, read_json, regular, write_text
from ceed_vla.folders import CONFIG, MANIFEST, MODULES, POLICY_FILES, PROCESSOR_FILES

logger = logging.getLogger(__name__)

FORMAT = 1
SEALED = "sealed"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_READ = {*POLICY_FILES, *PROCESSOR_FILES, *MODULES}  # files that are read if they exist
_STATES = ("policy_preprocessor_step_*.safetensors", "policy_postprocessor_step_*.safetensors")
_told: set[str] = set()  # unsealed folders that were logged

Entries = dict[str, tuple[int, str]]  # name -> size [bytes] and SHA-256


# ---- reading ------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of any policy's checkpoint; that of ours is checked against the manifest.

    Raises:
        CheckpointError: The file is damaged, or does not match the manifest.
    """
    finish_replacing(folder, own_files)
    values = read_json(folder / CONFIG)
    if values.get("type") == "ceed_vla":
        manifest = _manifest(folder, values)
        if manifest is not None:
            _check_file(folder, CONFIG, manifest)
    values.pop(SEALED, None)
    return values


def check_files(folder: Path) -> None:
    """Check all files of a checkpoint against its manifest; log once that an unsealed one has none.

    Raises:
        CheckpointError: A file is missing or additional, or does not match the manifest.
    """
    finish_replacing(folder, own_files)
    manifest = _manifest(folder, read_json(folder / CONFIG))
    if manifest is None:
        _tell_unsealed(folder)
        return
    for name in sorted(_READ - manifest.keys()):
        if (folder / name).exists(follow_symlinks=False):
            problem = f"{folder / name} is not in {MANIFEST}, so it is of another checkpoint"
            raise CheckpointError(f"{problem}: remove it. {_again(folder)}")
    for name in manifest:
        _check_file(folder, name, manifest)


@contextmanager
def held_still(folder: Path) -> Iterator[None]:
    """Raise `CheckpointError` if a checkpoint is replaced while the block reads it."""
    finish_replacing(folder, own_files)
    before = _identity(folder)
    advice = f"{folder} was replaced while it was read; load it again."
    try:
        yield
    except CheckpointError as error:
        if _identity(folder) != before:
            raise CheckpointError(advice) from error
        raise
    if _identity(folder) != before:
        raise CheckpointError(advice)


def own_files(folder: Path) -> set[str]:
    """Names of the files in a folder that belong to its checkpoint; others are the user's."""
    names = {*_READ, MANIFEST}
    for pattern in _STATES:
        names |= {file.name for file in folder.glob(pattern)}
    try:
        names |= (read_manifest(folder) or {}).keys()
    except CheckpointError:
        logger.warning("%s is damaged; it will be replaced", folder / MANIFEST)
    return {name for name in names if (folder / name).exists(follow_symlinks=False)}


def _manifest(folder: Path, values: Mapping[str, Any]) -> Entries | None:
    """The manifest of a checkpoint with that config.json; None if it is not sealed."""
    sealed = values.get(SEALED, False)
    if not isinstance(sealed, bool):
        problem = f"{folder / CONFIG}: sealed is {short(sealed)}"
        raise CheckpointError(f"{problem}; it must be true or false.")
    found = read_manifest(folder)
    if found is None and sealed:
        problem = f"{folder} lacks {MANIFEST}, but config.json marks it as sealed"
        raise CheckpointError(f"{problem}. {_again(folder)}")
    return found


def read_manifest(folder: Path) -> Entries | None:
    """The entries of a folder's manifest; None if there is none."""
    file = folder / MANIFEST
    if not file.exists(follow_symlinks=False):
        return None
    values = read_json(file)
    found = values.get("files")
    if values.get("format") != FORMAT or not isinstance(found, dict):
        raise CheckpointError(
            f"{file} has format {short(values.get('format'))}; this version reads format {FORMAT}. "
            "Update ceed_vla; remove the file if another program wrote it."
        )
    entries: Entries = {}
    for name, entry in found.items():
        plain_name(name, f"A file in {file}")
        size = entry.get("bytes") if isinstance(entry, dict) else None
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if type(size) is not int or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise CheckpointError(f"{file} lacks size or hash of {name}. {_again(folder)}")
        entries[name] = (size, digest)
    missing = sorted({*POLICY_FILES} - entries.keys())
    if missing or MANIFEST in entries:
        what = f"does not list {', '.join(missing)}" if missing else "lists itself"
        raise CheckpointError(f"{file} {what}. {_again(folder)}")
    return entries


def _check_file(folder: Path, name: str, entries: Entries) -> None:
    file = folder / name
    size, digest = entries[name]
    if not regular(file).is_file():
        raise CheckpointError(f"{folder} lacks {name}, which {MANIFEST} lists. {_again(folder)}")
    found = file.stat().st_size
    if found != size:
        raise CheckpointError(
            f"{file} has {found} bytes, and {MANIFEST} says {size}: "
            f"it is damaged or of another checkpoint. {_again(folder)}"
        )
    if hash_of(file) != digest:
        raise CheckpointError(
            f"{file} is not the file that {MANIFEST} describes: "
            f"it was changed, or is of another checkpoint. {_again(folder)}"
        )


def _again(folder: Path) -> str:
    seal = f"`ceed-vla seal {folder}`"
    return f"Copy the whole checkpoint again; or, if you changed it yourself, run {seal}."


def _identity(folder: Path) -> tuple[int, ...]:
    """Numbers that change when a checkpoint is replaced; () if it is missing."""
    try:
        found = folder.stat()
        manifest = (folder / MANIFEST).stat() if (folder / MANIFEST).exists() else found
    except OSError:
        return ()
    inside = manifest.st_mtime_ns if manifest is not found else 0
    return (found.st_dev, found.st_ino, manifest.st_ino, inside)


def _tell_unsealed(folder: Path) -> None:
    name = str(folder.absolute())
    if name not in _told:
        _told.add(name)
        logger.warning(
            "%s has no manifest, so that its files cannot be checked. "
            "If they belong together, run `ceed-vla seal %s`.",
            folder,
            folder,
        )


# ---- writing ------------------------------------------------------------------------------------


def hash_of(file: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits; `CheckpointError` if it cannot be read."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from error


def write_manifest(folder: Path) -> None:
    """Seal a folder that holds one checkpoint and nothing else: the flag first, the manifest last.

    Raises:
        OSError: It cannot be written.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    values = read_json(folder / CONFIG)
    write_text(folder / CONFIG, config_text({**values, SEALED: True}))
    files = {}
    for file in sorted(folder.iterdir()):
        if file.is_file():
            files[file.name] = {"bytes": file.stat().st_size, "sha256": hash_of(file)}
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")


def config_text(values: Mapping[str, Any]) -> str:
    """config.json as LeRobot writes it."""
    return json.dumps(values, indent=4)


def unsealed_bytes(file: Path) -> bytes:
    """The content of a checkpoint's file without the flag, so that sealing does not change it."""
    if file.name != CONFIG:
        return file.read_bytes()
    values = read_json(file)
    if SEALED not in values:
        return file.read_bytes()
    del values[SEALED]
    return config_text(values).encode()
