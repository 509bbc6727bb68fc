"""Derive settings of a new policy from its data, and check which data its targets can use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.data.frames import ACTION, ENVIRONMENT, STATE, FrameStore
from ceed_vla.errors import DatasetError
from ceed_vla.from_data import NEAR_ZERO as NEAR_ZERO  # for readers of `take_from_data`
from ceed_vla.from_data import SPARSE as SPARSE
from ceed_vla.from_data import describe as describe_data
from ceed_vla.from_data import take_from_actions
from ceed_vla.training.mixture import has_target, share_target, state_statistics

logger = logging.getLogger(__name__)

Privileged = Any  # ceed_vla.sim.environment.Privileged: training never imports the simulation


def take_from_data(
    policy: CeedVLAConfig,
    stores: Sequence[FrameStore],
    grounding: Sequence[FrameStore],
    privileged: Privileged | None,
) -> dict[str, dict[str, Tensor]]:
    """Set features, two-valued and increment dimensions and auxiliary target, unless they are set.

    Args:
        policy: Settings of a new policy; filled in place.
        stores: Datasets with actions.
        grounding: Datasets without actions.
        privileged: The environment's description of its state. It is used if the datasets name
            their values as the environment does.

    Returns:
        Statistics for the processors and the ranges of the action tokens. In dimensions that are
        nearly always zero, quantiles are replaced by the extremes.
    """
    shapes = stores[0].shapes
    cameras = {
        name: PolicyFeature(FeatureType.VISUAL, (3, *shapes[name][:2])) for name in stores[0].images
    }
    policy.input_features = {**cameras, STATE: PolicyFeature(FeatureType.STATE, shapes[STATE])}
    policy.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, shapes[ACTION])}
    stats = state_statistics(stores)
    actions = np.concatenate([store.action for store in stores if store.action is not None])
    names = stores[0].labels.get(ACTION, [])
    take_from_actions(policy, actions, stats[ACTION], names, stores[0].fps)
    told = [store for store in (*stores, *grounding) if has_target(store)]
    known = privileged is not None and told and all(is_of(store, privileged) for store in told)
    if known and policy.auxiliary_weight and not policy.auxiliary_scale:
        policy.auxiliary_scale = list(privileged.scale)  # type: ignore[union-attr]
    return stats


def is_of(store: FrameStore, privileged: Privileged) -> bool:
    """Whether a dataset's ``observation.environment_state`` is the environment's."""
    return store.labels.get(ENVIRONMENT) == list(privileged.names)


def named_terms(policy: CeedVLAConfig, privileged: Privileged | None) -> int:
    """Number of leading terms of the auxiliary target regressed with actions; 0 for all."""
    ours = privileged is not None and policy.auxiliary_scale == list(privileged.scale)
    return privileged.named if privileged is not None and ours else 0


def check_target(
    policy: CeedVLAConfig,
    stores: Sequence[FrameStore],
    grounding: Sequence[FrameStore],
    privileged: Privileged | None,
) -> None:
    """Exclude values from the auxiliary regression that its scale does not describe.

    Demonstrations lose these values, with a warning; rows of NaN take their place if others keep
    theirs.

    Raises:
        DatasetError: The values are those of grounding data, which have no other target.
    """
    needed = len(policy.auxiliary_scale)
    ours = privileged is not None and policy.auxiliary_scale == list(privileged.scale)
    for i, store in enumerate((*stores, *grounding)):
        have = store.shapes.get(ENVIRONMENT, (0,))[0]
        named = (
            not ours
            or privileged is None
            or ENVIRONMENT not in store.labels
            or is_of(store, privileged)
        )
        what = (
            f"the policy's auxiliary_scale has {needed} entries, the frames have {have} values of "
            f"{ENVIRONMENT}"
        )
        what += "" if named else ", with other names than the environment's"
        fits = 0 < needed <= have and named
        if not fits and i >= len(stores):
            raise DatasetError(f"{store.root} cannot serve as grounding data: {what}.")
        if not fits and needed and have:
            logger.warning("%s: without auxiliary regression: %s.", store.root, what)
            store.environment_state = None
    share_target(stores)


def describe(policy: CeedVLAConfig, tokens: Any, store: FrameStore, named: int) -> str:
    """Settings that training uses, for the log: see `ceed_vla.from_data.describe`."""
    return describe_data(policy, tokens, store.fps, store.ignored, named or None)
