"""Unsupported settings and features; action ranges from the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

from ceed_vla import CeedVLAPolicy
from ceed_vla.errors import ConfigError

FRONT, STATE = "observation.images.front", "observation.state"


def test_action_ranges_come_from_the_data(tiny_config: Any) -> None:
    stats = {
        "min": torch.tensor([-1.0, -2.0, 0.0]),
        "max": torch.tensor([3.0, 2.0, 1.0]),
        "q01": torch.tensor([-0.5, -1.0, 0.0]),
        "q99": torch.tensor([2.0, 1.5, 1.0]),
    }
    features = {"output_features": {"action": PolicyFeature(FeatureType.ACTION, (3,))}}
    ranges = {"action_low": [], "action_high": []}
    quantile = CeedVLAPolicy(
        tiny_config(**features, **ranges, action_range="quantile"), dataset_stats={"action": stats}
    )
    assert quantile.config.action_tokens.action_high == pytest.approx([2.0, 1.5, 1.0])
    # symmetric: zero is a bin centre
    assert quantile.config.action_tokens.action_low[:2] == pytest.approx([-2.0, -1.5])
    extremes = CeedVLAPolicy(
        tiny_config(**features, **ranges, action_range="min_max"), dataset_stats={"action": stats}
    )
    assert extremes.config.action_tokens.action_high[:2] == pytest.approx([3.0, 2.0])
    with pytest.raises(ConfigError, match="action statistics"):
        CeedVLAPolicy(tiny_config(**features, **ranges, action_range="quantile"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_action_steps": 5}, "must not exceed chunk_size = 4"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"decode_with": "fast"}, "Unknown decoder 'fast'"),
        ({"num_bins": 1}, "num_bins"),
        ({"width": 30}, "multiple of heads"),
        ({"image_size": 100}, "multiple of 8"),
        ({"stem_channels": [8, 8]}, "exactly 4"),
        ({"action_range": "sigma"}, "quantile, min_max, fixed"),
        ({"action_low": [0.0]}, "one of each"),
        ({"action_low": [], "action_high": []}, "needs action_low"),
        ({"auxiliary_scale": [float("inf")]}, "finite"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], message: str, tiny_config: Any) -> None:
    if changes.get("width"):
        changes = {**changes, "heads": 4}
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([STATE], ["action"], "no camera"),
        ([FRONT], ["action"], "no observation.state"),
        ([FRONT, STATE], [], "action"),
    ],
)
def test_features_that_cannot_be_served(
    inputs: list[str], outputs: list[str], message: str, tiny_config: Any
) -> None:
    config = tiny_config()
    config.input_features = {k: v for k, v in (config.input_features or {}).items() if k in inputs}
    config.output_features = {
        k: v for k, v in (config.output_features or {}).items() if k in outputs
    }
    with pytest.raises(ConfigError, match=message):
        CeedVLAPolicy(config)
    with pytest.raises(ConfigError, match="gripper_dims"):
        CeedVLAPolicy(tiny_config(gripper_dims=[7]))


def test_names_whose_measurement_is_stale_are_forgotten(tiny_config: Any) -> None:
    config = tiny_config()
    config.decodings, config.decode_with = (
        {"risk0.1": "cap1", "plan": "cap2", "plan12": "cap2"},
        "plan12",
    )
    config.forget("risk", new={"risk0.2": "cap3"})
    assert (config.decodings, config.decode_with) == (
        {"plan": "cap2", "plan12": "cap2", "risk0.2": "cap3"},
        "plan12",
    )
    config.forget("plan", new={"plan": "cap1"})
    # without removed settings
    assert (config.decodings, config.decode_with) == (
        {"risk0.2": "cap3", "plan": "cap1"},
        "ceed",
    )
    config.decode_with = "cap2"
    config.forget()
    assert (config.decodings, config.decode_with) == ({}, "cap2")
