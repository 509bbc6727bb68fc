"""Load and save policies with their processors: LeRobot folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import save_file

from ceed_vla.checkpoints.manifest import held_still, own_files, write_manifest
from ceed_vla.checkpoints.replacing import replacing_folder
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.files import saving
from ceed_vla.folders import WEIGHTS, resolve_checkpoint
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.processor_ceed_vla import checked


def load(
    path: str | Path,
    device: str | None = None,
    merge_adapters: bool = True,
) -> tuple[CeedVLAPolicy, Any, Any]:
    """Load a policy in eval mode with its pre- and post-processor, strictly and offline.

    Args:
        path: A checkpoint folder, or "teacher" / "student" for the shipped ones.
        device: Device to run on; the CPU if None.
        merge_adapters: See `CeedVLAPolicy.from_pretrained`.

    Raises:
        CheckpointError: See `CeedVLAPolicy.from_pretrained`; also if processors do not load.
    """
    folder = resolve_checkpoint(path)
    with held_still(folder):
        config = CeedVLAConfig.read(folder, "cpu" if device is None else device)
        # This checks all files against the manifest, those of the processors included.
        policy = CeedVLAPolicy.from_pretrained(folder, config=config, merge_adapters=merge_adapters)
        overrides = {"device_processor": {"device": config.device}}
        with raised_as(CheckpointError, f"The processors of {path} do not load", "copy it again."):
            pre, post = make_pre_post_processors(
                config,
                str(folder),
                preprocessor_overrides=overrides,
            )
    return policy, checked(pre), checked(post)


def save(
    path: str | Path,
    policy: CeedVLAPolicy,
    preprocessor: Any,
    postprocessor: Any,
    weights: dict[str, Any] | None = None,
    unchanged: bool = False,
) -> Path:
    """Write a sealed checkpoint folder; an existing one is replaced as a whole or stays unchanged.

    Args:
        path: The folder. Files of it that do not belong to a checkpoint, such as a README.md, stay.
        policy: The policy to save.
        preprocessor: Preprocessor of the policy.
        postprocessor: Postprocessor of the policy.
        weights: Weights to write instead of the policy's, such as those gathered from several
            processes.
        unchanged: Whether the weights are as they were when the policy was loaded. If it refers to
            weights in another folder, its own file is then written as it was, with adapters apart.

    Returns:
        The folder.

    Raises:
        CheckpointError: It cannot be written, for instance on a full disk.
    """
    folder = Path(path)
    with saving(folder, {}), replacing_folder(folder, own_files) as stage:
        try:
            own = policy.own_weights if unchanged else {}
            policy.save_pretrained(stage, state_dict={} if own else weights)
            if own:
                save_file(own, stage / WEIGHTS, metadata={"format": "pt"})
            for part in (preprocessor, postprocessor):
                part.save_pretrained(stage)
            write_manifest(stage)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(stage), str(folder))) from error
    return folder
