"""Damaged settings, models, names and flags, by seeded mutations.

Each damaged file raises one of our errors or is harmless, and no other file changes. The mutations
are independent of the format (`mutations`). A case runs in a child with limits of time and memory
(`corpus`).
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ceed_vla.cli.flags import UsageError, parse_flags
from ceed_vla.errors import CeedVLAError
from tests.helpers.corpus import LONGEST
from tests.helpers.fuzzing import (
    FACTOR,
    OFFSET,
    counted,
    forbid_network,
    run_cases,
    write_report,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_network(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    yield
    write_report()


def test_robot_files(tmp_path: Path) -> None:
    pytest.importorskip("rclpy")
    from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config

    good = tmp_path.parent / f"{tmp_path.name}-robot"
    good.mkdir()
    for file in packaged_config().parent.iterdir():
        shutil.copy(file, good / file.name)
    name = packaged_config().name
    refused = run_cases(
        good, [name], lambda folder: load_robot_config(folder / name), tmp_path, 90, 4
    )
    assert refused > 50


def test_settings_files(tmp_path: Path) -> None:
    from ceed_vla.training.distill import DistillConfig

    good = tmp_path.parent / f"{tmp_path.name}-settings"
    good.mkdir()
    values = {
        "steps": 10,
        "lr": 1e-3,
        "trajectories": {"path": "x"},
        "lora": {"rank": 4},
        "roots": "a,b",
        "loss": "paper",
    }
    (good / "run.yaml").write_text(yaml.safe_dump(values))
    flags = lambda folder: parse_flags(DistillConfig, ["--config_path", str(folder / "run.yaml")])  # noqa: E731
    assert run_cases(good, ["run.yaml"], flags, tmp_path, 60, 5) > 25


def test_published_models(tmp_path: Path) -> None:
    from benchmarks.models.openvla import write_openvla
    from ceed_vla.backbones.openvla.folder import action_statistics
    from ceed_vla.backbones.openvla.inputs import OpenVLAInputsStep

    good = write_openvla(tmp_path.parent / f"{tmp_path.name}-openvla", width=16)
    (good / "model.safetensors").unlink()

    def read(folder: Path) -> None:
        action_statistics(folder)
        OpenVLAInputsStep().read_folder(str(folder))

    names = ["config.json", "preprocessor_config.json", "tokenizer_config.json"]
    assert run_cases(good, names, read, tmp_path, 30, 6) > 8


def test_tokenizers(tmp_path: Path) -> None:
    from benchmarks.models.openvla import write_openvla
    from ceed_vla.backbones.openvla.tokenizer import read_tokenizer
    from ceed_vla.tokens.fast_codec import FastCodec

    good = tmp_path.parent / f"{tmp_path.name}-tokenizer"
    good.mkdir()
    source = write_openvla(tmp_path.parent / f"{tmp_path.name}-openvla", width=16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, good / name)

    def read(folder: Path) -> None:
        read_tokenizer(folder)("What action should the robot take to put the cube in the bin?")
        codec = FastCodec.from_json(
            (folder / "tokenizer.json").read_text("utf-8", "replace"), 10.0, -50
        )
        codec.encode(torch.zeros(1, 4, 7))

    read(good)
    names = ["tokenizer.json", "tokenizer.json", "tokenizer_config.json"]
    assert run_cases(good, names, read, tmp_path, 30, 9) > 8


def test_groups(tmp_path: Path) -> None:
    from ceed_vla.training.axes.learned import read_groups

    good = tmp_path.parent / f"{tmp_path.name}-groups"
    good.mkdir()
    strata = {
        "of": {"0": "alike"},
        "episodes": {"differ": [], "alike": [[0, "t", 9]]},
        "solved": {"alike": 1.0},
    }
    group = {"seed": 0, "features": [[0.0] * 4] * 2, "solved": [True, None]}
    lines = [json.dumps(values) for values in (strata, group, group)]
    (good / "groups.jsonl").write_text("\n".join(lines) + "\n")
    read_groups(good / "groups.jsonl")
    read = lambda folder: read_groups(folder / "groups.jsonl")  # noqa: E731
    assert run_cases(good, ["groups.jsonl"], read, tmp_path, 60, 10) > 30


def test_names(tmp_path: Path) -> None:
    from ceed_vla.decoding.names import named_config

    (tmp_path / "victim").write_text("mine")
    (tmp_path / "mark").mkdir()
    parts = (
        "ar",
        "jacobi",
        "ceed",
        "conf0.2",
        "cap2",
        "risk",
        "plan",
        "learned",
        "deer2t3",
        "keep24",
        "h",
        "mid",
        "fresh",
        "_",
        ".",
        "-1",
        "1e400",
        "0",
        "9" * 50,
        "9" * 60_000,
        "\0",
        "\u0663",
        " ",
        "(",
        "x",
    )

    def case(number: int) -> None:
        source = random.Random(f"{OFFSET} {number}")
        words = [
            source.choice(parts) * source.choice((1, 1, 1, 2, 30))
            for _ in range(source.randrange(1, 5))
        ]
        name = source.choice(("_", "_", "")).join(words)
        named_config(name, own={"risk0.05": name} if source.random() < 0.3 else {})

    assert (
        counted("test_names", 200 * FACTOR, case, tmp_path / "victim", tmp_path / "mark")
        > 100 * FACTOR
    )


@pytest.mark.parametrize(
    "command", ["TrainConfig", "DistillConfig", "CollectConfig", "EvalConfig", "RecordConfig"]
)
def test_flags(command: str) -> None:
    from ceed_vla.sim.evaluate import EvalConfig
    from ceed_vla.sim.recording.config import RecordConfig
    from ceed_vla.training.distill import DistillConfig
    from ceed_vla.training.teacher import TrainConfig
    from ceed_vla.training.trajectories import CollectConfig

    known = {
        kind.__name__: kind
        for kind in (TrainConfig, DistillConfig, CollectConfig, EvalConfig, RecordConfig)
    }
    kind: Any = known[command]
    source = random.Random(f"{command}{OFFSET}")
    names = [name for name in kind.__dataclass_fields__ if name not in ("root", "output_dir")]
    texts = (
        "",
        "-1",
        "0",
        "nan",
        "inf",
        "1e400",
        "9" * 400,
        "x",
        "[1, [2]]",
        "{a: 1}",
        "null",
        "true",
        "1.5",
        "&a [*a]",
    )
    refused = 0
    for _ in range(40 * FACTOR):
        flags = [
            f"--{source.choice(names)}={source.choice(texts)}" for _ in range(source.choice((1, 2)))
        ]
        root = ["--root=somewhere"] if command == "RecordConfig" else []
        try:
            parse_flags(kind, [*root, *flags])
        except (CeedVLAError, UsageError) as error:
            refused += len(str(error)) < LONGEST
    assert refused > 20
