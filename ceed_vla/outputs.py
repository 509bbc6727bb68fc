"""Output paths: a command replaces only files of this package, and is a folder's only writer.

Every file that this package writes contains `MADE_BY`, so that the next run can tell its own files
from a user's. Weights cannot contain it: a report next to them lists their hashes (`WRITTEN`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ceed_vla import __version__
from ceed_vla.errors import ConfigError
from ceed_vla.files import read_json, strange
from ceed_vla.locks import locked

MADE_BY = f"made by ceed-vla {__version__}"
_MARK = b"made by ceed-vla "
_SEARCHED = 2**17  # [bytes] at both ends of a file
_NAMED = 12  # digits of a hash by which a report names weights
WRITTEN = "written"  # in a report: path below its folder -> SHA-256 of what was written there


def is_own(file: Path) -> bool:
    """Whether `file` contains the mark of this package."""
    if not file.is_file():
        return False
    with file.open("rb") as content:
        start = content.read(_SEARCHED)
        content.seek(max(0, file.stat().st_size - _SEARCHED))
        return _MARK in start or _MARK in content.read(_SEARCHED)


def claim_file(option: str, text: str, suffix: str) -> Path:
    """The file that the value `text` of an option names, if it may be written.

    Raises:
        ConfigError: An empty name, another suffix, a folder, or a file that is not ours.
    """
    path = _path(option, text)
    if path.is_dir():
        raise ConfigError(f"--{option} is {text!r}, which is a folder; name a file in it.")
    if path.suffix.lower() != suffix:
        raise ConfigError(
            f"--{option} is {text!r}; the name of the file must end in {suffix}. Change the name."
        )
    if path.exists(follow_symlinks=False) and not is_own(path):
        raise ConfigError(
            f"--{option} is {text!r}, a file that ceed-vla did not make; name another."
        )
    return path


def named_folder(option: str, text: str) -> Path:
    """The folder that an option names; it need not exist.

    Raises:
        ConfigError: An empty name, or a file.
    """
    path = _path(option, text)
    if path.exists(follow_symlinks=False) and not path.is_dir():
        raise ConfigError(f"--{option} is {text!r}, which is a file; name a folder.")
    return path


@contextmanager
def owned_folder(option: str, text: str, part: str = "", launched: bool = False) -> Iterator[Path]:
    """`named_folder`, locked for this process; `part` and `launched` are those of `locked`."""
    folder = named_folder(option, text)
    with locked(folder, f"--{option} is {text!r}", part, launched=launched):
        yield folder


@contextmanager
def claimed_folder(
    option: str,
    text: str,
    names: Iterable[str],
    known_by: Iterable[str],
    part: str = "",
    inputs: Sequence[Path] = (),
    unmarked: Iterable[str] = (),
) -> Iterator[Path]:
    """`claim_folder`, locked for this process."""
    with owned_folder(option, text):
        yield claim_folder(option, text, names, known_by, part, inputs, unmarked)


def claim_folder(
    option: str,
    text: str,
    names: Iterable[str],
    known_by: Iterable[str],
    part: str = "",
    inputs: Sequence[Path] = (),
    unmarked: Iterable[str] = (),
) -> Path:
    """The folder that an option names, if a command may write all its files there.

    The folder must be new, empty, or written by this package.

    Args:
        option: Name of the option.
        text: Its value.
        names: Files that the command writes into the folder.
        known_by: Names of files; one of them with our mark makes the folder ours.
        part: A subfolder that the command replaces; a report among `known_by` must list all of its
            files.
        inputs: Folders that the command reads, which it must not replace.
        unmarked: Further files that it writes, which cannot contain the mark.

    Raises:
        ConfigError: An empty name, a file, a folder or a file that is not ours, a link that leads
            out of the folder, or an output that would replace an input.
    """
    path = named_folder(option, text)
    what = f"--{option} is {text!r}"
    files = list(names)
    for name in unmarked:
        _check_links(what, path, name)
    for name in [*files, part] if part else files:
        _check_links(what, path, name)
        for source in inputs:
            if source.resolve().is_relative_to((path / name).resolve()):
                replaces = f"where {name} would replace {source}, an input"
                raise ConfigError(f"{what}, {replaces}; name another folder.")
    reports = [path / name for name in known_by if is_own(path / name)]
    strange_files = [name for name in files if _is_strange(path / name)]
    if path.is_dir() and not reports:
        strange_files += sorted(file.name for file in path.iterdir() if file.name[0] != ".")
    if part:
        strange_files += _unlisted(path, part, reports)
    if strange_files:
        holds = f"which holds {strange_files[0]!r} that ceed-vla did not make"
        raise ConfigError(f"{what}, {holds}; name a new or empty folder.")
    return path


def hashes(folder: Path, part: str) -> dict[str, str]:
    """The entry `WRITTEN` of a report: every file in `part` of `folder`, with its SHA-256."""
    files = [file for file in sorted((folder / part).rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): _hash(file) for file in files}


def written_before(report: Mapping[str, Any] | Path) -> dict[str, Any]:
    """The entry `WRITTEN` of a report or of its file; empty if it cannot be read."""
    values = _read(report) if isinstance(report, Path) else report
    written = values.get(WRITTEN)
    return written if isinstance(written, dict) else {}


def _read(report: Path) -> dict[str, Any]:
    """The values of a report; empty if it cannot be read."""
    try:
        return read_json(report, ConfigError)
    except ConfigError:
        return {}


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _is_strange(file: Path) -> bool:
    """Whether a file of this name exists that is not ours."""
    return file.exists(follow_symlinks=False) and not is_own(file)


def _check_links(what: str, folder: Path, name: str) -> None:
    """Raise `ConfigError` if writing `name` would write outside `folder`."""
    path = folder / name
    below = strange(path) if path.is_dir() and not path.is_symlink() else ()
    for file in [path] if path.is_symlink() else below:
        holds = f"{what}, which holds {file.relative_to(folder)}"
        if not file.is_symlink():
            raise ConfigError(f"{holds}, a pipe or a device; name a new or empty folder.")
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{holds}, a link to {file.resolve()}; name a new or empty folder.")


def _unlisted(folder: Path, part: str, reports: Iterable[Path]) -> list[str]:
    """Files in `part` that no report lists with their present content.

    A report of an earlier version lists no files; if the weights are those that it names, all files
    in `part` are ours.
    """
    if not (folder / part).is_dir():
        return [part] if (folder / part).exists(follow_symlinks=False) else []
    listed: dict[str, Any] = {}
    for report in map(_read, reports):
        if WRITTEN in report:
            listed |= written_before(report)
        elif _has_weights(folder / part, report.get("policy")):
            return []
    found = []
    for file in sorted((folder / part).rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_dir() and (name not in listed or listed[name] != _hash(file)):
            found.append(name)
    return found


def _has_weights(checkpoint: Path, policy: Any) -> bool:
    """Whether the weights in a checkpoint are those that a report's entry `policy` names."""
    weights = checkpoint / "model.safetensors"
    if not weights.is_file() or not isinstance(policy, dict):
        return False
    named = policy.get("sha256")
    return isinstance(named, str) and len(named) >= _NAMED and _hash(weights).startswith(named)


def _path(option: str, text: str) -> Path:
    if not text.strip():
        raise ConfigError(f"--{option} is empty; it must name a path to write to.")
    path = Path(text)
    try:
        existing = next(
            place
            for place in (path, *path.absolute().parents)
            if place.exists(follow_symlinks=False)
        )
    except OSError as error:
        raise ConfigError(
            f"--{option} is {text[:200]!r}; it cannot be a path ({error.strerror})."
        ) from error
    if existing != path and not existing.is_dir():
        raise ConfigError(f"--{option} is {text!r}, but {existing} is a file; name another folder.")
    return path


def default_console() -> Console:
    """The terminal; in a file or a pipe, output as wide as the tables need."""
    return Console() if Console().is_terminal else Console(width=120)
