"""Reading and writing files: untrusted input is validated, output is written atomically.

Names that a file gives (of cameras, shards, states) are plain names, so that what they lead to
stays in its folder.
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
MOST_DEPTH = 100  # of values in values, which whoever reads them follows down
# of one: each takes some hundred bytes of memory, whatever it takes in the file
MOST_VALUES = 10**6
LONGEST_NAME = 200


def read_json(
    file: Path,
    error: type[CeedVLAError] = CheckpointError,
    *,
    most: int = MOST_SETTINGS,
    values: int = MOST_VALUES,
) -> dict[str, Any]:
    """A JSON object of at most `most` bytes and about `values` values; otherwise raises `error`."""
    content = read_bytes(file, error, most=most)
    try:
        found = parse_json(content.decode("utf-8"), values)
    except ValueError as problem:
        raise error(f"{file} is not JSON ({str(problem)[:200]}); copy it again.") from problem
    if not isinstance(found, dict):
        raise error(f"{file} holds a {type(found).__name__} instead of settings; copy it again.")
    return found


def parse_json(text: str, most: int = MOST_VALUES) -> Any:
    """The value of JSON `text`, of about `most` values and without a repeated name; otherwise
    `ValueError`.
    """
    count = sum(map(text.count, "[{,"))  # at least the number of values but one
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
    """Values in what JSON holds, nested ones included."""
    count = 0
    waiting = [value]
    while waiting:
        count += 1
        waiting.extend(_inside(waiting.pop()))
    return count


def _inside(value: Any) -> Iterable[Any]:
    """The values in a mapping or list; none in another value."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_text(
    file: Path, error: type[CeedVLAError] = CheckpointError, *, most: int = MOST_SETTINGS
) -> str:
    """The UTF-8 text of a file of at most `most` bytes; otherwise raises `error`."""
    try:
        return read_bytes(file, error, most=most).decode("utf-8")
    except ValueError as problem:
        raise error(
            f"{file} is not text in UTF-8 ({str(problem)[:200]}); copy it again."
        ) from problem


def read_bytes(file: Path, error: type[CeedVLAError] = CheckpointError, *, most: int) -> bytes:
    """The content of a file of at most `most` bytes, whatever size it declares; otherwise raises
    `error`.
    """
    regular(file, error)
    try:
        with file.open("rb") as content:
            found = content.read(most + 1)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{file} cannot be read ({reason}); is this the right folder?") from problem
    if len(found) > most:
        raise error(f"{file} has more than {most / 1e6:.0f} MB, the most that such a file takes.")
    return found


def whole(text: str) -> int:
    """The whole number that a text of digits stands for; `ValueError` for one of too many
    digits.
    """
    if len(text) > MOST_DIGITS:
        raise ValueError(f"it has a number of {len(text)} digits; at most {MOST_DIGITS} are read")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a name stands there twice, of {', '.join(list(values)[:5])}")
    return values


def regular(file: Path, error: type[CeedVLAError] = CheckpointError) -> Path:
    """`file`, unless it is there and reading it need not end: a pipe, a socket or a device, also
    behind a link.

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
    """Links, pipes and whatever else is neither file nor folder below `folder`, which may itself be
    a link.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield path


def plain_name(name: object, what: str, error: type[CeedVLAError] = CheckpointError) -> str:
    """`name`, as found in a file, if it stays in the folder it is joined to; else `error`, about
    `what` it names.
    """
    plain = isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()
    if not plain or any(mark in str(name) for mark in "/\\:") or str(name).strip(". ") == "":
        raise error(
            f"{what} is {str(name)[:LONGEST_NAME]!r}; it must be a plain name, without a path."
        )
    return str(name)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; it takes the place of `file` in one step when the block
    ends well.

    An interrupt or a full disk leaves what was there before. The temporary name keeps the suffix:
    libraries go by it.
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
            # the name that the user knows
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def settle(*files: Path) -> None:
    """Wait until what was written is on disk: behind a power cut, what names these files must not
    be all there is.
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
    """Check what LeRobot's ``save_pretrained`` is given, and say why it cannot write.

    `ConfigError` if a hub is asked for, `CheckpointError` for no folder's name, or one that cannot
    be written to.
    """
    from safetensors import SafetensorError

    if not isinstance(folder, str | Path) or not str(folder):
        raise CheckpointError(f"save_directory is {short(folder)}; give a folder.")
    if options.get("push_to_hub"):
        raise ConfigError(
            "push_to_hub is true; nothing here asks a hub: upload the folder with `hf upload`."
        )
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{short(str(folder))} cannot be written ({short(error)}); is there room?"
        ) from error
