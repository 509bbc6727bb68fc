"""LeRobot's factories find, build and load the policy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

import ceed_vla
from ceed_vla import CeedVLAConfig, CeedVLAPolicy
from ceed_vla.checkpoints import load

FRONT, WRIST, STATE = "observation.images.front", "observation.images.wrist", "observation.state"
TOKENS = "observation.language.tokens"


def test_lerobots_factories_find_the_policy(
    checkpoint: Path, batch: dict[str, Any], raw_observation: Any
) -> None:
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    assert get_policy_class("ceed_vla") is CeedVLAPolicy
    assert isinstance(make_policy_config("ceed_vla", device="cpu"), CeedVLAConfig)
    config = PreTrainedConfig.from_pretrained(checkpoint, cli_overrides=["--decoding.max_iterations=1"])
    assert isinstance(config, CeedVLAConfig)
    assert config.decoding.max_iterations == 1
    pre, _ = make_pre_post_processors(config, str(checkpoint))
    assert torch.equal(pre(raw_observation())[TOKENS], batch[TOKENS])


def test_lerobots_factory_builds_a_policy_from_an_environment(checkpoint: Path) -> None:
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import make_policy as lerobot_make_policy

    features = {
        "pixels/front": PolicyFeature(FeatureType.VISUAL, (96, 96, 3)),
        "agent_pos": PolicyFeature(FeatureType.STATE, (14,)),
        "action": PolicyFeature(FeatureType.ACTION, (7,)),
    }
    names = {"pixels/front": FRONT, "agent_pos": STATE, "action": "action"}
    environment: Any = SimpleNamespace(features=features, features_map=names)
    config = PreTrainedConfig.from_pretrained(checkpoint)
    config.pretrained_path = checkpoint
    policy = lerobot_make_policy(config, env_cfg=environment)
    assert isinstance(policy, CeedVLAPolicy)
    assert policy.config.cameras == (FRONT, WRIST)  # the checkpoint's own features stay


def test_the_package_names_its_parts() -> None:
    assert ceed_vla.load is load
    assert set(ceed_vla.__all__) >= {"CeedVLAPolicy", "DecodingConfig", "pretrained_path"}
    with pytest.raises(AttributeError, match="CeedVLAPolicy"):
        _ = ceed_vla.Policy
