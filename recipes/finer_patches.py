"""Show a trained policy finer images: `python recipes/finer_patches.py POLICY OUTPUT_FOLDER`.

For policies of the language backbone. Their prefix gets every place of the camera stems' last
features (`stems.patches features`) instead of a grid of their means, about nine times as many
tokens. The projection of these is new, so `ceed-vla train --policy.path` must continue its
training. All other weights stay.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ceed_vla.checkpoints import load, save
from ceed_vla.errors import CeedVLAError


def finer(path: str, folder: str) -> None:
    """Write a copy of the policy with the places of the features in its prefix.

    Raises:
        SystemExit: The policy has no grid of patches from camera stems, or adapters of their
            projection.
    """
    policy, pre, post = load(path, merge_adapters=False)
    backbone: Any = policy.backbone
    stems = getattr(policy.config.backbone, "stems", None)
    if stems is None or stems.patches != "grid":
        raise SystemExit(
            f"{path} must be a policy of the language backbone with stems.patches grid; name a "
            "teacher of recipes/smollm2.sh."
        )
    if any(".project." in name for name in policy.adapters):
        raise SystemExit(
            f"{path} has adapters of the projection, which is new; train without them."
        )
    stems.patches = backbone.stems.patches = "features"
    (known,) = backbone.project
    width = known[1].out_features
    new = nn.ModuleList(nn.Sequential(nn.LayerNorm(w), nn.Linear(w, width)) for w in stems.widths)
    with torch.no_grad():
        new[0][1].weight.normal_(std=float(known[1].weight.std()))
        new[0][1].bias.zero_()
    if len(new) == 2:  # the keypoints' token is as before
        new[1].load_state_dict(known.state_dict())
    backbone.project = new
    policy.config.forget()
    policy.requires_grad_(False)  # weights that another folder has stay there
    save(folder, policy, pre, post, policy.state_dict() | policy.adapters)


if __name__ == "__main__":
    torch.manual_seed(0)
    try:
        finer(sys.argv[1], sys.argv[2])
    except CeedVLAError as error:
        sys.exit(str(error))
