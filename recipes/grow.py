"""Make a trained policy deeper: `python recipes/grow.py POLICY OUTPUT_FOLDER FACTOR`.

After every layer of a compact policy, the script inserts copies of that layer. Their output
projections are zero (as in LLaMA Pro, arXiv 2401.02415), so at first they add nothing and the new
policy decodes the same tokens. `ceed-vla train --policy.path` continues its training.
"""

from __future__ import annotations

import sys
from copy import deepcopy

from torch import nn

from ceed_vla.checkpoints import load, save
from ceed_vla.errors import CeedVLAError


def grow(path: str, folder: str, factor: int) -> None:
    """Write a copy of the policy with `factor` times as many layers."""
    policy, pre, post = load(path)
    layers = nn.ModuleList()
    for layer in policy.backbone.layers:
        copies = [deepcopy(layer) for _ in range(factor)]
        for copy in copies[1:]:
            nn.init.zeros_(copy.out.weight)
            nn.init.zeros_(copy.down.weight)
        layers.extend(copies)
    policy.backbone.layers = layers
    policy.backbone.num_layers = policy.config.backbone.layers = len(layers)
    save(folder, policy, pre, post)


if __name__ == "__main__":
    try:
        grow(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    except CeedVLAError as error:
        sys.exit(str(error))
