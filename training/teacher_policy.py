"""The policy that a teacher's run starts from: that of a checkpoint, or a new one for the data."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from ceed_vla.checkpoints import load
from ceed_vla.data.frames import ACTION, FrameStore
from ceed_vla.decoding.names import CEED
from ceed_vla.errors import ConfigError
from ceed_vla.from_data import take_meaning
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from ceed_vla.training.defaults import Privileged, check_target, take_from_data
from ceed_vla.training.fit_tokens import fit_action_tokens
from ceed_vla.training.mixture import check_compatible, share_target
from ceed_vla.training.train_config import TrainConfig


def check_demonstrations(demonstrations: Sequence[FrameStore]) -> None:
    """Raise `ConfigError` unless there are demonstrations, all with actions and of one layout."""
    if not demonstrations:
        raise ConfigError("No data: set --roots to one or more recorded folders.")
    for store in demonstrations:
        if store.action is None:
            raise ConfigError(
                f"{store.root} holds no actions; name it in --grounding_roots instead."
            )
    share_target(demonstrations)
    check_compatible(demonstrations)


def initial_policy(
    config: TrainConfig,
    demonstrations: Sequence[FrameStore],
    grounding: Sequence[FrameStore],
    privileged: Privileged | None,
) -> tuple[CeedVLAPolicy, Any, Any]:
    """Policy, preprocessor and postprocessor that training starts from.

    Args:
        config: Names a checkpoint, or holds a new policy's configuration.
        demonstrations: Datasets with actions, from which open settings of a new policy are
            derived.
        grounding: Datasets for the auxiliary target.
        privileged: The environment's description of ``observation.environment_state``.
    """
    if config.policy_path:
        policy, pre, post = _strict_policy(config)
        first = demonstrations[0]
        take_meaning(policy.config, first.labels.get(ACTION, []), first.fps)
    else:
        chosen = deepcopy(config.policy)  # filled in place; the settings may be used again
        stats = take_from_data(chosen, demonstrations, grounding, privileged)
        fit_action_tokens(chosen, demonstrations)
        policy = CeedVLAPolicy(chosen, dataset_stats=stats)
        tasks = [task for store in (*demonstrations, *grounding) for task in store.tasks]
        pre, post = make_ceed_vla_pre_post_processors(chosen, stats, instructions=tasks)
    check_target(policy.config, demonstrations, grounding, privileged)
    return policy, pre, post


def _strict_policy(config: TrainConfig) -> tuple[Any, Any, Any]:
    """Load the checkpoint's policy with strict decoding: its exits do not apply after training."""
    adapted = config.lora.rank > 0
    policy, pre, post = load(
        config.policy_path, device=config.policy.device, merge_adapters=not adapted
    )
    relaxed: dict[str, Any] = {
        "max_iterations": None,
        "confidence": None,
        "exits": (),
        "deadline_s": None,
    }
    strict = replace(policy.config.decoding, method="jacobi", watch="block", **relaxed)
    policy.config.decoding = strict
    policy.config.decode_with = CEED
    return policy, pre, post
