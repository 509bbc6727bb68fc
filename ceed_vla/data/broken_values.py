"""Find NaN, infinite and absurdly large values by feature and episode, and name the remedy."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import DatasetError
from ceed_vla.wording import counted, numbered

EDIT = "lerobot-edit-dataset"
LARGEST_NUMBER = 1e9  # in any unit; larger numbers are broken


@dataclass(frozen=True)
class BrokenValues:
    """Values of one feature that are broken in one way.

    Attributes:
        feature: Name of the feature.
        kind: "NaN", "infinite" or "beyond 1e+09".
        episodes: Episode -> number of its frames with a broken value.
        frame: The first frame of the dataset with a broken value.
    """

    feature: str
    kind: str
    episodes: dict[int, int]
    frame: int

    def __str__(self) -> str:
        frames = counted(sum(self.episodes.values()), "frame")
        return (
            f"{self.feature} is {self.kind} in {frames} of "
            f"{numbered('episode', list(self.episodes))}"
        )


def find_broken(
    vectors: Mapping[str, NDArray[np.float32]], episode: NDArray[np.int64]
) -> list[BrokenValues]:
    """Find broken values by feature and kind.

    Args:
        vectors: Values (N, D) by feature.
        episode: Episode of each frame (N,).
    """
    found = []
    for feature, values in vectors.items():
        kinds = {
            "NaN": np.isnan(values),
            "infinite": np.isinf(values),
            f"beyond {LARGEST_NUMBER:.0e}": np.isfinite(values) & (np.abs(values) > LARGEST_NUMBER),
        }
        for kind, mask in kinds.items():
            frames = np.flatnonzero(mask.any(axis=1))
            if len(frames):
                numbers, counts = np.unique(episode[frames], return_counts=True)
                episodes = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
                found.append(BrokenValues(feature, kind, episodes, int(frames[0])))
    return found


def broken_episodes(broken: Iterable[BrokenValues]) -> list[int]:
    """Episodes with a broken value, in order."""
    return sorted({episode for values in broken for episode in values.episodes})


def remedy(root: Path, episodes: Sequence[int], total: int, arrays: Sequence[str]) -> str:
    """The remedy for broken `episodes` of the `total` ones in `root`.

    `arrays` is that of `delete_command`.
    """
    if len(episodes) == total:
        return "Every episode holds broken values: record the dataset again"
    which = "that episode" if len(episodes) == 1 else "those episodes"
    lost = (
        f" (without {', '.join(arrays)}, which training ignores and LeRobot cannot copy)"
        if arrays
        else ""
    )
    return f"Remove {which}, into a new folder{lost}: {delete_command(root, episodes, arrays)}"


def delete_command(root: Path, episodes: Sequence[int], arrays: Sequence[str]) -> str:
    """LeRobot's command that copies a dataset without `episodes` into a folder next to it.

    `arrays` are features of several dimensions that training ignores. LeRobot 0.6 cannot delete
    episodes of a dataset that has one, so another command removes them before, into a further
    folder.
    """
    source = root if root.name not in ("", "..") else root.resolve()
    clean = _free(source, "clean")
    delete = (
        "--operation.type delete_episodes --operation.episode_indices "
        f'"[{", ".join(map(str, episodes))}]"'
    )
    if not arrays:
        return f"{_edit(source, clean)} {delete}"
    between = _free(source, "without-arrays")
    remove = (
        "--operation.type remove_feature --operation.feature_names "
        f"{shlex.quote(json.dumps(list(arrays)))}"
    )
    return f"{_edit(source, between)} {remove} && {_edit(between, clean)} {delete}"


def _edit(source: Path, target: Path) -> str:
    """The start of a command that edits the dataset `source` into the folder `target`."""
    name = re.sub("[^A-Za-z0-9]+", "-", source.name).strip("-")[:80]  # by the rules of the hub
    return (
        f"{EDIT} --repo_id local/{name or 'data'} --root {_quoted(source)} --new_root "
        f"{_quoted(target)}"
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _free(source: Path, suffix: str) -> Path:
    """A folder next to `source` that does not exist yet."""
    names = (
        f"{source.name}-{suffix}{number}" for number in ("", *(f"-{i}" for i in range(2, 10_000)))
    )
    return next(path for path in map(source.with_name, names) if not path.exists())


def check_finite(
    root: Path,
    vectors: Mapping[str, NDArray[np.float32]],
    episode: NDArray[np.int64],
    arrays: Sequence[str],
) -> None:
    """Raise `DatasetError`, with episodes and remedy, if `vectors` hold broken values.

    The arguments are those of `find_broken` and `delete_command`.
    """
    broken = find_broken(vectors, episode)
    if not broken:
        return
    first = broken[0]
    episodes = broken_episodes(broken)
    raise DatasetError(
        f"{root}: {first.feature} of frame {first.frame} (episode {episode[first.frame]}) is "
        f"{first.kind}. In all, {'; '.join(map(str, broken))}. Values must be finite and at most "
        f"{LARGEST_NUMBER:.0e}. {remedy(root, episodes, int(episode[-1]) + 1, arrays)}"
    )
