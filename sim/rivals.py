"""Other kinds of policies, which `ceed-vla bench` times for comparison only."""

from __future__ import annotations

import time
from typing import Any

import torch
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy

from ceed_vla.sim.environment import Bundle, observation_batch
from ceed_vla.sim.timing import Probe


def act(bundle: Bundle) -> Probe:
    """Make a probe that times one forward of LeRobot's ACT.

    ACT has its default size, random weights, and the policy's cameras and state.
    """
    config = bundle[0].config
    features = {"input_features": config.input_features, "output_features": config.output_features}
    policy: Any = ACTPolicy(
        ACTConfig(**features, device=config.device, pretrained_backbone_weights=None)
    ).eval()
    policy.to(config.device)

    @torch.inference_mode()
    def probe(observation: dict[str, Any], instruction: str) -> dict[str, float]:
        started = time.perf_counter()
        batch = observation_batch([observation], [instruction])
        batch = {
            name: value.to(config.device)
            for name, value in batch.items()
            if name in config.input_features
        }
        policy.predict_action_chunk(batch).cpu()
        return {"total": time.perf_counter() - started}

    return probe
