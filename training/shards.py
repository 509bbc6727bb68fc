"""Shards of trajectories: what a file may hold, checked in one place, whoever wrote it."""

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
MOST_TOKENS = np.iinfo(np.int16).max  # values of a token
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
    """``meta.json``, if its layout and counts are what `collect` writes; `DatasetError` if it is
    missing or damaged.
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
            raise DatasetError(f"{file} is no shard of trajectories; move it elsewhere.")
        regular(file, DatasetError)
    return files


def read_shard(
    file: Path, meta: dict[str, Any], frames: NDArray[np.int64] | None = None
) -> pa.Table:
    """A complete shard, of the layout in `meta` and with those `frames`, where they are known.

    A `DatasetError` names the file and what is wrong in it.
    """

    def require(fits: Any, what: str) -> None:
        if not fits:
            raise DatasetError(
                f"{file}: {what}. Remove it, and collect it again with --resume=true."
            )

    sets = meta["datasets"]
    n = meta["block_length"]
    bins = meta["num_bins"]
    name = _NAME.fullmatch(file.name)
    require(
        name and int(name[1]) < len(sets), f"its name stands for none of the {len(sets)} data sets"
    )
    assert name is not None
    number = int(name[1])
    most = sets[int(name[1])]["frames"]
    with readable(file, "remove it, and collect it again with --resume=true"):
        # Jacobi decoding ends after n iterations
        most_states = (n + 2) * n if meta["states"] else n
        shapes = {key: (n if kind == _BLOCK else 1,) for key, kind in SCHEMA.items()}
        shapes["states"] = (most_states,)
        opened = open_parquet(file, shapes)
        require(
            0 < opened.metadata.num_rows <= most,
            f"it has {opened.metadata.num_rows} rows of {most} frames",
        )
        found = {field.name: field.type for field in opened.schema_arrow}
        require(
            found == SCHEMA,
            f"it has the columns {str(found)[:300]}, not {', '.join(SCHEMA)} of 16-bit blocks",
        )
        table = read_table(file, shapes, Budget([file]))
        table.validate(full=True)
        for key, kind in SCHEMA.items():
            nulls = table[key].null_count + (
                pc.list_flatten(table[key]).null_count if kind == _BLOCK else 0
            )
            require(not nulls, f"{key} has {nulls} empty values")
    root, frame = (table[key].to_numpy() for key in ("root", "frame"))
    require((root == number).all(), f"root is {root.min()}..{root.max()}, its name says {number}")
    inside = frame.min() >= 0 and frame.max() < most and len(np.unique(frame)) == len(frame)
    require(
        inside,
        f"frame is {frame.min()}..{frame.max()}; the data set has {most} frames, each at most once",
    )
    if frames is not None:
        require(
            np.array_equal(np.sort(frame), np.sort(frames)),
            f"it holds {len(frame)} other frames than it should",
        )
    kinds = pc.unique(table["guess_kind"]).to_pylist()
    require(
        set(kinds) <= set(GUESSES), f"guess_kind is {str(kinds)[:100]}, not {', '.join(GUESSES)}"
    )
    for key in ("guess", "previous", "fixed_point"):
        longest = lengths_of(table[key])
        require(
            (longest == n).all(),
            f"{key} has blocks of {longest.min()}..{longest.max()} tokens, not {n}",
        )
    guess, previous, fixed = (blocks(table, key, n) for key in ("guess", "previous", "fixed_point"))
    lengths = lengths_of(table["states"])
    states = pc.list_flatten(table["states"]).to_numpy()
    steps = table["iterations"].to_numpy()
    for key, tokens in (("guess", guess), ("fixed_point", fixed), ("states", states)):
        right = not len(tokens) or 0 <= tokens.min() <= tokens.max() < bins
        require(right, f"{key} has tokens outside [0, {bins})")
    none = (previous == -1).all(1)
    require(
        ((previous >= 0) & (previous < bins)).all(1)[~none].all(),
        f"previous has tokens outside [0, {bins})",
    )
    require((steps >= 1).all(), f"iterations is {steps.min()}")
    if not meta["states"]:
        require(not len(states), "it has states, which were not to be kept")
        return table
    require(
        (lengths == (steps + 1) * n).all(), f"states are not iterations + 1 blocks of {n} tokens"
    )
    rows = np.split(states, np.cumsum(lengths)[:-1])
    ends = all(
        (r[:n] == g).all() and (r[-n:] == f).all()
        for r, g, f in zip(rows, guess, fixed, strict=True)
    )
    require(ends, "states do not lead from guess to fixed_point")
    return table


def lengths_of(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return pc.list_value_length(column).to_numpy().astype(np.int64)  # type: ignore[no-any-return]


def blocks(table: pa.Table, name: str, n: int) -> NDArray[np.int16]:
    """A column of blocks (N, n) of a checked shard."""
    return pc.list_flatten(table[name]).to_numpy().reshape(-1, n)  # type: ignore[no-any-return]
