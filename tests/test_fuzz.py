"""Damaged files of every kind, by seeded mutations: each is one of our errors or harmless, and nothing else is touched.

The mutations know no format: values of JSON and YAML are replaced, removed and moved, bytes flipped and cut.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ceed_vla import CeedVLAPolicy
from ceed_vla.checkpoints import load, save
from ceed_vla.cli_flags import UsageError, parse_flags
from ceed_vla.errors import CeedVLAError
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from tests.helpers.tabletop import tabletop_config

SIZES = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "stem_channels": [4] * 4, "chunk_size": 4}
# More cases than the suite has time for: FUZZ_FACTOR=20 FUZZ_SEED=1 pytest tests/test_fuzz.py
FACTOR, OFFSET = int(os.environ.get("FUZZ_FACTOR", "1")), 1000 * int(os.environ.get("FUZZ_SEED", "0"))
LONGEST = 2000  # characters of a message that somebody reads
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2.5, 1e30, float("nan"), float("inf"), -(10**20), 10**12),
    *("", "x", "nan", "../../victim", "/tmp/victim", "a" * 2000, "\x1b[2J", "{x.__class__}", "cuda"),
    *([], {}, [1, 2], {"a": 1}, [[[]]]),
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))


# ---- mutations --------------------------------------------------------------------------------------------------


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested mappings and lists; of long lists the first three."""
    yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*place, key))


def mutated(value: Any, source: random.Random) -> Any:
    """`value` with one or two places replaced, removed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(source.choice((1, 1, 2))):
        place = source.choice(list(places(value)))
        if not place:
            return copy.deepcopy(source.choice(STRANGE))
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        kind = source.random()
        if kind < 0.15:
            del holder[place[-1]]
        elif kind < 0.25:
            holder[place[-1]] = [holder[place[-1]]]
        else:
            holder[place[-1]] = copy.deepcopy(source.choice(STRANGE))
    return value


def damage_text(file: Path, source: random.Random) -> None:
    read: Callable[[str], Any] = yaml.safe_load if file.suffix == ".yaml" else json.loads
    write: Callable[[Any], str] = yaml.safe_dump if file.suffix == ".yaml" else json.dumps
    file.write_text(write(mutated(read(file.read_text()), source)))


def damage_bytes(file: Path, source: random.Random) -> None:
    data = bytearray(file.read_bytes())
    kind = source.random()
    if kind < 0.3:
        data = data[: source.randrange(len(data))]
    elif kind < 0.4:
        data = data + bytes(source.randrange(256) for _ in range(16))
    else:
        for _ in range(source.choice((1, 4, 64))):
            # Headers and footers are where formats say what there is.
            edge = source.choice((min(len(data), 600), len(data)))
            at = source.randrange(edge)
            data[at if source.random() < 0.5 else -1 - at] = source.randrange(256)
    file.write_bytes(bytes(data))


def damage(file: Path, source: random.Random) -> None:
    text = file.suffix in (".json", ".yaml")
    (damage_text if text and source.random() < 0.9 else damage_bytes)(file, source)


def run_cases(good: Path, names: list[str], read: Callable[[Path], Any], tmp_path: Path, count: int, seed: int) -> int:
    """Damage a copy of `good` `count` times and read it; how often that was refused in a few lines."""
    source, refused = random.Random(seed + OFFSET), 0
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for case in range(count * FACTOR):
        folder = tmp_path / "place" / "folder"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(good, folder)
        file = folder / source.choice(names)
        damage(file, source)
        try:
            read(folder)
        except (CeedVLAError, UsageError) as error:
            refused += len(str(error)) < LONGEST
        except Exception as error:
            content = file.read_bytes()[:1000]
            pytest.fail(f"case {case}: {file.name}: {type(error).__name__}: {error}\n{content!r}")
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.iterdir())
    assert found == ["place", "victim"], "something was written outside the folder"
    assert victim.read_text() == "mine"
    return refused // FACTOR


# ---- the kinds of files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> CeedVLAPolicy:
    torch.manual_seed(0)
    return CeedVLAPolicy(tabletop_config(**SIZES, n_action_steps=1, num_bins=15)).eval()


@pytest.fixture(scope="module")
def checkpoint(policy: CeedVLAPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stats = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}
    processors = make_ceed_vla_pre_post_processors(policy.config, stats, instructions=["put the red cube in the bin"])
    return save(tmp_path_factory.mktemp("checkpoint") / "policy", policy, *processors)


def test_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    names = sorted(file.name for file in checkpoint.iterdir())
    assert run_cases(checkpoint, names, load, tmp_path, 110, 1) > 60


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mujoco")
    from sim.record import record
    from sim.recording.config import RecordConfig
    from sim.tabletop.lerobot_env import CeedTabletopEnv

    root = tmp_path_factory.mktemp("data") / "demos"
    env = CeedTabletopEnv(task="push_cube", episode_length=40, image_size=16)
    record(RecordConfig(root=root, env=env, episodes=2, progress=False))
    return root


def relative(root: Path) -> list[str]:
    return sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())


def test_data_sets(dataset: Path, tmp_path: Path) -> None:
    from ceed_vla.data.frames import open_dataset

    def read(root: Path) -> None:
        store = open_dataset(root)
        store.batch(np.arange(len(store)), 4)

    names = [
        name for name in relative(dataset) if not name.startswith((".", "recording", "meta/episodes", "meta/stats"))
    ]
    assert run_cases(dataset, names, read, tmp_path, 90, 2) > 40


def test_recordings(dataset: Path, tmp_path: Path) -> None:
    from ceed_vla.data.frames import open_dataset
    from ceed_vla.data.writer import DatasetWriter
    from sim.recording.attempts import Attempt

    del Attempt
    info = json.loads((dataset / "meta" / "info.json").read_text())
    own = {k: v for k, v in info["features"].items() if k.startswith(("observation", "action"))}
    before = len(open_dataset(shutil.copytree(dataset, tmp_path.parent / f"{tmp_path.name}-whole")))
    shutil.rmtree(tmp_path.parent / f"{tmp_path.name}-whole")

    def read(root: Path) -> None:
        writer = DatasetWriter(root, repo_id="local/x", fps=10, features=own, robot_type="ceed_tabletop")
        assert writer.frames == before, "frames were lost without a word"

    assert run_cases(dataset, ["recording.json", "meta/info.json", "meta/tasks.parquet"], read, tmp_path, 40, 3) > 15


def test_robot_files(tmp_path: Path) -> None:
    pytest.importorskip("rclpy")
    from ros_nodes.robot.robot_file import load_robot_config, packaged_config

    good = tmp_path.parent / f"{tmp_path.name}-robot"
    good.mkdir()
    for file in packaged_config().parent.iterdir():
        shutil.copy(file, good / file.name)
    name = packaged_config().name
    refused = run_cases(good, [name], lambda folder: load_robot_config(folder / name), tmp_path, 90, 4)
    assert refused > 50


def test_settings_files(tmp_path: Path) -> None:
    from training.distill import DistillConfig

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
    assert run_cases(good, names, read, tmp_path, 60, 6) > 20


def test_trajectories(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    from training.trajectories import CollectConfig, collect, read_trajectories

    good = tmp_path.parent / f"{tmp_path.name}-trajectories"
    collect(CollectConfig(policy_path=str(checkpoint), roots=str(dataset), output_dir=str(good), frame_stride=1))
    assert run_cases(good, relative(good), read_trajectories, tmp_path, 60, 7) > 30


def test_fitted_tokens(dataset: Path, tmp_path: Path) -> None:
    from ceed_vla.tokens.fast import FastTokensConfig
    from training.fit_tokens import FitTokensConfig, fit_tokens

    good = tmp_path.parent / f"{tmp_path.name}-tokens"
    good.mkdir()
    fit_tokens(FitTokensConfig(roots=str(dataset), output=str(good / "tokens.json"), chunk_size=4))

    def read(folder: Path) -> None:
        tokens: Any = FastTokensConfig(path=str(folder / "tokens.json")).build(4, 7)
        tokens.decode(tokens.encode(torch.zeros(1, 4, 7)))

    assert run_cases(good, ["tokens.json"], read, tmp_path, 60, 8) > 20


@pytest.mark.parametrize("command", ["TrainConfig", "DistillConfig", "CollectConfig", "EvalConfig", "RecordConfig"])
def test_flags(command: str) -> None:
    from sim.evaluate import EvalConfig
    from sim.recording.config import RecordConfig
    from training.distill import DistillConfig
    from training.teacher import TrainConfig
    from training.trajectories import CollectConfig

    known = {kind.__name__: kind for kind in (TrainConfig, DistillConfig, CollectConfig, EvalConfig, RecordConfig)}
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
        flags = [f"--{source.choice(names)}={source.choice(texts)}" for _ in range(source.choice((1, 2)))]
        root = ["--root=somewhere"] if command == "RecordConfig" else []
        try:
            parse_flags(kind, [*root, *flags])
        except (CeedVLAError, UsageError) as error:
            refused += len(str(error)) < LONGEST
    assert refused > 20
