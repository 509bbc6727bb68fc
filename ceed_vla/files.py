"""Files that others wrote and files that we write: the first are not believed, the second never half written.

Names that a file gives (of cameras, shards, states) are plain names, so that what they lead to stays in its folder.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError
from ceed_vla.fields import short

MOST_JSON = 2**28  # [bytes] of settings, tokenizers included
LONGEST_NAME = 200


def read_json(file: Path, error: type[CeedVLAError] = CheckpointError) -> dict[str, Any]:
    """A JSON object; otherwise raises `error`."""
    regular(file, error)
    try:
        size = file.stat().st_size
        if size > MOST_JSON:
            raise error(f"{file} has {size / 1e6:.0f} MB; settings take less than {MOST_JSON / 1e6:.0f}.")
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as problem:
        raise error(f"{file} cannot be read ({problem.strerror}); is this the right folder?") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{file} is not JSON ({str(problem)[:200]}); copy it again.") from problem
    if not isinstance(values, dict):
        raise error(f"{file} holds a {type(values).__name__} instead of settings; copy it again.")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a name stands there twice, of {', '.join(list(values)[:5])}")
    return values


def regular(file: Path, error: type[CeedVLAError] = CheckpointError) -> Path:
    """`file`, unless it is there and reading it need not end: a pipe, a socket or a device, also behind a link.

    That it exists, its reader checks.
    """
    try:
        is_file = stat.S_ISREG(file.stat().st_mode)
    except (OSError, ValueError):
        return file
    if not is_file:
        raise error(f"{file} cannot be read: it must be a file, not a folder, pipe or device.")
    return file


def strange(folder: Path) -> Iterator[Path]:
    """Links, pipes and whatever else is neither file nor folder below `folder`, which may itself be a link."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield path


def plain_name(name: object, what: str, error: type[CeedVLAError] = CheckpointError) -> str:
    """`name`, as found in a file, if it stays in the folder it is joined to; else `error`, about `what` it names."""
    plain = isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()
    if not plain or any(mark in str(name) for mark in "/\\:") or str(name).strip(". ") == "":
        raise error(f"{what} is {str(name)[:LONGEST_NAME]!r}; it must be a plain name, without a path.")
    return str(name)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; it takes the place of `file` in one step when the block ends well.

    An interrupt or a full disk leaves what was there before. The temporary name keeps the suffix: libraries go by it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Nobody can have put a link there: the name is not known before.
    temporary = file.with_name(f".{file.stem}.{token_hex(8)}.tmp{file.suffix}")
    try:
        yield temporary
        settle(temporary)
        temporary.replace(file)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(file)) from error  # the name that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def settle(*files: Path) -> None:
    """Wait until what was written is on disk: behind a power cut, what names these files must not be all there is."""
    for file in files:
        with file.open("rb+") as content:
            os.fsync(content.fileno())


def write_text(file: Path, text: str) -> None:
    """Replace `file` in one step, so that an interrupt leaves the old or the new text."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def saving(folder: object, options: Mapping[str, Any]) -> Iterator[None]:
    """Check what LeRobot's ``save_pretrained`` is given, and say why it cannot write.

    `ConfigError` if a hub is asked for, `CheckpointError` for no folder's name, or one that cannot be written to.
    """
    from safetensors import SafetensorError

    if not isinstance(folder, str | Path) or not str(folder):
        raise CheckpointError(f"save_directory is {short(folder)}; give a folder.")
    if options.get("push_to_hub"):
        raise ConfigError("push_to_hub is true; nothing here asks a hub: upload the folder with `hf upload`.")
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{short(str(folder))} cannot be written ({short(error)}); is there room?") from error
