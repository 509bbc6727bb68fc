"""Weights of OpenVLA folders."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ceed_vla.errors import CheckpointError
from ceed_vla.weights import copy_weights, weight_files


def load_weights(model: nn.Module, folder: str | Path) -> list[str]:
    """Read a folder's weights into a model, converted to the model's types.

    Returns:
        The model's names of its weights.

    Raises:
        CheckpointError: Weights that are missing, unknown, damaged or of other sizes.
    """
    folder = Path(folder)
    missing, unknown = copy_weights(
        model,
        weight_files(folder),
        rename=lambda name: name.replace(
            ".scale_factor", ".gamma"
        ),  # the published code renames timm's LayerScale
        skip=lambda name: name.endswith("rotary_emb.inv_freq"),  # older transformers saved what is computed
    )
    for problem, names in (("lacks", missing), ("has", unknown)):
        if names:
            raise CheckpointError(
                f"{folder} {problem} {len(names)} weights (the first is {names[0]}), by what config.json describes; a "
                "shard is missing, or configuration and weights belong to different models."
            )
    return sorted(model.state_dict())
