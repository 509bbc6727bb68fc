"""Read shards of trajectories, and validate their content."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ceed_vla.data.files import is_whole, readable
from ceed_vla.data.parquet import Budget, open_parquet, read_table
from ceed_vla.errors import DatasetError
from ceed_vla.files import read_json, regular

META = "meta.json"
GUESSES = ("previous", "mid", "random")
MOST_TOKENS = np.iinfo(np.int16).max  # largest vocabulary
_BLOCK = pa.list_(pa.int16())
SCHEMA = {
    "root": pa.int16(),
    "frame": pa.int64(),
    "guess_kind": pa.string(),
    "iterations": pa.int64(),
    "guess": _BLOCK,
    "previous": _BLOCK,
    "fixed_point": _BLOCK,
    "states": _BLOCK,
}
_NAME = re.compile(r"data(\d+)-\d{5,}\.parquet")
_COUNTS = ("chunk_size", "action_dim", "num_bins", "shift_steps", "frame_stride", "shards")


def read_meta(folder: Path) -> dict[str, Any]:
    """Read and check ``meta.json``.

    Raises:
        DatasetError: It is missing, damaged, or not of the form that `collect` writes.
    """
    file = folder / META
    if not file.is_file():
        raise DatasetError(
            f"No trajectories at {folder}: no {META} there. `ceed-vla collect` makes them."
        )
    meta = read_json(file, DatasetError)
    meta.setdefault("block_length", None)
    if meta["block_length"] is None and all(
        is_whole(meta.get(name), 1) for name in ("chunk_size", "action_dim")
    ):
        meta["block_length"] = meta["chunk_size"] * meta["action_dim"]
    wrong = [name for name in (*_COUNTS, "block_length") if not is_whole(meta.get(name), 1)]
    wrong += [
        name
        for name, kind in (("teacher", str), ("states", bool))
        if not isinstance(meta.get(name), kind)
    ]
    sets = meta.get("datasets")
    each = sets if isinstance(sets, list) and sets else [None]
    if not all(
        isinstance(s, dict) and isinstance(s.get("name"), str) and is_whole(s.get("frames"), 1)
        for s in each
    ):
        wrong.append("datasets")
    if not wrong and meta["num_bins"] > MOST_TOKENS:
        wrong.append("num_bins")
    if wrong:
        raise DatasetError(
            f"{file}: {wrong[0]} is {str(meta.get(wrong[0]))[:100]!r}, which `ceed-vla collect` "
            "does not write; copy the folder again."
        )
    return meta


def find_shards(folder: Path) -> list[Path]:
    """The shards of a folder, in order; `DatasetError` if other parquet files are among them."""
    files = sorted(file for file in folder.glob("*.parquet") if not file.name.startswith("."))
    for file in files:
        if not _NAME.fullmatch(file.name):
            raise DatasetError(f"{file} is not a shard of trajectories; move it elsewhere.")
        regular(file, DatasetError)
    return files


def read_shard(
    file: Path, meta: dict[str, Any], frames: NDArray[np.int64] | None = None
) -> pa.Table:
    """Read a complete shard.

    Args:
        file: The shard.
        meta: Content of ``meta.json``, with the layout.
        frames: Frames that it must hold (F,); any if None.

    Raises:
        DatasetError: It names the file and the fault.
    """
    number = _data_set_of(file, meta)
    most = meta["datasets"][number]["frames"]
    table = _read_columns(file, meta, most)
    _check_frames(file, table, number, most, frames)
    _check_tokens(file, table, meta)
    _check_states(file, table, meta)
    return table


def _require(file: Path, fits: Any, what: str) -> None:
    """Raise a `DatasetError` about `what` in a file unless it `fits`."""
    if not fits:
        raise DatasetError(f"{file}: {what}. Remove it, and collect it again with --resume=true.")


def _data_set_of(file: Path, meta: dict[str, Any]) -> int:
    """The index of the dataset in the name of a shard."""
    sets = meta["datasets"]
    name = _NAME.fullmatch(file.name)
    known = name and int(name[1]) < len(sets)
    _require(file, known, f"its name has the index of none of the {len(sets)} datasets")
    assert name is not None
    return int(name[1])


def _read_columns(file: Path, meta: dict[str, Any], most: int) -> pa.Table:
    """Read the columns of `SCHEMA`, of at most `most` rows and without empty values."""
    n = meta["block_length"]
    # Jacobi decoding ends after n iterations
    most_states = (n + 2) * n if meta["states"] else n
    shapes = {key: (n if kind == _BLOCK else 1,) for key, kind in SCHEMA.items()}
    shapes["states"] = (most_states,)
    with readable(file, "remove it, and collect it again with --resume=true"):
        opened = open_parquet(file, shapes)
        rows = opened.metadata.num_rows
        _require(file, 0 < rows <= most, f"it has {rows} rows for {most} frames")
        found = {field.name: field.type for field in opened.schema_arrow}
        _require(
            file,
            found == SCHEMA,
            f"it has the columns {str(found)[:300]}, not {', '.join(SCHEMA)} of 16-bit blocks",
        )
        table = read_table(file, shapes, Budget([file]))
        table.validate(full=True)
        for key, kind in SCHEMA.items():
            nulls = table[key].null_count + (
                pc.list_flatten(table[key]).null_count if kind == _BLOCK else 0
            )
            _require(file, not nulls, f"{key} has {nulls} empty values")
    return table


def _check_frames(
    file: Path, table: pa.Table, number: int, most: int, frames: NDArray[np.int64] | None
) -> None:
    """Check that rows are of distinct frames of dataset `number`, and of `frames` unless None."""
    root = table["root"].to_numpy()
    frame = table["frame"].to_numpy()
    _require(
        file, (root == number).all(), f"root is {root.min()}..{root.max()}, its name has {number}"
    )
    inside = frame.min() >= 0 and frame.max() < most and len(np.unique(frame)) == len(frame)
    _require(
        file,
        inside,
        f"frame is {frame.min()}..{frame.max()}; the dataset has {most} frames, each at most once",
    )
    if frames is not None:
        _require(
            file,
            np.array_equal(np.sort(frame), np.sort(frames)),
            f"it holds {len(frame)} other frames than expected",
        )
    kinds = pc.unique(table["guess_kind"]).to_pylist()
    _require(
        file,
        set(kinds) <= set(GUESSES),
        f"guess_kind is {str(kinds)[:100]}, not {', '.join(GUESSES)}",
    )


def _check_tokens(file: Path, table: pa.Table, meta: dict[str, Any]) -> None:
    """Check that blocks have `block_length` tokens below `num_bins`; `previous` may be all -1."""
    n = meta["block_length"]
    bins = meta["num_bins"]
    for key in ("guess", "previous", "fixed_point"):
        lengths = lengths_of(table[key])
        _require(
            file,
            (lengths == n).all(),
            f"{key} has blocks of {lengths.min()}..{lengths.max()} tokens, not {n}",
        )
    for key in ("guess", "fixed_point", "states"):
        tokens = pc.list_flatten(table[key]).to_numpy()
        right = not len(tokens) or 0 <= tokens.min() <= tokens.max() < bins
        _require(file, right, f"{key} has tokens outside [0, {bins})")
    previous = blocks(table, "previous", n)
    none = (previous == -1).all(1)
    _require(
        file,
        ((previous >= 0) & (previous < bins)).all(1)[~none].all(),
        f"previous has tokens outside [0, {bins})",
    )


def _check_states(file: Path, table: pa.Table, meta: dict[str, Any]) -> None:
    """Check that stored states lead from guess to fixed point in `iterations` iterations."""
    n = meta["block_length"]
    steps = table["iterations"].to_numpy()
    states = pc.list_flatten(table["states"]).to_numpy()
    _require(file, (steps >= 1).all(), f"iterations is {steps.min()}")
    if not meta["states"]:
        _require(file, not len(states), f"it has states, but {META} excludes them")
        return
    lengths = lengths_of(table["states"])
    _require(
        file,
        (lengths == (steps + 1) * n).all(),
        f"states are not iterations + 1 blocks of {n} tokens",
    )
    rows = np.split(states, np.cumsum(lengths)[:-1])
    guesses = blocks(table, "guess", n)
    fixed_points = blocks(table, "fixed_point", n)
    ends = all(
        (row[:n] == guess).all() and (row[-n:] == fixed).all()
        for row, guess, fixed in zip(rows, guesses, fixed_points, strict=True)
    )
    _require(file, ends, "states do not lead from guess to fixed_point")


def lengths_of(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return pc.list_value_length(column).to_numpy().astype(np.int64)  # type: ignore[no-any-return]


def blocks(table: pa.Table, name: str, n: int) -> NDArray[np.int16]:
    """A column of blocks (N, n) of a checked shard."""
    return pc.list_flatten(table[name]).to_numpy().reshape(-1, n)  # type: ignore[no-any-return]
