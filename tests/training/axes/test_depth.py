"""`ceed-vla exits`: exits approach the full depth, the base does not change.

Invalid settings are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ceed_vla
from ceed_vla.axes.depth.exits import EXITS
from ceed_vla.checkpoints import save, weights_hash
from ceed_vla.errors import ConfigError, DatasetError
from ceed_vla.training.axes.depth import REPORT, ExitsConfig, exits
from ceed_vla.training.beside import DecodedConfig
from ceed_vla.training.distill import distill
from ceed_vla.training.distill_data import TrajectoriesConfig
from ceed_vla.training.joint_exits import JointExitsConfig
from ceed_vla.training.losses import register_loss
from ceed_vla.training.teacher import train
from ceed_vla.training.trajectories import collect


@pytest.fixture(scope="module")
def deep(studio: Any, tiny_policy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of three layers."""
    folder = tmp_path_factory.mktemp("deep")
    return train(studio.train_config(folder, policy=tiny_policy(layers=3), steps=40))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        ("linear", "states"),
        ("layer", "states"),
        ("coarse", "states"),
        ("linear", "fixed_points"),
    ],
)
def test_exits_learn_and_the_base_does_not(
    studio: Any, deep: Path, tmp_path: Path, kind: str, reads: str
) -> None:
    def trained(steps: int, lr: float) -> tuple[Path, dict[str, float]]:
        sizes = {"kind": kind, "reads": reads, "steps": steps, "lr": lr, "eval_frames": 16}
        config = ExitsConfig(
            str(deep), str(studio.demo), str(tmp_path / str(steps)), layers=[1], **sizes
        )
        folder = exits(config)
        return folder, json.loads((folder / REPORT).read_text())["depths"]["1"]

    (_, before), (folder, after) = trained(1, 1e-9), trained(40, 1e-2)
    worth = ("drafts",) if reads == "fixed_points" else ("same", "near")
    assert sum(after[name] for name in worth) > sum(before[name] for name in worth)
    assert after["near"] >= after["same"]
    assert weights_hash(folder) == weights_hash(deep)
    policy, _, _ = ceed_vla.load(folder)
    base, _, _ = ceed_vla.load(deep)
    assert all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), base.parameters(), strict=True)
    )
    assert list(policy.backbone.exits) == [1]
    policy.config.decodings, policy.config.decode_with = {"risk0.1": "deer1t1"}, "risk0.1"
    save(tmp_path / "measured", policy, *ceed_vla.load(folder)[1:])
    sizes = {"kind": kind, "steps": 1, "eval_frames": 16}
    anew = ExitsConfig(
        str(tmp_path / "measured"), str(studio.demo), str(tmp_path / "anew"), layers=[1], **sizes
    )
    config = ceed_vla.load(exits(anew))[0].config
    # measurements with other exits do not apply
    assert (config.decodings, config.decode_with) == (
        {},
        "ceed",
    )
    assert (folder / EXITS).stat().st_size < 0.6 * (folder / "model.safetensors").stat().st_size


def test_what_cannot_work_is_refused(studio: Any, deep: Path, tmp_path: Path) -> None:
    def config(**changes: Any) -> ExitsConfig:
        given = {
            "policy_path": str(deep),
            "roots": str(studio.demo),
            "output_dir": str(tmp_path / "new"),
        }
        return ExitsConfig(**{**given, "layers": [1], **changes})

    for change, message in (
        ({"layers": []}, "the layers of this model"),
        ({"layers": [3]}, "the layers of this model"),
        ({"output_dir": str(studio.teacher)}, r"which holds .* name a new or empty folder"),
        ({"roots": ""}, "No data"),
    ):
        with pytest.raises(ConfigError, match=message):
            exits(config(**change))
    with pytest.raises(ConfigError, match="kind"):
        config(kind="wide")
    collect(
        studio.collect_config(
            tmp_path / "ar", policy_path=str(deep), roots=str(studio.demo), states=False
        )
    )
    with pytest.raises(DatasetError, match="has no states; collect them with --states=true"):
        exits(config(trajectories=DecodedConfig(path=str(tmp_path / "ar"))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "layer", "coarse"])
def test_exits_learn_with_a_student(
    studio: Any,
    deep: Path,
    tmp_path: Path,
    interrupt_at: Callable[[int], None],
    read_log: Any,
    kind: str,
) -> None:
    def student(name: str, **changes: Any) -> Path:
        settings = {
            "teacher_path": str(deep),
            "trajectories": TrajectoriesConfig(online=True),
            "exits": JointExitsConfig([1], kind),
            "steps": 24,
            "lr": 3e-3,
            "muon_lr": 3e-3,
            "save_every": 12,
        }
        return distill(studio.distill_config(tmp_path / name, **{**settings, **changes}))

    whole = student("whole")
    losses = list(read_log(tmp_path / "whole", "exits_loss").values())
    assert losses[-1] < losses[0]
    policy, _, _ = ceed_vla.load(whole)
    assert list(policy.backbone.exits) == [1]
    interrupt_at(15)
    with pytest.raises(KeyboardInterrupt):
        student("parts")
    interrupt_at(-1)
    again, _, _ = ceed_vla.load(student("parts", resume=True))
    assert read_log(tmp_path / "parts", "exits_loss") == read_log(tmp_path / "whole", "exits_loss")
    for one, other in ((policy, again), (policy.backbone.exits[1], again.backbone.exits[1])):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    # the layers in front of the exit serve it, too
    without, _, _ = ceed_vla.load(student("without", exits=JointExitsConfig()))
    assert without.backbone.exits == {}
    assert read_log(tmp_path / "without", "exits_loss") == {}
    first = "layers.0.qkv.weight"
    assert not torch.equal(
        policy.backbone.get_parameter(first), without.backbone.get_parameter(first)
    )


@pytest.mark.slow
def test_exits_of_a_student_need_a_target(studio: Any, deep: Path, tmp_path: Path) -> None:
    @register_loss("labels_only")
    def loss(label_logits: Any, labels: Any, omega: float) -> Any:
        raise AssertionError("not called")

    for changes, message in (
        ({"loss": "labels_only"}, "exits.layers needs a loss that reads"),
        ({"gradient_checkpointing": True}, "exits.layers does not work with --gradient_"),
        ({"exits": JointExitsConfig([3])}, r"layers of this model in \[1, 2\]"),
        ({"exits": JointExitsConfig([1], "square")}, "kind must be one of"),
    ):
        config = studio.distill_config(
            tmp_path / "student",
            teacher_path=str(deep),
            trajectories=TrajectoriesConfig(online=True),
            **{"exits": JointExitsConfig([1]), **changes},
        )
        with pytest.raises(ConfigError, match=message):
            distill(config)
