"""msgpack with numpy arrays, as openpi and vla-eval send them. Nothing of a message is executed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from ceed_vla.errors import CeedVLAError
from ceed_vla.texts import shown

MOST_ITEMS = 10_000  # of all lists and mappings of a message together
MOST_DIMENSIONS = 8  # of an array
MOST_LEVELS = 16  # of nested lists and mappings
_KINDS = "biuf"  # of arrays: booleans, whole numbers, floats


class WireError(CeedVLAError):
    """A message does not follow its protocol."""


def packed(value: Any, names: type[bytes] | type[str] = bytes) -> bytes:
    """Pack a value.

    Args:
        value: Numbers, text, bytes, arrays, numpy's numbers, and lists and mappings of these.
        names: Type of the keys of arrays: bytes for openpi, str for vla-eval.

    Raises:
        WireError: An array has another type of elements.
    """
    marks = _Marks(names)
    packed: bytes = msgpack.packb(value, default=marks.written)
    return packed


def unpacked(message: bytes) -> Any:
    """Unpack a message; arrays may have keys of either type.

    Raises:
        WireError: It is not msgpack, is nested too deeply, has too many items, or an array whose
            type, shape and data do not fit together.
    """
    count = _Count()
    try:
        value = msgpack.unpackb(
            message,
            object_hook=lambda value: _read(count.add(value)),
            list_hook=count.add,
            strict_map_key=True,
            max_array_len=MOST_ITEMS,
            max_map_len=MOST_ITEMS,
        )
    except WireError:
        raise
    except Exception as error:  # the library has many types, and a stack error of its own
        raise WireError(
            f"The message of {len(message)} bytes is not msgpack with at most {MOST_ITEMS} items "
            f"a list ({type(error).__name__}: {str(error)[:100]})."
        ) from error
    _check_levels(value, 0)
    return value


class _Count:
    """Counts the items of a message while it is unpacked, as small ones take much memory."""

    def __init__(self) -> None:
        self.items = 0

    def add(self, value: Any) -> Any:
        """Count a list or mapping, and return it; raises `WireError` if there are too many."""
        self.items += 1 + len(value)
        if self.items > MOST_ITEMS:
            raise WireError(f"The message has more than {MOST_ITEMS} items.")
        return value


class _Marks:
    """Keys by which a mapping stands for an array."""

    def __init__(self, names: type[bytes] | type[str]) -> None:
        keys = ("__ndarray__", "__npgeneric__", "data", "dtype", "shape")
        named = [key if names is str else key.encode() for key in keys]
        self.array, self.number, self.data, self.dtype, self.shape = named

    def written(self, value: Any) -> dict[Any, Any]:
        """What is packed in place of an array or a number of numpy."""
        if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind not in _KINDS:
            raise WireError(f"{shown(value)} ({type(value).__name__}) cannot be sent.")
        if isinstance(value, np.ndarray):
            return {
                self.array: True,
                self.data: value.tobytes(),
                self.dtype: value.dtype.str,
                self.shape: list(value.shape),
            }
        return {self.number: True, self.data: value.item(), self.dtype: value.dtype.str}


_BYTES, _TEXT = _Marks(bytes), _Marks(str)


def _read(value: dict[Any, Any]) -> Any:
    """The array or number that a mapping stands for, or the mapping."""
    for marks in (_BYTES, _TEXT):
        if marks.array in value:
            return _array(value, marks)
        if marks.number in value:
            return _number(value, marks)
    return value


def _array(value: Mapping[Any, Any], marks: _Marks) -> np.ndarray:
    dtype = _dtype(value.get(marks.dtype))
    shape, data = value.get(marks.shape), value.get(marks.data)
    sizes = shape if isinstance(shape, list | tuple) else None
    if (
        sizes is None
        or len(sizes) > MOST_DIMENSIONS
        or not all(type(size) is int and size >= 0 for size in sizes)
        or not isinstance(data, bytes)
        or math.prod(sizes) * dtype.itemsize != len(data)
    ):
        size = len(data) if isinstance(data, bytes) else f"no ({type(data).__name__})"
        raise WireError(
            f"An array has the shape {shown(shape)} of {dtype} and {size} bytes; they must fit "
            f"together, with at most {MOST_DIMENSIONS} dimensions."
        )
    # Its own memory, in this machine's byte order
    return np.frombuffer(data, dtype).reshape(sizes).astype(dtype.newbyteorder("="))


def _number(value: Mapping[Any, Any], marks: _Marks) -> Any:
    dtype, number = _dtype(value.get(marks.dtype)), value.get(marks.data)
    if not isinstance(number, bool | int | float):
        raise WireError(f"A number of numpy is {shown(number)}; it must be a number.")
    try:
        return dtype.type(number)
    except (OverflowError, ValueError, TypeError) as error:
        raise WireError(f"A number of numpy is {shown(number)}, which is no {dtype}.") from error


def _dtype(name: Any) -> np.dtype[Any]:
    """The type of elements called `name`, for example ``|u1`` or ``<f4``."""
    text = name.decode("ascii", "replace") if isinstance(name, bytes) else name
    plain = isinstance(text, str) and len(text) <= 8 and text[:1] in "<>|=" and text[1:2] in _KINDS
    try:
        dtype = np.dtype(text) if plain else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in _KINDS or dtype.shape:
        raise WireError(
            f"An array has elements of type {shown(name)}; they must be booleans, whole numbers or "
            "floats, for example '|u1' or '<f4'."
        )
    return dtype


def _check_levels(value: Any, level: int) -> None:
    """Raise `WireError` for a value that is nested too deeply."""
    if level > MOST_LEVELS:
        raise WireError(f"The message is nested in more than {MOST_LEVELS} levels.")
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inside:
        _check_levels(part, level + 1)
