"""The configuration of policies for the tabletop."""

from __future__ import annotations

from dataclasses import fields

from lerobot.configs import FeatureType, PolicyFeature

from ceed_vla.backbones.compact.config import CompactConfig
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.sim.tabletop.lerobot_env import PRIVILEGED
from ceed_vla.tokens.uniform import UniformTokensConfig


def tabletop_config(**changes: object) -> CeedVLAConfig:
    """The configuration of the shipped tabletop checkpoints, with `changes` on top.

    Args:
        changes: Fields of `CeedVLAConfig`, of its compact backbone, or of its uniform action
            tokens.
    """
    tokens: dict[str, object] = {
        "action_range": "fixed",
        "action_low": [-1.0, -1.0, -1.0, -0.25, -0.25, -1.0, -1.0],
        "action_high": [1.0, 1.0, 1.0, 0.25, 0.25, 1.0, 1.0],
    }
    tokens |= {name: changes.pop(name) for name in _names(UniformTokensConfig) & changes.keys()}
    sizes = {name: changes.pop(name) for name in _names(CompactConfig) & changes.keys()}
    values: dict[str, object] = {
        "input_features": {
            "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            "observation.state": PolicyFeature(FeatureType.STATE, (14,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (7,))},
        "backbone": CompactConfig(**sizes),  # type: ignore[arg-type]
        "action_tokens": UniformTokensConfig(**tokens),  # type: ignore[arg-type]
        "auxiliary_scale": list(PRIVILEGED.scale),
        "device": "cpu",
        "push_to_hub": False,
    }
    return CeedVLAConfig(**{**values, **changes})  # type: ignore[arg-type]


def _names(config_class: type[CompactConfig | UniformTokensConfig]) -> set[str]:
    return {item.name for item in fields(config_class)}
