"""Cut a trained policy: `python recipes/truncate.py POLICY OUTPUT_FOLDER LAYERS`.

For policies of the language backbone: the first layers stay with their adapters, and all weights
outside the layers.
`ceed-vla train --policy.path` continues the training.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ceed_vla.checkpoints import load, save
from ceed_vla.errors import CeedVLAError


def truncate(path: str, folder: str, layers: int) -> None:
    """Write a copy of the policy with its first layers.

    Raises:
        SystemExit: The policy has not so many layers, or is none of the language backbone.
    """
    policy, pre, post = load(path, merge_adapters=False)
    config: Any = policy.config.backbone
    if config.type != "language" or not 1 <= layers < policy.backbone.num_layers:
        raise SystemExit(
            f"{path} must be a policy of the language backbone with more than {layers} layers; "
            "name a run of recipes/smollm2.sh."
        )
    model: Any = policy.backbone.pretrained  # type: ignore[attr-defined]
    dropped = {f".layers.{layer}." for layer in range(layers, policy.backbone.num_layers)}
    model.layers = model.layers[:layers]
    config.layers = layers
    architecture = json.loads(config.architecture) | {"num_hidden_layers": layers}
    if architecture.get("layer_types"):
        architecture["layer_types"] = architecture["layer_types"][:layers]
    config.architecture = json.dumps(architecture)
    policy.config.forget()
    adapters = {n: w for n, w in policy.adapters.items() if not any(part in n for part in dropped)}
    policy.requires_grad_(False)  # weights that another folder has stay there
    save(folder, policy, pre, post, policy.state_dict() | adapters)


if __name__ == "__main__":
    try:
        truncate(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    except CeedVLAError as error:
        sys.exit(str(error))
