"""Limit the memory that untrusted parquet files take, before and while they are read.

A few bytes can unpack to millions: pages are compressed, dictionary entries are repeated, and a
footer may be wrong. Readers allocate memory by the headers of the pages, so these are read first.
Values of variable length are read in batches, whose size a `Budget` limits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ceed_vla.errors import DatasetError
from ceed_vla.files import regular

MOST = 10**9  # values of a column in a row, if the shape is unknown
FREE = 2**26  # [bytes] that files may unpack to, however small they are ...
# ... and further bytes for each byte of the files: constant numbers compress well
RATIO = 256
BATCH = 2**16  # rows
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}  # [bytes]
_HEADERS = (256, 2**14, 2**20)  # [bytes] in which a page's header ends; statistics may make it long
_DEEPEST = 8  # nested structs of a header
_REMEDY = "Make or copy the file again."


class Budget:
    """Bytes that `files` may still unpack to, in all."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.left = FREE + RATIO * sum(regular(file, DatasetError).stat().st_size for file in files)

    def spend(self, count: int, file: Path) -> None:
        """Subtract `count` bytes for a file; `DatasetError` if fewer are left."""
        self.left -= count
        if self.left < 0:
            raise DatasetError(
                f"{file} unpacks to more than {FREE / 1e6:.0f} MB and {RATIO} times the size of "
                "its dataset's files. " + _REMEDY
            )


@dataclass(frozen=True)
class Leaf:
    """A stored column; one or more make up a column of the table."""

    place: int  # index in a row group
    name: str  # name of the table's column
    width: int  # of a value [bytes]; 0 for values of variable length


def open_parquet(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> pq.ParquetFile:
    """Open a parquet file, read its footer, and check the numbers of values that it declares.

    Args:
        file: The file.
        shapes: Largest shape of a row, by column.

    Raises:
        DatasetError: A column declares more values than its rows can have, or the file declares
            more rows than it has bytes.
    """
    opened = pq.ParquetFile(regular(file, DatasetError))
    rows = opened.metadata.num_rows
    size = file.stat().st_size
    if not 0 <= rows <= size:  # a row takes at least a byte
        raise DatasetError(f"{file} says {rows} rows in {size} bytes. {_REMEDY}")
    found = leaves(opened, shapes)
    for number in range(opened.metadata.num_row_groups):
        group = opened.metadata.row_group(number)
        for leaf in found:
            values = group.column(leaf.place).num_values
            most = group.num_rows * math.prod(shapes[leaf.name])
            if not 0 <= values <= most:
                raise DatasetError(
                    f"{file}: {leaf.name} has {values} values in {group.num_rows} rows, of other "
                    f"lengths than its shape, which gives {most}. {_REMEDY}"
                )
    return opened


def leaves(opened: pq.ParquetFile, names: Iterable[str]) -> list[Leaf]:
    """The stored columns of the table's columns `names`."""
    wanted = set(names)
    schema = opened.schema
    known = set(opened.schema_arrow.names)
    found = []
    for place in range(opened.metadata.num_columns):
        column = schema.column(place)
        path = column.path.split(".")  # action.list.element
        prefixes = (".".join(path[:length]) for length in range(len(path), 0, -1))
        name = next((prefix for prefix in prefixes if prefix in known), "")
        if name in wanted:
            fixed = max(column.length, 1) if column.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0
            found.append(Leaf(place, name, _WIDTHS.get(column.physical_type, fixed)))
    return found


def weigh(
    file: Path,
    opened: pq.ParquetFile,
    names: Iterable[str],
    budget: Budget,
    groups: Sequence[int] | None = None,
) -> int:
    """Spend the budget for columns in row groups: for their pages and all values of fixed width.

    Args:
        file: The file.
        opened: The same file, open.
        names: Columns of the table.
        budget: It is reduced.
        groups: Numbers of the row groups; all if None.

    Returns:
        Bytes that one value of variable length takes at most; 0 if all have fixed widths.

    Raises:
        DatasetError: The columns exceed the `budget`, or contradict the footer.
    """
    found = leaves(opened, names)
    longest = 0
    with file.open("rb", buffering=0) as content:
        for number in range(opened.metadata.num_row_groups) if groups is None else groups:
            group = opened.metadata.row_group(number)
            for leaf in found:
                chunk = group.column(leaf.place)
                pages = _pages(file, content.fileno(), chunk)
                budget.spend(sum(pages) + chunk.num_values * leaf.width, file)
                if leaf.width:
                    continue
                if chunk.num_values > group.num_rows:
                    raise DatasetError(
                        f"{file}: {leaf.name} has several texts in a row; it must be numbers, or "
                        f"one text. {_REMEDY}"
                    )
                # a value lies in one page, a dictionary's included
                longest = max(longest, *pages, 1)
    return longest


def read_table(file: Path, shapes: Mapping[str, tuple[int, ...]], budget: Budget) -> pa.Table:
    """Read the columns in `shapes` of a parquet file, see `open_parquet`, within `budget`."""
    names = list(shapes)
    opened = open_parquet(file, shapes)
    if missing := [name for name in names if name not in opened.schema_arrow.names]:
        raise DatasetError(f"{file} has no column {missing[0]}. {_REMEDY}")
    longest = weigh(file, opened, names, budget)
    if not longest:
        return opened.read(columns=names)
    batches: list[pa.RecordBatch] = []
    for batch in opened.iter_batches(batch_rows(longest, budget.left), columns=names):
        budget.spend(batch.nbytes, file)
        batches.append(batch)
    if not batches:
        return opened.read(columns=names)
    return pa.Table.from_batches(batches)


def batch_rows(longest: int, most: int) -> int:
    """Rows of a batch of at most `most` bytes, with values of up to `longest` bytes; at least 1."""
    return min(BATCH, max(1, most // max(longest, 1)))


def _pages(file: Path, descriptor: int, chunk: Any) -> list[int]:
    """Bytes that each page of a column chunk unpacks to, by the headers of the pages.

    As a reader does, it goes from page to page until it has counted all values.
    """
    starts = [chunk.data_page_offset]
    if chunk.has_dictionary_page and (chunk.dictionary_page_offset or 0) > 0:
        starts.append(chunk.dictionary_page_offset)
    at = min(starts)
    seen = 0
    sizes: list[int] = []
    while seen < chunk.num_values:
        unpacked, packed, values, length = _header(file, descriptor, at)
        seen += values
        at += length + packed
        sizes.append(unpacked)
        if (
            min(unpacked, packed, values) < 0
            or seen > chunk.num_values
            or len(sizes) > chunk.num_values + 1
        ):
            raise DatasetError(
                f"{file}: the pages of {chunk.path_in_schema} do not hold the values that it "
                f"declares. {_REMEDY}"
            )
    return sizes


def _header(file: Path, descriptor: int, at: int) -> tuple[int, int, int, int]:
    """Read the header of the page at the offset `at`.

    Returns:
        Bytes of the page unpacked and packed, number of values, and length of the header.
    """
    for length in _HEADERS:
        thrift = _Thrift(os.pread(descriptor, length, at))
        try:
            header = thrift.struct()
            break
        except IndexError:  # the header is longer than `length`
            continue
        except (ValueError, TypeError) as error:
            raise DatasetError(
                f"{file} has a page that cannot be read ({error}). {_REMEDY}"
            ) from error
    else:
        raise DatasetError(f"{file} has a page whose header does not end. {_REMEDY}")
    numbers = [header.get(field) for field in (2, 3)]
    # data page of version 1 or 2; a dictionary page has neither
    data = header.get(5) or header.get(8) or {}
    values = data.get(1, 0) if isinstance(data, dict) else None
    if not all(isinstance(number, int) for number in (*numbers, values)):
        raise DatasetError(f"{file} has a page whose header lacks its length. {_REMEDY}")
    return numbers[0], numbers[1], values, thrift.at  # type: ignore[return-value]


class _Thrift:
    """Parses thrift's compact protocol; `IndexError` at the end of the data."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a struct by number: whole numbers and structs, None for others."""
        if depth > _DEEPEST:
            raise ValueError("its header is nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._whole()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true and false, without a value
            return None
        if kind in (4, 5, 6):
            return self._whole()
        if kind == 12:
            return self.struct(depth + 1)
        if kind in (9, 10):
            self._list(depth)
        elif kind in (3, 7, 8):
            self._skip({3: 1, 7: 8}.get(kind) or self._unsigned())
        else:
            raise ValueError(f"its header has a field of kind {kind}")
        return None

    def _list(self, depth: int) -> None:
        head = self._byte()
        kind = head & 15
        count = head >> 4
        for _ in range(self._unsigned() if count == 15 else count):
            if kind in (1, 2):
                self._skip(1)
            elif kind in (9, 10):
                raise ValueError("its header has a list of lists")
            else:
                self._value(kind, depth + 1)

    def _whole(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its header has a number without end")

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise IndexError
