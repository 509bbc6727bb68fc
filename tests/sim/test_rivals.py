"""ACT beside policies of all kinds of inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lerobot.configs import FeatureType, PolicyFeature

from ceed_vla.sim.rivals import act

CAMERA = {"observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 64, 64))}
EMPTY = {"observation.images.empty_camera_0": PolicyFeature(FeatureType.VISUAL, (3, 64, 64))}
STATE = {"observation.state": PolicyFeature(FeatureType.STATE, (5,))}


@pytest.mark.parametrize("inputs", [{**CAMERA, **STATE}, CAMERA, {**CAMERA, **EMPTY, **STATE}])
@pytest.mark.parametrize("sides", [(64, 64), (48, 80)])
def test_any_observation_is_timed(inputs: dict[str, Any], sides: tuple[int, int]) -> None:
    action = PolicyFeature(FeatureType.ACTION, (7,))
    config = SimpleNamespace(
        input_features=inputs,
        output_features={"action": action},
        action_feature=action,
        device="cpu",
    )
    probe = act((SimpleNamespace(config=config), None, None))  # type: ignore[arg-type]
    observation = {
        "pixels": {"front": np.zeros((*sides, 3), np.uint8)},
        "agent_pos": np.zeros(5, np.float32),
    }
    assert probe(observation, "anything")["total"] > 0
