"""Ranges of the states and actions in the training data of a checkpoint.

They come from the checkpoint's normalisation files, read without torch, which the node may not
have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ceed_vla.errors import CheckpointError
from ceed_vla.files import plain_name, read_json, regular
from ceed_vla.folders import POSTPROCESSOR, PREPROCESSOR, resolve_served
from ceed_vla.kinematics import Array
from ceed_vla.texts import short

ACTION = "action"
_MOST_HEADER = 1_000_000  # [bytes]
_MOST_VALUES = 10_000  # largest size of one statistic of a state or an action
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_NORMALIZER, _UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
_RELATIVE = "relative_actions_processor"
_PAIRS = (("q01", "q99"), ("min", "max"), ("q10", "q90"))


@dataclass(frozen=True)
class Range:
    """Range of a feature in the training data, in the data's units."""

    low: Array  # (D,)
    high: Array  # (D,)
    source: str  # of both ends: "q01 to q99", "mean -+ std", ...
    measured: bool = True  # False: the range that actions can take at all, for any data

    def part(self, begin: int, length: int) -> Range:
        """Return the range of some of the dimensions."""
        end = begin + length
        return Range(self.low[begin:end], self.high[begin:end], self.source, self.measured)


def read_ranges(checkpoint: str, lengths: Mapping[str, int]) -> dict[str, Range | str]:
    """Return the range of every feature in `lengths` (feature -> D), or why it is unknown.

    `CheckpointError`: The checkpoint's files are damaged.
    """
    folder = resolve_served(checkpoint)
    before = _steps(folder, PREPROCESSOR)
    after = _steps(folder, POSTPROCESSOR)
    relative = before.get(_RELATIVE, ({}, None))[0].get("enabled")
    found: dict[str, Range | str] = {}
    for feature, length in lengths.items():
        if feature == ACTION and relative:
            found[feature] = "its actions are relative to the state"
            continue
        files = [before.get(_NORMALIZER, ({}, None))[1]]
        if feature == ACTION:
            files.insert(0, after.get(_UNNORMALIZER, ({}, None))[1])
        ranges = (_normalised_by(file, feature, length) for file in files if file is not None)
        found[feature] = next(filter(None, ranges), "the checkpoint has no statistics of it")
    if isinstance(found.get(ACTION), str) and not relative:
        bins = _bins(read_json(folder / "config.json").get("action_tokens"), lengths[ACTION])
        found[ACTION] = bins or found[ACTION]
    return found


def _steps(folder: Path, name: str) -> dict[str, tuple[dict[str, Any], Path | None]]:
    """Map the name of each step of a processor to its settings and the file of its tensors."""
    file = folder / name
    entries = read_json(file).get("steps")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{file} is not a processor file: it needs 'steps'; copy it again.")
    found = {}
    for entry in entries:
        settings = entry.get("config")
        state = entry.get("state_file")
        path = None
        if state is not None:
            path = folder / plain_name(state, f"{file}: a state_file")
        settings = settings if isinstance(settings, dict) else {}
        found[str(entry.get("registry_name"))] = settings, path
    return found


def _normalised_by(file: Path, feature: str, length: int) -> Range | None:
    """Return the range from a normaliser's statistics; None if none has this length."""
    tensor = _tensors(file)

    def get(name: str) -> Array | None:
        values = tensor(f"{feature}.{name}")
        fits = values is not None and values.shape == (length,) and np.isfinite(values).all()
        return values if fits else None

    for lowest, highest in _PAIRS:
        low = get(lowest)
        high = get(highest)
        if low is not None and high is not None and (low <= high).all():
            return Range(low, high, f"{lowest} to {highest}")
    mean = get("mean")
    std = get("std")
    if mean is None or std is None or (std < 0.0).any():
        return None
    return Range(mean - std, mean + std, "mean -+ std")


def _bins(settings: Any, length: int) -> Range | None:
    """Return the range of the action bins of a CEED-VLA checkpoint; None if it has none."""
    if not isinstance(settings, dict):
        return None
    for lowest, highest in (("action_low", "action_high"), ("q01", "q99")):
        low = settings.get(lowest)
        high = settings.get(highest)
        if isinstance(low, list) and isinstance(high, list) and len(low) == len(high) == length:
            try:
                ends = np.array([low, high], dtype=np.float64)
            except (TypeError, ValueError):
                return None
            if np.isfinite(ends).all():
                fixed = settings.get("action_range") == "fixed"
                return Range(ends[0], ends[1], "the ends of the action bins", not fixed)
    return None


def _tensors(file: Path) -> Callable[[str], Array | None]:
    """Return a function that reads a tensor of a safetensors file by name.

    The function returns None if the tensor is missing or of another type.
    `CheckpointError`: The file is damaged.
    """
    damaged = CheckpointError(f"The statistics {file} do not load; copy them again.")
    try:
        with regular(file).open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            if size > _MOST_HEADER:
                raise damaged
            header = json.loads(content.read(size))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(header, dict):
        raise damaged

    def get(name: str) -> Array | None:
        entry = header.get(name)
        if entry is None:
            return None
        try:
            begin, end = (int(place) for place in entry["data_offsets"])
            kind = _TYPES.get(entry["dtype"])
            shape = tuple(int(side) for side in entry["shape"])
            count = math.prod(shape)
            if kind is None or not 0 < count <= _MOST_VALUES:
                return None
            if not 0 <= end - begin <= 8 * _MOST_VALUES:
                raise ValueError(f"{end - begin} bytes")
            with file.open("rb") as content:
                content.seek(8 + size + begin)
                data = content.read(end - begin)
            return np.frombuffer(data, kind, count).reshape(shape).astype(np.float64)
        except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"The statistics {file} do not load ({short(name)})"
            raise CheckpointError(f"{what}; copy them again.") from error

    return get
