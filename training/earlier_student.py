"""A distillation that goes on from an earlier student instead of its teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ceed_vla.backbones.capabilities import check_whole_prefix
from ceed_vla.checkpoints import load
from ceed_vla.errors import ConfigError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy


def earlier_weights(
    policy: CeedVLAPolicy, path: str, device: str, *, adapted: bool
) -> dict[str, Tensor]:
    """The weights that distinguish an earlier student from its teacher.

    Args:
        policy: The teacher's policy, before adapters for learning are attached.
        path: Checkpoint of the student.
        device: Device of the weights.
        adapted: Whether adapters learn, so that the student differs in its adapters alone.

    Returns:
        Adapters by the names of `CeedVLAPolicy.adapters`, or other weights by the policy's names.

    Raises:
        ConfigError: It is no student of this teacher, or `adapted` does not suit it.
    """
    student, _, _ = load(path, device=device, merge_adapters=not adapted)
    check_whole_prefix(student, "a distillation that goes on from it")
    if kept := getattr(student.backbone, "kept", []):
        raise ConfigError(
            f"--student.path {path} runs {len(kept)} tokens of its prefix; a distillation goes on "
            "from a student that runs all of them."
        )
    learns = set() if adapted else set(policy.backbone.distillation_parameters())
    own, found = policy.backbone.state_dict(), student.backbone.state_dict()
    for name in sorted((own.keys() | found.keys()) - learns):
        if name not in own or name not in found or not torch.equal(own[name], found[name]):
            raise ConfigError(_no_student(path, name, adapted))
    if not adapted:
        return {f"backbone.{name}": found[name] for name in learns}
    if not student.adapters:
        raise ConfigError(
            f"--student.path {path} has no adapters that could learn on; leave out --lora.rank."
        )
    return student.adapters


def _no_student(path: str, name: str, adapted: bool) -> str:
    rule = "with adapters a distillation does not change it" if adapted else "it does not learn"
    remedy = "name a student that was distilled from this teacher"
    if adapted:
        remedy += " with adapters that its checkpoint keeps apart (weights by reference)"
    return f"--student.path {path} differs from the teacher in {name}, but {rule}: {remedy}."


def copy_into(policy: Any, weights: dict[str, Tensor]) -> None:
    """Give a policy these weights, by its names."""
    parameters = dict(policy.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
