"""Settings that a new policy takes from a LeRobotDataset of `lerobot-train`: from its frames, or
else from its statistics.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from tabletop import tabletop_config

from ceed_vla import CeedVLAPolicy
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.data.files import names_of
from ceed_vla.errors import ConfigError
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors

FRONT, STATE, DEPTH = "observation.images.front", "observation.state", "observation.images.depth"
NAMES = ["dx", "dy", "tool", "gripper"]
AVERAGED = {"q01": [-0.3, -0.3, 0.0, 0.0], "q99": [0.3, 0.3, 0.1, 100.0]}  # averaged over episodes
STATE_STATS = {"mean": np.zeros(3), "std": np.ones(3)}


def open_config(**changes: Any) -> CeedVLAConfig:
    """Settings of a small policy as LeRobot makes them: with all features of a dataset."""
    return tabletop_config(
        width=32,
        layers=1,
        heads=2,
        mlp_width=32,
        stem_channels=[8] * 4,
        auxiliary_scale=[],
        input_features={
            FRONT: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            DEPTH: PolicyFeature(FeatureType.VISUAL, (1, 32, 32)),
            STATE: PolicyFeature(FeatureType.STATE, (3,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (2,)),
            "observation.force": PolicyFeature(FeatureType.STATE, (6,)),
            "observation.depth": PolicyFeature(FeatureType.STATE, (8, 12)),
        },
        output_features={
            "action": PolicyFeature(FeatureType.ACTION, (4,)),
            "action.raw": PolicyFeature(FeatureType.ACTION, (9,)),
        },
        **{"action_range": "quantile", "action_low": [], "action_high": [], **changes},
    )


def write(root: Path, actions: np.ndarray | None) -> SimpleNamespace:
    """LeRobot's metadata of a dataset with one episode of numbers, without files for its frames."""
    vector = {"dtype": "float32", "names": None}
    image = {"dtype": "image", "shape": [32, 32, 3], "names": ["height", "width", "channels"]}
    features = {
        FRONT: image,
        DEPTH: {**image, "info": {"is_depth_map": True}},
        STATE: {**vector, "shape": [3]},
        "observation.force": {**vector, "shape": [6]},
        "action": {**vector, "shape": [4], "names": NAMES},
    }
    frames = 200
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "total_frames": frames,
        "total_episodes": 1,
        "features": features,
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    if actions is not None:
        (root / "data").mkdir()
        zeros = np.zeros(frames, np.int64)
        columns = {
            "action": pa.array(list(actions), pa.list_(pa.float32())),
            "index": np.arange(frames),
            "episode_index": zeros,
            "task_index": zeros,
            "timestamp": np.arange(frames) / 10,
        }
        pq.write_table(pa.table(columns), root / "data" / "file.parquet")
    extremes = {"min": [-1.0, -0.5, 0.0, 0.0], "max": [0.8, 1.0, 0.7, 255.0]}
    numbers = {**extremes, **AVERAGED, "mean": [0.0] * 4, "std": [1.0] * 4, "count": [frames]}
    stats = {
        STATE: dict(STATE_STATS),
        "action": {name: np.array(values) for name, values in numbers.items()},
    }
    stats["observation.force"] = {"mean": np.zeros(6), "std": np.ones(6)}
    return SimpleNamespace(root=root, features=features, fps=10, stats=stats)


def build(config: CeedVLAConfig, meta: Any) -> CeedVLAPolicy:
    """A policy, made with LeRobot's `make_policy`."""
    return CeedVLAPolicy(config=config, dataset_stats=meta.stats, dataset_meta=meta)


@pytest.fixture
def actions() -> np.ndarray:
    random = np.random.default_rng(0)
    values = random.uniform(-1, 1, (200, 4)).astype(np.float32)
    values[:, 2] = 0
    values[50:53, 2] = 0.7
    values[:, 3] = np.where(np.arange(200) < 120, 0, 255)
    return values


def test_the_frames_define_ranges_grippers_and_increments(
    actions: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ceed_vla")
    meta = write(tmp_path / "data", actions)
    config = open_config()
    policy = build(config, meta)
    tokens: Any = config.action_tokens
    reach = np.abs(np.quantile(actions[:, :2], [0.01, 0.99], axis=0)).max(0).tolist()
    assert tokens.action_high == pytest.approx([*reach, 0.7, 255], rel=1e-6)
    assert tokens.action_low == pytest.approx([-reach[0], -reach[1], 0, 0], rel=1e-6)
    assert tokens.gripper_dims == [2, 3]
    assert config.delta_dims == [0, 1]
    assert list(config.input_features or {}) == [FRONT, STATE, "observation.environment_state"]
    assert list(config.output_features or {}) == ["action"]
    (line,) = [
        record.getMessage() for record in caplog.records if "action ranges" in record.getMessage()
    ]
    assert (
        "[0, 0.7], [0, 255], from all frames; two-valued dimensions [2, 3]; increments [0, 1]"
        in line
    )
    assert line.endswith(f"ignored: {DEPTH} image (32, 32, 3), observation.force float32 (6,)")
    pre, _ = make_ceed_vla_pre_post_processors(policy.config, meta.stats, instructions=["push"])
    saved = pre.steps[-1].state_dict()
    assert saved["action.q99"][:2].tolist() == pytest.approx(
        np.quantile(actions[:, :2], 0.99, axis=0).tolist()
    )
    assert not any(name.startswith("observation.force") for name in saved)


def test_without_frames_ranges_are_the_extremes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ceed_vla")
    meta = write(tmp_path / "data", None)
    config = open_config()
    build(config, meta)
    assert config.action_tokens.action_high == [1, 1, 0.7, 255]  # type: ignore[attr-defined]
    assert config.action_tokens.action_low == [-1, -1, 0, 0]  # type: ignore[attr-defined]
    assert config.delta_dims == [0, 1]
    assert meta.stats["action"]["q99"].tolist() == [0.8, 1.0, 0.7, 255.0]  # for the normalisers
    assert "from the statistics' minimum and maximum, as the frames cannot be read" in caplog.text
    assert "the data files hold 0 frames" in caplog.text

    alone = open_config()  # a policy built in Python, with the statistics only
    alone.input_features = {
        name: f for name, f in (alone.input_features or {}).items() if name != DEPTH
    }
    CeedVLAPolicy(alone, dataset_stats=write(tmp_path / "alone", None).stats)
    assert alone.action_tokens.action_high == [1, 1, 0.7, 255]  # type: ignore[attr-defined]


def test_what_the_settings_say_stays(
    actions: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ceed_vla")
    ends = {"action_low": [-2.0] * 4, "action_high": [2.0] * 4}
    config = open_config(**ends, gripper_dims=[1], delta_dims=[])
    build(config, write(tmp_path / "data", actions))
    assert config.action_tokens.action_high == [2] * 4  # type: ignore[attr-defined]
    assert (config.action_tokens.gripper_dims, config.delta_dims) == ([1], [])
    assert "from the settings; two-valued dimensions [1]; increments []" in caplog.text


def test_broken_actions_define_nothing(actions: np.ndarray, tmp_path: Path) -> None:
    actions[7, 1] = np.nan
    meta = write(tmp_path / "data", actions)
    meta.stats["action"]["max"][1] = np.nan
    with pytest.raises(ConfigError, match="all values must be finite"):
        build(open_config(), meta)


def test_a_checkpoint_keeps_its_ranges(
    actions: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    meta = write(tmp_path / "data", actions)
    policy = build(open_config(), meta)
    pre, post = make_ceed_vla_pre_post_processors(policy.config, meta.stats, instructions=["push"])
    folder = tmp_path / "policy"
    for part in (policy, pre, post):
        part.save_pretrained(folder)
    caplog.set_level(logging.INFO, logger="ceed_vla")
    other = write(tmp_path / "other", 0.01 * actions)
    again = CeedVLAPolicy.from_pretrained(folder, dataset_stats=other.stats, dataset_meta=other)
    assert again.tokenizer.high.tolist() == policy.tokenizer.high.tolist()
    assert "from the checkpoint; two-valued dimensions [2, 3]" in caplog.text


def test_a_checkpoint_with_more_features_is_read(actions: np.ndarray, tmp_path: Path) -> None:
    """Earlier versions of lerobot-train wrote every feature of the data as an input."""
    meta = write(tmp_path / "data", actions)
    policy = build(open_config(), meta)
    force = {"observation.force": PolicyFeature(FeatureType.STATE, (6,))}
    policy.config.input_features = {**(policy.config.input_features or {}), **force}
    folder = tmp_path / "policy"
    for part in (
        policy,
        *make_ceed_vla_pre_post_processors(policy.config, meta.stats, instructions=["push"]),
    ):
        part.save_pretrained(folder)
    assert "observation.force" in json.loads((folder / "config.json").read_text())["input_features"]
    # not validated yet
    lerobots = PreTrainedConfig.from_pretrained(folder, cli_overrides=["--decode_with=cap1"])
    for config in (None, lerobots):
        again = CeedVLAPolicy.from_pretrained(folder, config=config)
        assert list(again.config.input_features or {}) == [
            FRONT,
            STATE,
            "observation.environment_state",
        ]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["dx", "gripper"], ["dx", "gripper"]),
        ({"motors": ["dx"], "hand": ["gripper"]}, ["dx", "gripper"]),
        ({"gripper": 1, "dx": 0}, ["dx", "gripper"]),
        (["dx"], None),
        ({"dx": 0}, None),
        ({"dx": "left", "gripper": 1}, None),
        (None, None),
    ],
)
def test_the_three_forms_of_names(names: Any, found: list[str] | None) -> None:
    assert names_of({"names": names, "shape": (2,)}) == found
