"""Settings that a new policy derives from its data.

The scales of another environment are never used for regression.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.data.frames import ACTION, ENVIRONMENT, FrameStore, open_dataset
from ceed_vla.errors import ConfigError, DatasetError
from ceed_vla.training.defaults import check_target, named_terms, take_from_data
from ceed_vla.training.mixture import share_target
from ceed_vla.training.teacher import train

NAMES = tuple(f"value_{i}" for i in range(40))
PRIVILEGED = SimpleNamespace(names=NAMES, scale=(10.0, 10.0, 1.0), named=2)


@pytest.fixture
def store(studio: Any) -> FrameStore:
    return replace(open_dataset(studio.demo, decode=False), labels={ENVIRONMENT: list(NAMES)})


def policy(**changes: Any) -> CeedVLAConfig:
    return CeedVLAConfig(device="cpu", push_to_hub=False, **changes)


def test_features_ranges_and_grippers_are_the_datas(store: FrameStore) -> None:
    assert store.action is not None
    store.action[:, 3] = 0  # moves in one frame of 50: its quantiles are zero
    store.action[7, 3] = 0.5
    store.action[:, 2] = np.where(np.arange(50) < 30, 0.0, 1.0)
    config = policy()
    stats = take_from_data(config, [store], [], None)
    assert {name: f.shape for name, f in config.input_features.items()} == {
        "observation.images.front": (3, 96, 96),
        "observation.images.wrist": (3, 96, 96),
        "observation.state": (14,),
    }
    assert config.action_dim == 7
    assert config.action_tokens.gripper_dims == [2, 3, 6]
    config.action_tokens.fit(7, stats["action"])
    quantile = np.abs(np.quantile(store.action, [0.01, 0.99], axis=0)).max(0)
    assert config.action_tokens.action_high[:2] == pytest.approx(quantile[:2].tolist(), rel=1e-4)
    assert config.action_tokens.action_high[3] == 0.5
    assert (config.action_tokens.action_low[2], config.action_tokens.action_high[2]) == (0, 1)


def test_increments_are_known_by_their_names(store: FrameStore) -> None:
    for names, dims in ((["dx", "Delta_Yaw", "x", "gripper"], [0, 1]), (["shoulder.pos"], [])):
        config = policy()
        take_from_data(config, [replace(store, labels={ACTION: names})], [], None)
        assert config.delta_dims == dims
    for said in ([2], []):
        config = policy(delta_dims=said)
        take_from_data(config, [replace(store, labels={ACTION: ["dx"]})], [], None)
        assert config.delta_dims == said


def test_the_environments_target_needs_the_environments_names(store: FrameStore) -> None:
    config = policy()
    take_from_data(config, [store], [], PRIVILEGED)
    assert config.auxiliary_scale == [10, 10, 1]
    assert named_terms(config, PRIVILEGED) == 2
    assert named_terms(policy(auxiliary_scale=[1.0]), PRIVILEGED) == named_terms(config, None) == 0
    other = replace(store, labels={ENVIRONMENT: [f"joint_{i}" for i in range(40)]})
    off = {"auxiliary_weight": 0.0}
    for stores, grounding, settings in (
        ([other], [], {}),
        ([store], [other], {}),
        ([store], [], off),
    ):
        unknown = policy(**settings)
        take_from_data(unknown, stores, grounding, PRIVILEGED)
        assert unknown.auxiliary_scale == []
    recorded = replace(store, environment_state=None, labels={})
    share_target([store, recorded])
    beside = policy()
    take_from_data(beside, [recorded, store], [], PRIVILEGED)
    assert beside.auxiliary_scale == [10, 10, 1]
    # as when training continues from a checkpoint
    check_target(config, [store, other], [], PRIVILEGED)
    assert store.environment_state is not None
    assert np.isnan(other.environment_state).all()
    short = replace(store, environment_state=store.environment_state[:, :2])
    with pytest.raises(
        DatasetError, match="auxiliary_scale has 3 entries, the frames have 2 values"
    ):
        check_target(config, [], [short], None)


def test_what_does_not_fit_is_refused_before_images_are_decoded(
    studio: Any, copy: Path, tmp_path: Path
) -> None:
    settings = policy()
    settings.action_tokens.action_low, settings.action_tokens.action_high = [-1.0] * 4, [1.0] * 4
    config = studio.train_config(
        tmp_path / "run", roots=str(copy), grounding_roots="", policy=settings
    )
    with pytest.raises(ConfigError, match="action_low has 4 values, the action has 7"):
        train(config)
    assert not (copy / ".frames").exists()
