"""LeRobot's factories find, build and load the policy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

import ceed_vla
from ceed_vla import CeedVLAConfig, CeedVLAPolicy
from ceed_vla.checkpoints import load
from ceed_vla.errors import ConfigError

FRONT, WRIST, STATE = "observation.images.front", "observation.images.wrist", "observation.state"
TOKENS = "observation.language.tokens"


def test_lerobots_factories_find_the_policy(
    checkpoint: Path, batch: dict[str, Any], raw_observation: Any
) -> None:
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import (
        get_policy_class,
        make_policy_config,
        make_pre_post_processors,
    )

    assert get_policy_class("ceed_vla") is CeedVLAPolicy
    assert isinstance(make_policy_config("ceed_vla", device="cpu"), CeedVLAConfig)
    config = PreTrainedConfig.from_pretrained(
        checkpoint, cli_overrides=["--decoding.max_iterations=1"]
    )
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
    assert policy.config.cameras == (FRONT, WRIST)  # the checkpoint's own features do not change


def test_the_vocabulary_comes_from_the_data_set_that_lerobot_train_opens(tiny_config: Any) -> None:
    import pandas as pd
    from lerobot.policies.factory import make_pre_post_processors

    config, tasks = tiny_config(), pd.DataFrame({"task_index": [0]}, index=["wipe the table"])
    with pytest.raises(ConfigError, match="no instruction"):
        make_pre_post_processors(config)
    config._runtime_dataset_meta = SimpleNamespace(tasks=tasks)
    pre, _ = make_pre_post_processors(config)
    assert pre.steps[2].vocabulary == ["table", "the", "wipe"]


def test_optimisers_keep_contiguous_states(
    make_policy: Any, training_batch: dict[str, Any]
) -> None:
    policy = make_policy()  # in evaluation mode the camera stems are channels-last
    weight = policy.backbone.stems[0].convolutions[1].weight
    assert not weight.is_contiguous()
    expected = policy(training_batch)[0]
    optimizer = torch.optim.AdamW(policy.get_optim_params())
    torch.testing.assert_close(policy.train().eval()(training_batch)[0], expected)
    policy.train()(training_batch)[0].backward()
    optimizer.step()
    tensors = [t for state in optimizer.state_dict()["state"].values() for t in state.values()]
    assert all(t.is_contiguous() for t in tensors)  # LeRobot's checkpoints need contiguous tensors


def test_the_package_names_its_parts() -> None:
    assert ceed_vla.load is load
    assert set(ceed_vla.__all__) >= {"CeedVLAPolicy", "DecodingConfig", "pretrained_path"}
    with pytest.raises(AttributeError, match="CeedVLAPolicy"):
        _ = ceed_vla.Policy


@pytest.mark.slow
def test_importing_the_policy_registers_what_lerobots_factory_needs(checkpoint: Path) -> None:
    code = (
        "import sys; from ceed_vla import CeedVLAPolicy; "
        "from lerobot.policies.factory import make_pre_post_processors; "
        "config = CeedVLAPolicy.from_pretrained(sys.argv[1]).config; "
        "make_pre_post_processors(config, pretrained_path=sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint)], check=True)


def test_lerobots_tools_choose_a_decoding_by_its_name(
    checkpoint: Path, batch: dict[str, Any]
) -> None:
    config = CeedVLAConfig.from_pretrained(checkpoint, cli_overrides=["--decode_with=cap1"])
    policy = CeedVLAPolicy.from_pretrained(checkpoint, config=config)
    expected = policy.decode(batch, "cap1").actions
    assert torch.equal(policy.predict_action_chunk(batch), expected)
