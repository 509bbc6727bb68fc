"""Load and save policies with their processors: LeRobot folders."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lerobot.policies.factory import make_pre_post_processors

from ceed_vla.backbones.context import CONTEXT
from ceed_vla.backbones.exits import EXITS
from ceed_vla.checkpoint_files import weights_hash
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.files import saving
from ceed_vla.folders import pretrained_path, resolve_checkpoint
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.processor_ceed_vla import checked

__all__ = ["load", "pretrained_path", "resolve_checkpoint", "save", "weights_hash"]


def load(path: str | Path, device: str | None = None, merge_adapters: bool = True) -> tuple[CeedVLAPolicy, Any, Any]:
    """A policy in eval mode with its pre- and post-processor, loaded strictly and offline.

    The `path` is a checkpoint folder, or "teacher" / "student" for the shipped ones; without a `device` it runs on the
    CPU. For `merge_adapters`, and what is raised, see `CeedVLAPolicy.from_pretrained`.
    """
    folder = resolve_checkpoint(path)
    config = CeedVLAConfig.read(folder, "cpu" if device is None else device)
    policy = CeedVLAPolicy.from_pretrained(folder, config=config, merge_adapters=merge_adapters)
    overrides = {"device_processor": {"device": config.device}}
    with raised_as(CheckpointError, f"The processors of {path} do not load", "copy it again."):
        pre, post = make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)
    return policy, checked(pre), checked(post)


def save(
    path: str | Path,
    policy: CeedVLAPolicy,
    preprocessor: Any,
    postprocessor: Any,
    weights: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder; each file of an existing one is replaced in one step.

    `weights`, for instance gathered from several processes, are written instead of the policy's. `CheckpointError` if
    it cannot be written, for instance on a full disk; what was there before stays.
    """
    folder = Path(path)
    with saving(folder, {}):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
            policy.save_pretrained(temporary, state_dict=weights)
            for part in (preprocessor, postprocessor):
                part.save_pretrained(temporary)
            new = [file.name for file in Path(temporary).iterdir()]
            for name in new:
                (Path(temporary) / name).replace(folder / name)
        for name in {EXITS, CONTEXT} - {*new}:  # of another policy, which was here
            (folder / name).unlink(missing_ok=True)
    return folder
