"""Reads and loads the checkpoint of any LeRobot policy for a `Predictor`.

The module itself imports neither torch nor lerobot.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.ros_nodes.robot.predictor_types import PolicySpec, PredictorSettings
from ceed_vla.ros_nodes.robot.texts import short


def declared_spec(checkpoint: str) -> PolicySpec:
    """Read what a checkpoint's config.json declares, without loading its weights.

    Args:
        checkpoint: Name or folder.

    Returns:
        The specification; `chunk_steps` is 0 if the file does not declare it.

    Raises:
        CheckpointError: The folder is missing, or its config.json is not a LeRobot policy's.
    """
    from ceed_vla.checkpoints.manifest import read_config
    from ceed_vla.folders import resolve_checkpoint

    config = read_config(resolve_checkpoint(checkpoint))
    try:
        features = {
            name: (feature["type"], feature["shape"])
            for name, feature in config["input_features"].items()
        }
        if not isinstance(config["type"], str):
            raise TypeError
        return PolicySpec(
            checkpoint=checkpoint,
            policy_type=config["type"],
            cameras={
                k: (int(s[0]), int(s[1]), int(s[2]))
                for k, (kind, s) in features.items()
                if kind == "VISUAL"
            },
            states={k: int(s[0]) for k, (kind, s) in features.items() if kind in ("STATE", "ENV")},
            action_dim=int(config["output_features"]["action"]["shape"][0]),
            chunk_steps=int(config.get("chunk_size") or 0),
            n_action_steps=int(config.get("n_action_steps") or 0),
            warmup_s=0.0,
            delta_dims=tuple(int(dim) for dim in config.get("delta_dims") or ()),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{short(checkpoint)}: config.json lacks a type, or input_features and output_features "
            "with type and shape; copy it again."
        ) from error


def load_policy(settings: PredictorSettings, kind: str) -> tuple[Any, Any, Any]:
    """Load any LeRobot checkpoint folder.

    Args:
        settings: Their `checkpoint` and `device` are used.
        kind: LeRobot's name of the policy: "ceed_vla", "act", ...

    Returns:
        The policy in evaluation mode, its preprocessor and its postprocessor.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or of a type that cannot be loaded.
        ConfigError: This machine does not have the device.
    """
    from ceed_vla.checkpoints import load, resolve_checkpoint
    from ceed_vla.devices import check_device

    folder = resolve_checkpoint(settings.checkpoint)
    device = check_device(settings.device)
    if kind == "ceed_vla":
        return load(folder, device=device)
    # LeRobot's policies raise errors of many types.
    what = f"The checkpoint {settings.checkpoint} of type {kind!r} cannot be loaded"
    with raised_as(CheckpointError, what, "see what its type needs in LeRobot, or copy it again."):
        return _load_other(folder, kind, device)


def _load_other(folder: Path, kind: str, device: str) -> tuple[Any, Any, Any]:
    """Load another LeRobot policy whose type, settings and processor steps are on the allow list.

    It never contacts a hub.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # for modules that are imported from here on
    import draccus
    import huggingface_hub.constants

    from ceed_vla.checkpoints.allowed import read_allowed
    from ceed_vla.folders import WEIGHTS
    from ceed_vla.processor_steps import check_foreign_processors
    from ceed_vla.weights import check_floating, check_weights

    # huggingface_hub may be imported already; it reads this flag at every request.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    values = read_allowed(folder, device)
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    policy_class = get_policy_class(kind)
    settings = {name: value for name, value in values.items() if name != "type"}
    config: Any = draccus.decode(PreTrainedConfig.get_choice_class(kind), settings)
    if config.n_obs_steps > 1:
        raise CheckpointError(
            f"The policy reads {config.n_obs_steps} observations at once; the node gives one."
        )
    check_foreign_processors(folder, config)
    check_floating([folder / WEIGHTS])
    policy = policy_class.from_pretrained(folder, config=config, strict=True)
    check_weights(policy, folder / WEIGHTS)
    overrides = {"device_processor": {"device": device}}
    pre, post = make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)
    return policy.eval(), pre, post
