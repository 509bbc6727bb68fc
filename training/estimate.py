"""Estimate how many steps of training fit into a budget of minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import numpy as np
import torch

from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.data.frames import FrameStore
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.training.budget import ACTION, BATCH, GROUNDING, Schedule, Speeds, divide, probe
from ceed_vla.training.defaults import take_from_data
from ceed_vla.training.fit_tokens import fit_action_tokens
from ceed_vla.training.mixture import Mixture
from ceed_vla.training.optim import computes_bfloat16
from ceed_vla.training.teacher_objective import TeacherObjective
from ceed_vla.training.train_config import TrainConfig


def estimate(
    stores: Sequence[FrameStore],
    policy: CeedVLAConfig,
    minutes: float,
    grounding: Sequence[FrameStore] = (),
) -> Schedule:
    """Estimate the schedule of `ceed-vla train --max_minutes` for these data on this machine.

    A new policy takes a few steps without updates. The images need not be decoded.

    Args:
        stores: Datasets with actions.
        policy: Settings of the policy; those that are not set are derived from the data.
        minutes: The budget, above 0.
        grounding: Datasets without actions for the auxiliary target.
    """
    settings = deepcopy(policy)
    stats = take_from_data(settings, stores, grounding, None)
    fit_action_tokens(settings, stores)
    made = CeedVLAPolicy(settings, dataset_stats=stats)
    tasks = [task for store in (*stores, *grounding) for task in store.tasks]
    pre, _ = make_ceed_vla_pre_post_processors(settings, stats, instructions=tasks)
    made.to(settings.device or "cpu")
    objective = TeacherObjective(made).train()
    regressed = made.backbone.auxiliary is not None and len(grounding) > 0
    mixtures = {ACTION: Mixture(stores, None, 0, settings.chunk_size)}
    if regressed:
        mixtures[GROUNDING] = Mixture(grounding, None, 0, settings.chunk_size)
    device = settings.device or "cpu"
    bfloat16 = torch.autocast(
        torch.device(device).type, torch.bfloat16, enabled=computes_bfloat16(device)
    )

    def take(size: int, beside: int) -> Callable[[], None]:
        def step() -> None:
            batch = pre(mixtures[ACTION].draw(size, 0)) if size else None
            frames = pre(mixtures[GROUNDING].draw(beside, 0)) if beside and regressed else None
            with bfloat16:
                loss, _ = objective(batch, frames, 1.0, 1.0)
            loss.backward()
            objective.zero_grad()

        return step

    kinds = {ACTION: take(BATCH, TrainConfig.grounding_batch)}
    if regressed:
        kinds[GROUNDING] = take(0, 2 * BATCH)
    with torch.random.fork_rng():
        seconds = probe(kinds)
    return divide(
        minutes,
        Speeds(seconds.get(GROUNDING, 0.0), seconds[ACTION]),
        grounded=regressed,
        frames=sum(len(store) for store in stores),
        episodes=sum(len(np.unique(store.episode)) for store in stores),
    )
