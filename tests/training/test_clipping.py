"""Actions that a vocabulary clips: reported, and refused beyond a share.

Clipping by quantiles, by construction, is never refused.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ceed_vla.errors import ConfigError
from ceed_vla.tokens.uniform import ActionTokenizer, ranges_from_stats
from ceed_vla.training.clipping import check_actions, check_clipping
from ceed_vla.training.fit_tokens import FitTokensConfig, fit_tokens
from ceed_vla.training.teacher import train

UNIT = ActionTokenizer([-1.0] * 2, [1.0] * 2, 4)


def normal(rows: int = 5000) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.2, (rows, 2)).astype(np.float32)


@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform"])
def test_quantiles_clip_by_construction_and_pass(
    draw: str, caplog: pytest.LogCaptureFixture
) -> None:
    random = np.random.default_rng(1)
    actions = getattr(random, draw)(size=(5000, 2)).astype(np.float32)
    stats = {f"q{q:02}": np.quantile(actions, q / 100, axis=0) for q in (1, 99)}
    low, high = ranges_from_stats(
        {**stats, "min": actions.min(0), "max": actions.max(0)}, "quantile"
    )
    caplog.set_level("INFO")
    check_actions(ActionTokenizer(low, high, 4), actions, 0.01)
    assert "% of the action values lie outside" in caplog.text


@pytest.mark.parametrize("value", [2.1, 7.0, -7.0, 1e30])
@pytest.mark.parametrize("share", [0.005, 0.02])
def test_more_than_one_percent_far_outside_is_refused(value: float, share: float) -> None:
    actions = normal().clip(-1, 1)
    actions[: int(share * len(actions)), 1] = value
    check_actions(UNIT, actions, 0.05)
    if share < 0.01:
        check_actions(UNIT, actions, 0.01)
    else:
        with pytest.raises(ConfigError, match=r"2\.0% .* dimension 1 .*\[-1, 1\].*--max_clipped"):
            check_actions(UNIT, actions, 0.01)


def test_a_vocabulary_of_normalised_actions_is_compared_with_no_raw_ones(tmp_path: Path) -> None:
    tokens, store = copy(UNIT), SimpleNamespace(action=100 * normal())
    with pytest.raises(ConfigError, match="far outside"):
        check_clipping(tokens, [store], 0.01)  # type: ignore[list-item]
    tokens.normalised = True
    check_clipping(tokens, [store], 0.01)  # type: ignore[list-item]


def test_a_few_values_that_widen_the_range_until_nothing_is_told_apart() -> None:
    actions = normal()
    actions[0, 0] = 1e6
    tokens = ActionTokenizer([-1e6, -1], [1e6, 1], 4)
    with pytest.raises(ConfigError, match="98 % of the actions of dimension 0"):
        check_actions(tokens, actions, 0.01)
    check_actions(tokens, actions, 1.0)
    gripper = np.ones((1000, 1), np.float32)
    gripper[:5] = -1  # rarely closed, but two-valued
    check_actions(ActionTokenizer([-1.0], [1.0], 4), gripper, 0.01)


def test_a_few_values_that_leave_few_bins_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    actions = normal()
    reach = float(np.quantile(np.abs(actions[:, 0]), 0.99))
    actions[0, 0] = 100 * reach
    tokens = ActionTokenizer([-100 * reach, -1], [100 * reach, 1], 256)
    check_actions(tokens, actions, 0.01)
    assert "98 % of the actions of dimension 0 lie in" in caplog.text
    assert "fewer than 4 bins are left for the others" in caplog.text


def spoil(root: Path, value: float, rows: int = 1) -> Path:
    file = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(file)
    index = table.column_names.index("action")
    actions = table["action"].to_pylist()
    for row in range(rows):
        actions[row][2] = value
    pq.write_table(
        table.set_column(index, "action", pa.array(actions, table.schema.field(index).type)), file
    )
    return root


def test_commands_refuse_what_is_lost(
    studio: Any, tmp_path: Path, tiny_policy: Any, write_dataset: Any
) -> None:
    fixed = tiny_policy(action_range="fixed", action_low=[-1.0] * 7, action_high=[1.0] * 7)
    wild = spoil(write_dataset(tmp_path / "wild"), 7.0)  # 1 of 50 frames
    config = studio.train_config(
        tmp_path / "run", roots=str(wild), policy=fixed, steps=1, grounding_steps=0
    )
    with pytest.raises(ConfigError, match="dimension 2"):
        train(config)
    config.max_clipped, config.output_dir = 0.1, str(tmp_path / "allowed")
    train(config)
    from ceed_vla.training.distill import distill
    from ceed_vla.training.trajectories import collect

    with pytest.raises(ConfigError, match="dimension 2"):
        collect(studio.collect_config(tmp_path / "trajectories", roots=str(spoil(wild, 1e8))))
    with pytest.raises(ConfigError, match="dimension 2"):
        distill(studio.distill_config(tmp_path / "student", roots=str(wild), trajectories=online()))
    settings = {"roots": str(wild), "output": str(tmp_path / "fast.json"), "chunk_size": 4}
    with pytest.raises(ConfigError, match="dimension 2"):
        fit_tokens(FitTokensConfig(**settings, action_low=[-1.0] * 7, action_high=[1.0] * 7))
    with pytest.raises(ConfigError, match="98 % of the actions of dimension 2"):
        fit_tokens(FitTokensConfig(**{**settings, "roots": f"{wild},{studio.demo},{studio.other}"}))
    assert not (tmp_path / "fast.json").exists()


def online() -> Any:
    from ceed_vla.training.distill_data import TrajectoriesConfig

    return TrajectoriesConfig(online=True)
