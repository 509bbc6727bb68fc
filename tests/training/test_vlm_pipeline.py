"""The pipeline on an image-text-to-text model: train, collect, distil, by the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlms import make_tiny_vlm

import ceed_vla
from ceed_vla.cli.entry import main
from ceed_vla.training.trajectories import read_trajectories

FINAL = Path("checkpoints/final/pretrained_model")


def run(command: str, **flags: Any) -> None:
    words = [
        word
        for name, value in flags.items()
        for word in (f"--{name.replace('__', '.')}", str(value))
    ]
    assert main([command, *words]) == 0


@pytest.fixture
def train(
    write_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Fine-tune a tiny base of a family on a tiny dataset; return the folder of the checkpoint."""
    from ceed_vla.cli import entry as cli

    commands = {
        name: cli.Command(**{**vars(row), "simulator": None}) for name, row in cli.COMMANDS.items()
    }
    monkeypatch.setattr(cli, "COMMANDS", commands)
    write_dataset(tmp_path / "demo")

    def make(family: str, **flags: Any) -> Path:
        base = make_tiny_vlm(family, tmp_path / f"base_{family}")
        settings = {
            "policy.backbone.type": "vlm",
            "policy.backbone.path": base,
            "policy.chunk_size": 4,
            "policy.n_action_steps": 2,
            "policy.decoding.watch": "executed",
            "policy.auxiliary_scale": "[]",
            "roots": tmp_path / "demo",
            "output_dir": tmp_path / family,
            "steps": 3,
            "batch_size": 4,
            "grounding_steps": 0,
            "grounding_batch": 0,
            "rounds": 0,
            "log_every": 1,
            "mixed_precision": "no",
        }
        run("train", **{**settings, **flags})
        return tmp_path / family / FINAL

    return make


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_5_vl",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in (
                "llava",
                "llava_onevision",
                "paligemma",
                "qwen3_vl",
                "smolvlm",
                "smolvlm2",
            )
        ),
    ],
)
def test_train_collect_and_distil(
    family: str,
    train: Callable[..., Path],
    tmp_path: Path,
    read_log: Callable[..., dict[int, float]],
) -> None:
    teacher = train(family, **{"policy.backbone.proprio": "projected"})
    assert set(read_log(tmp_path / family)) == {1, 2, 3}
    run(
        "collect",
        policy_path=teacher,
        roots=tmp_path / "demo",
        output_dir=tmp_path / "trajectories",
        batch_size=16,
        frame_stride=2,
    )
    trajectories = read_trajectories(tmp_path / "trajectories", teacher)
    policy, pre, _ = ceed_vla.load(teacher)
    from ceed_vla.data.frames import open_dataset

    batch = pre(open_dataset(tmp_path / "demo").batch(trajectories.frame[:4], 4))
    assert policy.decode(batch, "ar").tokens.tolist() == trajectories.fixed_point[:4].tolist()
    for states in ("online", "stored"):
        run(
            "distill",
            teacher_path=teacher,
            trajectories__path=tmp_path / "trajectories",
            roots=tmp_path / "demo",
            output_dir=tmp_path / states,
            steps=2,
            batch_size=4,
            eval_frames=4,
            eval_every=2,
            states=states,
            mixed_precision="no",
            loss="paper" if states == "stored" else "trust_region",
        )
        measured = read_log(tmp_path / states, "teacher_agreement")
        assert measured[0] == 1.0  # the student starts as the teacher
        assert set(measured) == {0, 2}
    student, _, _ = ceed_vla.load(tmp_path / "online" / FINAL)
    learning = set(student.backbone.distillation_parameters())
    for (name, own), (_, its) in zip(
        student.backbone.named_parameters(), policy.backbone.named_parameters(), strict=True
    ):
        assert torch.equal(own, its) == (name not in learning), name


def test_a_base_that_is_none(train: Callable[..., Path], tmp_path: Path, capfd: Any) -> None:
    """Exit code 1 and one line, before any training."""
    make_tiny_vlm("smolvlm", tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").unlink()
    for folder, message in (
        ("nowhere", "is this the right folder"),
        ("whole", "has neither model.safetensors nor"),
    ):
        flags = {
            "policy.backbone.type": "vlm",
            "policy.backbone.path": tmp_path / folder,
            "grounding_steps": 0,
        }
        flags |= {
            "roots": tmp_path / "demo",
            "output_dir": tmp_path / folder / "run",
            "rounds": 0,
            "mixed_precision": "no",
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        assert main(["train", *words]) == 1
        assert message in capfd.readouterr().err
