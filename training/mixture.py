"""Draw batches from several datasets: compatibility, shares and statistics."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ceed_vla.backbones.compact.words import InstructionWordsStep
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.data.frames import ACTION, ENVIRONMENT, STATE, FrameStore
from ceed_vla.errors import DatasetError
from ceed_vla.training.held_out import held_out_frames
from ceed_vla.training.spans import sliding

logger = logging.getLogger(__name__)


class Mixture:
    """Draws batches from several frame stores in fixed proportions.

    Seed and step determine the frames of a batch.

    Args:
        stores: The datasets.
        weights: Their shares; by default in proportion to their frames.
        seed: Seed of the draws.
        chunk_size: Steps m of an action chunk.
        held_out: Share of each dataset's episodes that is never drawn; None for no episodes.

    Raises:
        DatasetError: The datasets are not compatible.
    """

    def __init__(
        self,
        stores: Sequence[FrameStore],
        weights: Sequence[float] | None,
        seed: int,
        chunk_size: int,
        held_out: Sequence[float] | None = None,
    ) -> None:
        check_compatible(stores)
        check_shown(stores)
        self.stores = list(stores)
        self.seed = seed
        self.chunk_size = chunk_size
        shares = np.asarray(weights if weights else [s.shown.sum() for s in stores], np.float64)
        self.shares = shares / shares.sum()
        pairs = zip(stores, self.shares.tolist(), strict=True)
        left_out = held_out if held_out is not None else [0.0] * len(stores)
        self.rows = [
            np.flatnonzero(~held_out_frames(store, part) & store.shown)
            for store, part in zip(stores, left_out, strict=True)
        ]
        # the frames to imitate of a small dataset may all be held out
        self.shares = self.shares * [bool(len(rows)) for rows in self.rows]
        if not self.shares.any():
            raise DatasetError("All frames to imitate are held out; record more, or hold out less.")
        self.shares = self.shares / self.shares.sum()
        self.spans = [
            sliding(_edges(store, rows), share * store.together, seed, rows)
            for (store, share), rows in zip(pairs, self.rows, strict=True)
        ]

    def draw(self, size: int, step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """Draw a raw batch of `size` frames; each of `world` processes loads its part of them."""
        random = np.random.default_rng([self.seed, step])
        counts = random.multinomial(size, self.shares)
        parts, seen = [], 0
        sources = zip(self.stores, counts, self.shares, self.rows, self.spans, strict=True)
        for store, count, share, rows, spans in sources:
            drawn = step * size * share
            frames = (
                spans.draw(random, count, drawn)
                if spans
                else rows[random.integers(len(rows), size=count)]
            )
            frames = frames[(rank - seen) % world :: world]
            seen += int(count)
            if len(frames):
                parts.append(store.batch(frames, self.chunk_size))
        return join_batches(parts)


def check_shown(stores: Sequence[FrameStore]) -> None:
    """Raise `DatasetError` if a dataset has no frame to imitate."""
    for store in stores:
        if not store.shown.any():
            raise DatasetError(
                f"{store.root} has no frame to imitate: next.success is false in all its "
                f"{len(np.unique(store.episode))} episodes. Leave it out, or record successes."
            )


def shared_weights(stores: Sequence[FrameStore], interventions: float) -> list[float]:
    """Shares of datasets in proportion to their frames; those of a person's interventions together
    have the share `interventions`, if there are others too; 0: as their number.
    """
    weights = [float(store.shown.sum()) for store in stores]
    if not interventions:
        return weights
    corrected = sum(w for w, store in zip(weights, stores, strict=True) if store.corrected)
    others = sum(weights) - corrected
    if not corrected or not others:
        return weights
    factor = interventions / (1 - interventions) * others / corrected
    return [w * factor if s.corrected else w for w, s in zip(weights, stores, strict=True)]


def _edges(store: FrameStore, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """First index into `rows` of every span that is decoded together, and one past the last."""
    return np.unique(np.searchsorted(rows, store.edges))


def join_batches(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate batches of the same features."""
    joined: dict[str, Any] = {}
    for key, value in parts[0].items():
        values = [part[key] for part in parts]
        joined[key] = (
            list(chain.from_iterable(values)) if isinstance(value, list) else torch.cat(values)
        )
    return joined


def share_target(stores: Sequence[FrameStore]) -> None:
    """Give rows of NaN, which the loss leaves out, to stores without the auxiliary target if others
    have it: a batch has the same features for all its frames.

    Recordings of a robot have no privileged state.
    """
    told = [store.environment_state for store in stores if has_target(store)]
    for store in stores:
        if not told:
            store.environment_state = None
        elif not has_target(store):
            logger.info("%s has no %s: without auxiliary regression.", store.root, ENVIRONMENT)
            shape = (len(store), told[0].shape[1])  # type: ignore[union-attr]
            store.environment_state = np.full(shape, np.nan, np.float32)


def has_target(store: FrameStore) -> bool:
    """Whether a dataset has the auxiliary target in some frame."""
    target = store.environment_state
    return target is not None and not np.isnan(target).all()


def check_compatible(stores: Sequence[FrameStore]) -> None:
    """Raise `DatasetError` unless all stores have the same rate and features of the same shapes."""
    named: dict[str, FrameStore] = {}  # feature -> the first dataset that names its components
    for store in stores:
        for key, own in store.labels.items():
            first = named.setdefault(key, store)
            if own != first.labels[key]:
                _differ(store, first, f"the names of {key}", own, first.labels[key])
    for store in stores[1:]:
        names = sorted(store.shapes.keys() | stores[0].shapes.keys())
        pairs: dict[str, tuple[Any, Any]] = {"fps": (store.fps, stores[0].fps)}
        pairs |= {
            name: (_shape(store.shapes.get(name)), _shape(stores[0].shapes.get(name)))
            for name in names
        }
        for what, (own, others) in pairs.items():
            if own != others:
                _differ(store, stores[0], what, own, others)


def _differ(store: FrameStore, other: FrameStore, what: str, own: Any, others: Any) -> NoReturn:
    raise DatasetError(
        f"{store.root} and {other.root} differ in {what}: {str(own)[:100]} and "
        f"{str(others)[:100]}; train on datasets of one robot at one rate, with the same features."
    )


def check_fits(store: FrameStore, config: CeedVLAConfig, pre: Any) -> None:
    """Raise unless a policy can read the store; images of other sizes are resized.

    Args:
        store: The dataset.
        config: Settings of the policy.
        pre: Its preprocessor.

    Raises:
        DatasetError: Features are missing or of other shapes, or actions mean something else: they
            have other names, or another rate.
        ObservationError: The preprocessor cannot read an instruction.
    """
    for step in pre.steps:
        if isinstance(step, InstructionWordsStep):
            list(map(step.encode, store.tasks))
    vectors = {
        STATE: config.robot_state_feature,
        ACTION: config.action_feature if ACTION in store.shapes else None,
    }
    wanted = {
        name: tuple(feature.shape) for name, feature in vectors.items() if feature is not None
    }
    wanted |= {
        camera: store.shapes.get(camera, (0,))
        for camera in config.cameras
        if ".empty_camera_" not in camera
    }
    for name, shape in wanted.items():
        if store.shapes.get(name) != shape:
            raise DatasetError(
                f"{store.root} does not fit the policy, which reads {', '.join(wanted)}: {name} is "
                f"{_shape(store.shapes.get(name))}"
                + (f" instead of {shape}." if name in vectors else ".")
            )
    if ACTION in store.shapes:
        _check_meaning(store, config)


def _check_meaning(store: FrameStore, config: CeedVLAConfig) -> None:
    """Raise `DatasetError` if data and policy have other names of actions, or other rates."""
    names = [str(name) for name in store.labels.get(ACTION, [])]
    for what, own, learnt in (
        ("action names", names, config.action_names),
        ("frames a second", store.fps, config.control_rate),
    ):
        if own and learnt and own != learnt:
            raise DatasetError(
                f"{store.root} does not fit the policy: its {what} are {str(own)[:100]}, and the "
                f"policy's {str(learnt)[:100]}. Use data of the same robot at the same rate."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(shape)


def state_statistics(stores: Sequence[FrameStore]) -> dict[str, dict[str, Tensor]]:
    """LeRobot-shaped statistics of state and action over all stores."""
    stats: dict[str, dict[str, Tensor]] = {}
    actions = [store.action for store in stores if store.action is not None]
    for key, arrays in {STATE: [store.state for store in stores], ACTION: actions}.items():
        if arrays:
            values = np.concatenate(arrays).astype(np.float64)
            ends = zip(
                ("min", "q01", "q99", "max"),
                np.quantile(values, [0, 0.01, 0.99, 1], axis=0),
                strict=True,
            )
            columns = {"mean": values.mean(0), "std": values.std(0).clip(1e-3), **dict(ends)}
            stats[key] = {
                name: torch.from_numpy(column).float() for name, column in columns.items()
            }
    return stats
