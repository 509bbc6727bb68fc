"""student_all_tokens with exits, for tests of what reads them."""

from __future__ import annotations

from typing import Any

import torch

from ceed_vla import load
from ceed_vla.axes.depth.exits import make_exits


def student_with_exits() -> tuple[Any, Any, Any]:
    """student_all_tokens with its processors, and linear exits that are nearly its last norm."""
    policy, pre, post = load("student_all_tokens")
    policy.backbone.exits = make_exits(policy.backbone, [1, 2, 3], "linear")
    generator = torch.Generator().manual_seed(0)
    for own in policy.backbone.exits.values():
        own.requires_grad_(False).linear.weight.normal_(std=0.01, generator=generator)
    return policy, pre, post
