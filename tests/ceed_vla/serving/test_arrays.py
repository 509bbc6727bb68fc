"""msgpack with arrays: values come back as they were sent, and malformed messages are refused."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest

from ceed_vla.serving.arrays import MOST_LEVELS, WireError, packed, unpacked


@pytest.mark.parametrize("names", [bytes, str])
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">f4", "<f8", "?", "<f2"])
def test_arrays_come_back(names: Any, dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    value = {"a": array, "list": [np.float32(1.5), 2, None, True, "text", b"bytes"]}
    found = unpacked(packed(value, names))
    np.testing.assert_array_equal(found["a"], array)
    assert found["a"].flags.writeable
    assert found["a"].dtype.isnative
    assert found["list"] == [1.5, 2, None, True, "text", b"bytes"]


def test_the_keys_are_those_of_openpi() -> None:
    raw = msgpack.unpackb(packed({"x": np.zeros((1, 2), np.float32)}))
    keys = {b"__ndarray__": True, b"dtype": "<f4", b"shape": [1, 2], b"data": b"\0" * 8}
    assert raw == {"x": keys}


def array(**changes: Any) -> bytes:
    value = {b"__ndarray__": True, b"dtype": "<f4", b"shape": [2], b"data": b"\0" * 8}
    value |= {key.encode(): item for key, item in changes.items()}
    packed: bytes = msgpack.packb(value)
    return packed


BAD = {
    "nothing": (b"", "not msgpack"),
    "no msgpack": (b"\xc1", "not msgpack"),
    "truncated": (array()[:-1], "not msgpack"),
    "more after it": (array() + b"\0", "not msgpack"),
    "a gigabyte is announced": (b"\xc6\x40\0\0\0", "not msgpack"),
    "a list of many": (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
    "nested": (b"\x91" * (MOST_LEVELS + 1) + b"\x90", "nested in more than 16 levels"),
    "nested deeply": (b"\x91" * 100_000 + b"\x90", "not msgpack"),
    "objects": (array(dtype="|O"), "elements of type '|O'"),
    "text": (array(dtype="<U2"), "elements of type '<U2'"),
    "complex": (array(dtype="<c8"), "elements of type '<c8'"),
    "records": (array(dtype="i4,i4"), "elements of type 'i4,i4'"),
    "a type that is no text": (array(dtype=[["a", "<f4"]]), "elements of type"),
    "too few bytes": (array(shape=[3]), "they must fit together"),
    "a negative shape": (array(shape=[-1, -2]), "they must fit together"),
    "a huge shape": (array(shape=[2**62, 4]), "they must fit together"),
    "many dimensions": (array(shape=[1] * 8 + [2]), "at most 8 dimensions"),
    "a shape of text": (array(shape="2"), "they must fit together"),
    "data of text": (array(data="12345678"), "they must fit together"),
    "a number of text": (
        msgpack.packb({b"__npgeneric__": True, b"dtype": "<f4", b"data": "x"}),
        "must be a number",
    ),
    "a number that does not fit": (
        msgpack.packb({b"__npgeneric__": True, b"dtype": "|u1", b"data": 300}),
        "which is no uint8",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_messages(case: str) -> None:
    message, expected = BAD[case]
    with pytest.raises(WireError, match=expected.replace("|", r"\|")):
        unpacked(message)


def test_what_cannot_be_sent() -> None:
    for value in (np.array([object()]), np.array(["text"]), {1, 2}, np.array([1j])):
        with pytest.raises(WireError, match="cannot be sent"):
            packed({"x": value})
