"""Where a command writes: never over a file that it did not make.

Every file that we make says so inside (`MADE_BY`), so that the next run can tell its own files from a user's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from ceed_vla import __version__
from ceed_vla.errors import ConfigError

MADE_BY = f"made by ceed-vla {__version__}"
_MARK = b"made by ceed-vla "
_SEARCHED = 2**17  # [bytes] at both ends of a file


def is_own(file: Path) -> bool:
    """Whether `file` says that it was made by us."""
    if not file.is_file():
        return False
    with file.open("rb") as content:
        start = content.read(_SEARCHED)
        content.seek(max(0, file.stat().st_size - _SEARCHED))
        return _MARK in start or _MARK in content.read(_SEARCHED)


def claim_file(option: str, text: str, suffix: str) -> Path:
    """The file that the value `text` of an option names, if it may be written; `ConfigError` for an empty name, another
    suffix, a folder, or a file of somebody else's.
    """
    path = _path(option, text)
    if path.is_dir():
        raise ConfigError(f"--{option} is {text!r}, which is a folder; name a file in it.")
    if path.suffix.lower() != suffix:
        raise ConfigError(f"--{option} is {text!r}; a file with the ending {suffix} is written, so name one.")
    if path.exists(follow_symlinks=False) and not is_own(path):
        raise ConfigError(f"--{option} is {text!r}, a file that ceed-vla did not make; name another.")
    return path


def named_folder(option: str, text: str) -> Path:
    """The folder that an option names; it need not exist. `ConfigError` for an empty name or a file."""
    path = _path(option, text)
    if path.exists(follow_symlinks=False) and not path.is_dir():
        raise ConfigError(f"--{option} is {text!r}, which is a file; name a folder.")
    return path


def claim_folder(option: str, text: str, names: Iterable[str], known_by: Iterable[str]) -> Path:
    """The folder that an option names, if files `names` may be written into it: a new or empty one, or one of ours.

    A file of ours among `known_by` makes a folder ours. `ConfigError` for an empty name, a file, or somebody else's.
    """
    path = named_folder(option, text)
    content = sorted(file.name for file in path.iterdir() if file.name[0] != ".") if path.is_dir() else []
    strange = [name for name in names if (path / name).exists(follow_symlinks=False) and not is_own(path / name)]
    if content and not any(is_own(path / name) for name in known_by):
        strange = strange or content
    if strange:
        what = f"which holds {strange[0]!r} that ceed-vla did not make"
        raise ConfigError(f"--{option} is {text!r}, {what}; name a new or empty folder.")
    return path


def _path(option: str, text: str) -> Path:
    if not text.strip():
        raise ConfigError(f"--{option} is empty; name where to write.")
    path = Path(text)
    try:
        existing = next(place for place in (path, *path.absolute().parents) if place.exists(follow_symlinks=False))
    except OSError as error:
        raise ConfigError(f"--{option} is {text[:200]!r}; it cannot be a path ({error.strerror}).") from error
    if existing != path and not existing.is_dir():
        raise ConfigError(f"--{option} is {text!r}, but {existing} is a file; name another folder.")
    return path


def default_console() -> Console:
    """The terminal; wide enough for the tables where the output is a file or a pipe."""
    return Console() if Console().is_terminal else Console(width=120)
