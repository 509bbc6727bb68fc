"""Other kinds of policies, which `ceed-vla bench` times for comparison only."""

from __future__ import annotations

import time
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.utils.constants import OBS_STATE

from ceed_vla.scheduling import torch_pinned
from ceed_vla.sim.environment import Bundle, observation_batch
from ceed_vla.sim.timing import Probe


def act(bundle: Bundle) -> Probe:
    """Make a probe that times one forward of LeRobot's ACT.

    ACT has its default size, random weights, and the policy's cameras and state. It cannot do
    without a state: for a policy that reads none it has one of zeros. Inputs that an observation
    lacks or has in another shape, as empty cameras, are zeros, too.
    """
    config = bundle[0].config
    inputs = {
        OBS_STATE: PolicyFeature(FeatureType.STATE, config.action_feature.shape),
        **config.input_features,
    }
    features = {"input_features": inputs, "output_features": config.output_features}
    policy: Any = ACTPolicy(
        ACTConfig(**features, device=config.device, pretrained_backbone_weights=None)
    ).eval()
    policy.to(config.device)
    zeros = {name: torch.zeros(1, *feature.shape) for name, feature in inputs.items()}

    @torch.inference_mode()
    @torch_pinned()
    def probe(observation: dict[str, Any], instruction: str) -> dict[str, float]:
        started = time.perf_counter()
        found = observation_batch([observation], [instruction])
        batch = {}
        for name, blank in zeros.items():
            value = found.get(name, blank)
            value = value if value.shape == blank.shape else blank
            batch[name] = value.to(config.device)
        policy.predict_action_chunk(batch).cpu()
        return {"total": time.perf_counter() - started}

    return probe
