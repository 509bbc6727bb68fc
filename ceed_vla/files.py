"""Reading and writing files: untrusted input is validated, output is written atomically.

Names that are read from a file (of cameras, shards, states) must be plain names, so that paths made
of them stay in their folder.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError
from ceed_vla.fields import short

MOST_SETTINGS = 2**24  # [bytes] of a file of settings
MOST_DIGITS = 400  # of a number; the largest that is a float has 309
MOST_DEPTH = 100  # nesting levels; code that reads the values recurses into them
# in one file: each takes about a hundred bytes of memory, however short it is in the file
MOST_VALUES = 10**6
LONGEST_NAME = 200


def read_json(
    file: Path,
    error: type[CeedVLAError] = CheckpointError,
    *,
    most: int = MOST_SETTINGS,
    values: int = MOST_VALUES,
) -> dict[str, Any]:
    """Read a JSON object of at most `most` bytes and about `values` values; else raise `error`."""
    content = read_bytes(file, error, most=most)
    try:
        found = parse_json(content.decode("utf-8"), values)
    except ValueError as problem:
        raise error(f"{file} is not JSON ({str(problem)[:200]}); copy it again.") from problem
    if not isinstance(found, dict):
        raise error(f"{file} holds a {type(found).__name__} instead of settings; copy it again.")
    return found


def parse_json(text: str, most: int = MOST_VALUES) -> Any:
    """Parse JSON of about `most` values and without duplicate keys; else raise `ValueError`."""
    count = sum(map(text.count, "[{,"))  # at least the number of values minus one
    if count > most:
        raise ValueError(f"it has about {count} values; at most {most} are read")
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_int=whole)
    except (RecursionError, MemoryError) as problem:
        raise ValueError("it is nested too deep, or takes too much memory") from problem
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"it is nested too deep; {MOST_DEPTH} levels are read")


def count_values(value: Any) -> int:
    """Number of values in parsed JSON, nested ones included."""
    count = 0
    waiting = [value]
    while waiting:
        count += 1
        waiting.extend(_inside(waiting.pop()))
    return count


def _inside(value: Any) -> Iterable[Any]:
    """The values in a mapping or list; none for another value."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_text(
    file: Path, error: type[CeedVLAError] = CheckpointError, *, most: int = MOST_SETTINGS
) -> str:
    """Read a UTF-8 file of at most `most` bytes; else raise `error`."""
    try:
        return read_bytes(file, error, most=most).decode("utf-8")
    except ValueError as problem:
        raise error(
            f"{file} is not text in UTF-8 ({str(problem)[:200]}); copy it again."
        ) from problem


def read_bytes(file: Path, error: type[CeedVLAError] = CheckpointError, *, most: int) -> bytes:
    """Read a file of at most `most` bytes; else raise `error`.

    The bytes are counted, because the size that a special file declares may be wrong.
    """
    regular(file, error)
    try:
        with file.open("rb") as content:
            found = content.read(most + 1)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{file} cannot be read ({reason}); is this the right folder?") from problem
    if len(found) > most:
        raise error(f"{file} has more than {most / 1e6:.0f} MB, the most that is read of it.")
    return found


def whole(text: str) -> int:
    """Parse a whole number of at most `MOST_DIGITS` digits; else raise `ValueError`."""
    if len(text) > MOST_DIGITS:
        raise ValueError(f"it has a number of {len(text)} digits; at most {MOST_DIGITS} are read")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"duplicate key among {', '.join(list(values)[:5])}")
    return values


def regular(file: Path, error: type[CeedVLAError] = CheckpointError) -> Path:
    """Return `file`; raise `error` if it is, or links to, a folder, pipe, socket or device.

    Reading a pipe or a device may never end. A missing file passes: its reader reports it.
    """
    try:
        is_file = stat.S_ISREG(file.stat().st_mode)
    except (OSError, ValueError):
        return file
    if not is_file:
        raise error(f"{file} cannot be read: it must be a file, not a folder, pipe or device.")
    return file


def strange(folder: Path) -> Iterator[Path]:
    """Entries below `folder` that are neither file nor folder: links, pipes, devices.

    `folder` itself may be a link.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield path


def plain_name(name: object, what: str, error: type[CeedVLAError] = CheckpointError) -> str:
    """Return `name`, read from a file, if a path of it stays in its folder; else raise `error`.

    The message calls it `what`.
    """
    plain = isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()
    if not plain or any(mark in str(name) for mark in "/\\:") or str(name).strip(". ") == "":
        raise error(
            f"{what} is {str(name)[:LONGEST_NAME]!r}; it must be a plain name, without a path."
        )
    return str(name)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `file` atomically if the block succeeds.

    An interrupt or a full disk leaves the old file. The temporary name has the same suffix, because
    libraries choose the format by it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # The name is random, so that no link can have been placed there.
    temporary = file.with_name(f".{file.stem}.{token_hex(8)}.tmp{file.suffix}")
    try:
        yield temporary
        settle(temporary)
        temporary.replace(file)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            # name the user's file, not the temporary one
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def settle(*files: Path) -> None:
    """Wait until the content of files is on disk.

    Otherwise a power failure may leave a later file that names these, without their content.
    """
    for file in files:
        with file.open("rb+") as content:
            os.fsync(content.fileno())


def write_text(file: Path, text: str) -> None:
    """Replace `file` in one step, so that an interrupt leaves the old or the new text."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def saving(folder: object, options: Mapping[str, Any]) -> Iterator[None]:
    """Check the arguments of LeRobot's ``save_pretrained``, and re-raise its errors.

    Raises:
        ConfigError: `push_to_hub` is set.
        CheckpointError: `folder` is not a path, or cannot be written to.
    """
    from safetensors import SafetensorError

    if not isinstance(folder, str | Path) or not str(folder):
        raise CheckpointError(f"save_directory is {short(folder)}; it must be a folder.")
    if options.get("push_to_hub"):
        raise ConfigError(
            "push_to_hub is true; this package never uploads. Upload the folder with `hf upload`."
        )
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{short(str(folder))} cannot be written ({short(error)}); is there room?"
        ) from error
