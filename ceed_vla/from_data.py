"""Derive settings of a new policy from its data, unless they are set.

`ceed-vla train` and LeRobot's `lerobot-train` share it. Action ranges come from all frames: the
quantiles in a dataset's ``meta/stats.json`` are averages over its episodes, and clip actions that
occur in few episodes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.utils.constants import ACTION
from numpy.typing import NDArray

from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.data.statistics import vector_statistics
from ceed_vla.errors import DatasetError

if TYPE_CHECKING:
    from ceed_vla.data.files import Info  # imports pyarrow, which only training needs

logger = logging.getLogger(__name__)

SPARSE = 0.9  # share of near-zero values above which the quantiles miss all other values
NEAR_ZERO = 0.01  # share of the largest value
# names of actions that add up over steps
INCREMENT = re.compile("(d|delta_)(x|y|z|rx|ry|rz|roll|pitch|yaw)")
FRAMES = "all frames"
EXTREMES = (("q01", "min"), ("q99", "max"))  # quantile, and the statistic that replaces it

Stats = dict[str, Any]  # name of a statistic -> (A,), an array or a tensor
Statistics = dict[str, Stats]  # of every feature


# ---- from the frames -----------------------------------------------------------------------------


def take_from_actions(
    config: CeedVLAConfig,
    actions: NDArray[np.float32],
    stats: Stats,
    names: Sequence[object],
    rate: float,
) -> None:
    """Set two-valued dimensions and increments unless they are set; extend sparse ranges.

    Args:
        config: Settings of a new policy; filled in place.
        actions: Of all frames (N, A) [the dataset's units].
        stats: Statistics of exactly these actions; changed in place by `extend_sparse`.
        names: Names of the action's dimensions, or none.
        rate: Steps per second of the data [Hz].
    """
    tokens = config.action_tokens
    extend_sparse(stats, actions)
    open_ranges = not any(getattr(tokens, name, None) for name in ("q01", "fitted"))
    if open_ranges and tokens.gripper_dims == [-1]:  # find dimensions of two values (grippers)
        dims = range(actions.shape[1])
        tokens.gripper_dims = [d for d in dims if len(np.unique(actions[:, d])) == 2]
    take_meaning(config, names, rate)
    if ranges_are_open(config):
        config.ranges_from = FRAMES


def extend_sparse(stats: Stats, actions: NDArray[np.float32]) -> None:
    """Replace quantiles by extremes in dimensions that are nearly always zero."""
    sparse = (np.abs(actions) <= NEAR_ZERO * np.abs(actions).max(0)).mean(0) >= SPARSE  # (A,)
    for quantile, extreme in EXTREMES:
        stats[quantile][sparse] = stats[extreme][sparse]


def take_meaning(config: CeedVLAConfig, names: Sequence[object], rate: float) -> None:
    """Set what the data say of actions: names, rate, and unless they are set, the increments.

    Names and rate are those of the data, also when a checkpoint is trained further.
    """
    config.action_names = [str(name) for name in names]
    config.control_rate = rate
    if config.delta_dims is None:
        config.delta_dims = [
            d for d, name in enumerate(names) if INCREMENT.fullmatch(str(name).lower())
        ]


def ranges_are_open(config: CeedVLAConfig) -> bool:
    """Whether nothing has defined the ranges of the action tokens yet."""
    return not any(getattr(config.action_tokens, name) for name in config.action_tokens.listed)


# ---- from LeRobot's metadata ---------------------------------------------------------------------


def take_from_lerobot(config: CeedVLAConfig, meta: Any, stats: Statistics) -> None:
    """Fill the settings of a new policy as `ceed-vla train` does, for `lerobot-train`.

    If the frames cannot be read, ranges are the minimum and maximum of the statistics.

    Args:
        config: Settings of a new policy; filled in place.
        meta: LeRobot's ``LeRobotDatasetMetadata``.
        stats: Its statistics; see `correct_action_statistics`.
    """
    from ceed_vla.data.files import names_of

    info = _info(meta)
    # Depth maps are stored as images, and training leaves them out.
    inputs = (config.input_features or {}).items()
    depth = {
        name
        for name, f in inputs
        if f.type is FeatureType.VISUAL and info and name not in info.cameras
    }
    config.input_features = {name: feature for name, feature in inputs if name not in depth}
    names = (names_of(meta.features[ACTION]) if ACTION in meta.features else None) or []
    actions, problem = correct_action_statistics(meta, stats)
    if actions is not None:
        take_from_actions(config, actions, stats[ACTION], names, meta.fps)
        return
    take_meaning(config, names, meta.fps)
    if ranges_are_open(config):
        config.ranges_from = (
            f"the statistics' minimum and maximum, as the frames cannot be read ({problem})"
        )


def correct_action_statistics(
    meta: Any, stats: Statistics
) -> tuple[NDArray[np.float32] | None, str]:
    """Replace LeRobot's averaged action quantiles by those of all frames.

    If the frames cannot be read, the extremes replace them. `stats` is changed in place, because
    LeRobot builds its normalisers from the same object later.

    Returns:
        The actions of all frames (N, A) and an empty string; or None and the reason.
    """
    from ceed_vla.data.files import read_info, read_rows

    try:
        info = read_info(Path(meta.root))
        if ACTION not in info.vectors:
            raise DatasetError(f"{info.root} has no action.")
        actions: NDArray[np.float32] = read_rows(info, [ACTION])[ACTION]
    except DatasetError as error:
        if ACTION in stats:
            stats[ACTION] = without_quantiles(stats[ACTION])
        return None, str(error).rstrip(".")
    exact = vector_statistics(actions)
    numbers = {name: values.astype(np.float32) for name, values in exact.items() if name != "count"}
    extend_sparse(numbers, actions)
    stats[ACTION] = {**stats.get(ACTION, {}), **numbers}
    return actions, ""


def without_quantiles(stats: Mapping[str, Any]) -> Stats:
    """The statistics with the extremes in the place of both outer quantiles."""
    return {
        **stats,
        **{quantile: stats[extreme] for quantile, extreme in EXTREMES if extreme in stats},
    }


def normalises_actions(config: CeedVLAConfig) -> bool:
    """Whether the processors, and not only the tokens, scale actions by the data's statistics."""
    return (
        config.normalization_mapping.get("ACTION", NormalizationMode.IDENTITY)
        is not NormalizationMode.IDENTITY
    )


def log_lerobot(config: CeedVLAConfig, tokens: Any, meta: Any) -> None:
    """Log the settings that `lerobot-train` uses, in the form of `ceed-vla train`."""
    info = _info(meta)
    logger.info(describe(config, tokens, meta.fps, info.ignored if info else ()))


def _info(meta: Any) -> Info | None:
    """Read ``meta/info.json`` of LeRobot's metadata; None if it cannot be used."""
    from ceed_vla.data.files import read_info

    try:
        return read_info(Path(meta.root))
    except DatasetError:
        return None


# ---- for the log ---------------------------------------------------------------------------------


def describe(
    config: CeedVLAConfig, tokens: Any, fps: float, ignored: Iterable[str], named: int | None = None
) -> str:
    """Describe the settings that training uses, in one line.

    Args:
        config: Settings of the policy, with features.
        tokens: Its action vocabulary.
        fps: Rate of the data [Hz].
        ignored: Features of the data that training leaves out.
        named: Leading terms of the auxiliary target that are regressed while actions are learnt;
            all if None.
    """
    cameras = ", ".join(
        f"{name} {tuple(config.image_features[name].shape[1:])}" for name in config.cameras
    )
    state = config.robot_state_feature
    ends = zip(tokens.low.tolist(), tokens.high.tolist(), strict=True)
    ranges = ", ".join(f"[{low:.4g}, {high:.4g}]" for low, high in ends)
    target = (
        f"{len(config.auxiliary_scale)} values, {named or 'all'} of them while actions are learnt"
    )
    parts = [
        f"cameras {cameras}",
        f"state {state.shape[0] if state else 'none'}",
        f"{fps:g} Hz",
        f"action ranges {ranges}, from {config.ranges_from}",
        f"two-valued dimensions {list(tokens.gripper_dims)}",
        f"increments {config.delta_dims}",
        f"auxiliary target {target if config.auxiliary_scale else 'none'}",
    ]
    left_out = ", ".join(ignored)
    return "; ".join([*parts, f"ignored: {left_out}"] if left_out else parts)
