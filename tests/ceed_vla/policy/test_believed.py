"""Values that are refused because they would be misread, or would exhaust the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ceed_vla import ActionTokenizer, DecodingConfig, load
from ceed_vla.checkpoint_files import check_kinds
from ceed_vla.compiled.engine import compiled
from ceed_vla.data.frames import open_dataset
from ceed_vla.decoding import named_config
from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.files import read_json, write_text
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config

TOKENS = ActionTokenizer([-1.0, -1.0], [1.0, 1.0], chunk_steps=3, num_bins=11)
BLOCK = torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ActionTokenizer("00", "11", 3),  # type: ignore[arg-type]
        lambda: ActionTokenizer([False], [True], 3),
        lambda: ActionTokenizer({0.0}, {1.0}, 3),  # type: ignore[arg-type]
        lambda: ActionTokenizer([0.0], [1.0], True),
        lambda: ActionTokenizer([0.0], [1.0], 10**8),
        lambda: ActionTokenizer([1e6], [1e6 + 1e-3], 3, num_bins=65_536),
        lambda: TOKENS.weight(None),  # type: ignore[arg-type]
        lambda: TOKENS.weight(BLOCK, torch.zeros(1, 6, dtype=torch.bool)),
        lambda: TOKENS.weight(BLOCK, [[False] * 3] * 2),  # type: ignore[arg-type]
        lambda: DecodingConfig(exits=("cap0",)),
        lambda: DecodingConfig(exits=("conf0.5",)),
        lambda: named_config("cap2_cap9"),
        lambda: named_config("conf1.5_conf0.5"),
        lambda: compiled(load("student")[0].backbone, "nope"),
        lambda: open_dataset("nowhere"),
        lambda: load_robot_config(None),  # type: ignore[arg-type]
    ],
)
def test_refused_in_a_line(wrong: Callable[[], Any]) -> None:
    with pytest.raises(CeedVLAError) as error:
        wrong()
    assert len(str(error.value)) < 1500


def test_a_previous_chunk_is_checked_token_by_token_too(policy: Any, batch: Any) -> None:
    with pytest.raises(CeedVLAError, match="previous chunk"):
        policy.decode(batch, "ar", previous=torch.zeros(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": {"a": 1, "a": 1}}'])
def test_a_name_stands_in_a_file_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "values.json").write_text(text)
    with pytest.raises(CeedVLAError, match="duplicate key"):
        read_json(tmp_path / "values.json")


def test_kinds_are_compared_all_the_way_down() -> None:
    check_kinds({"a": [1, {"b": None}], "c": 1}, {"a": (1.0, {"b": 2}), "c": 1.0, "d": True})
    for values in ({"a": [True]}, {"a": ["1"]}, {"a": [{"b": 1}]}):
        with pytest.raises(ConfigError, match="is read as"):
            check_kinds(values, {"a": [1 if values["a"] != [{"b": 1}] else {"b": True}]})


def test_nothing_is_written_through_links_that_wait(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "data"
    folder.mkdir()
    victim.write_text("mine")
    for pid in range(os.getpid() - 3, os.getpid() + 3):
        (folder / f".complete.{pid}.tmp.json").symlink_to(victim)
    write_text(folder / "complete.json", "ours")
    assert victim.read_text() == "mine"
    assert (folder / "complete.json").read_text() == "ours"
