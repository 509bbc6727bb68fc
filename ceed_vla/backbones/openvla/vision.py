"""Vision towers and projector of OpenVLA: images to embeddings of the language model."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ceed_vla.backbones.openvla.folder import Architecture
from ceed_vla.errors import CheckpointError, ConfigError


class VisionTowers(nn.Module):
    """One timm tower, or two whose patch features are concatenated; their names are those of published weights."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.featurizer = _tower(architecture, 0)
        self.fused_featurizer = _tower(architecture, 1) if architecture.fused else None

    @property
    def width(self) -> int:
        """Features of one patch."""
        return sum(cast("int", tower.embed_dim) for tower in self._towers)

    @property
    def _towers(self) -> list[nn.Module]:
        return [tower for tower in (self.featurizer, self.fused_featurizer) if tower is not None]

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3 * towers, S, S) to patch features (B, patches, width) of the second-to-last layers."""
        pairs = zip(cast("list[Any]", self._towers), pixels.split(3, dim=1), strict=True)
        features = [tower.get_intermediate_layers(part, n=[len(tower.blocks) - 2])[0] for tower, part in pairs]
        return torch.cat(features, dim=2)


def _tower(architecture: Architecture, index: int) -> nn.Module:
    """A timm model without its classifier."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError("OpenVLA's vision towers need timm; install ceed_vla[vlm].") from error
    values = architecture.values
    name = values["timm_model_ids"][index]
    sizes, activations = values["image_sizes"], values.get("timm_override_act_layers")
    settings = {
        "img_size": sizes[index],
        "act_layer": activations[index] if activations else None,
        **(values.get("timm_model_kwargs") or [{}, {}])[index],  # both lists were checked (`openvla_folder`)
    }
    try:
        tower: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **settings)
    except Exception as error:  # timm raises many kinds
        raise CheckpointError(f"timm cannot build {name!r} of config.json ({error}).") from error
    if len(getattr(tower, "blocks", ())) < 2:
        raise CheckpointError(f"The vision tower {name!r} is no transformer of at least 2 blocks.")
    return tower


class Projector(nn.Module):
    """Patch features to embeddings (B, patches, d); two layers for one tower, three for two."""

    def __init__(self, vision_width: int, width: int, fused: bool) -> None:
        super().__init__()
        middle = 4 * vision_width if fused else width
        self.fc1 = nn.Linear(vision_width, middle)
        self.fc2 = nn.Linear(middle, width)
        self.fc3 = nn.Linear(width, width) if fused else None
        self.activation = nn.GELU()

    def forward(self, features: Tensor) -> Tensor:
        x = self.fc2(self.activation(self.fc1(features)))
        return x if self.fc3 is None else self.fc3(self.activation(x))
