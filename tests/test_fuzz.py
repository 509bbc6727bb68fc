"""Damaged checkpoints and datasets, by seeded mutations.

Each damaged file raises one of our errors or is harmless, and no other file changes. The mutations
are independent of the format (`mutations`). A case runs in a child with limits of time and memory
(`corpus`).
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ceed_vla import CeedVLAPolicy
from ceed_vla.checkpoints import load, save
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from tests.helpers.edits import unsealed
from tests.helpers.fuzzing import (
    FACTOR,
    OFFSET,
    counted,
    forbid_network,
    run_cases,
    write_report,
)
from tests.helpers.tabletop import tabletop_config

SIZES = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "mlp_width": 16,
    "stem_channels": [4] * 4,
    "chunk_size": 4,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_network(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    yield
    write_report()


@pytest.fixture(scope="module")
def policy() -> CeedVLAPolicy:
    torch.manual_seed(0)
    return CeedVLAPolicy(tabletop_config(**SIZES, n_action_steps=1, num_bins=15)).eval()


@pytest.fixture(scope="module")
def checkpoint(policy: CeedVLAPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stats = {"observation.state": {"mean": torch.zeros(14), "std": torch.ones(14)}}
    processors = make_ceed_vla_pre_post_processors(
        policy.config, stats, instructions=["put the red cube in the bin"]
    )
    return unsealed(save(tmp_path_factory.mktemp("checkpoint") / "policy", policy, *processors))


def test_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    names = sorted(file.name for file in checkpoint.iterdir())
    assert run_cases(checkpoint, names, load, tmp_path, 110, 1) > 60


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mujoco")
    from ceed_vla.sim.record import record
    from ceed_vla.sim.recording.config import RecordConfig
    from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv

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
        name
        for name in relative(dataset)
        if not name.startswith((".", "recording", "meta/episodes", "meta/stats"))
    ]
    assert run_cases(dataset, names, read, tmp_path, 90, 2) > 40


def test_recordings(dataset: Path, tmp_path: Path) -> None:
    from ceed_vla.data.frames import open_dataset
    from ceed_vla.data.writer import DatasetWriter
    from ceed_vla.sim.recording.attempts import Attempt

    del Attempt
    info = json.loads((dataset / "meta" / "info.json").read_text())
    own = {k: v for k, v in info["features"].items() if k.startswith(("observation", "action"))}
    before = len(open_dataset(shutil.copytree(dataset, tmp_path.parent / f"{tmp_path.name}-whole")))
    shutil.rmtree(tmp_path.parent / f"{tmp_path.name}-whole")

    def read(root: Path) -> None:
        writer = DatasetWriter(
            root, repo_id="local/x", fps=10, features=own, robot_type="ceed_tabletop"
        )
        assert writer.frames == before, "frames were lost without a word"

    assert (
        run_cases(
            dataset,
            ["recording.json", "meta/info.json", "meta/tasks.parquet"],
            read,
            tmp_path,
            40,
            3,
        )
        > 15
    )


def test_tables_that_unpack_to_much(dataset: Path, tmp_path: Path) -> None:
    """Columns of a dataset in other types, encodings and lengths, which compress well."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ceed_vla.data.frames import open_dataset

    (tmp_path / "victim").write_text("mine")
    (tmp_path / "mark").mkdir()
    values: tuple[Callable[[], Any], ...] = (
        lambda: "x" * 500_000,
        lambda: b"\x89PNG" + bytes(500_000),
        lambda: [0.0] * 20_000,
        lambda: ["x" * 1000] * 300,
        lambda: {"bytes": bytes(10**6), "path": "/etc/hostname"},
        lambda: None,
        lambda: 2**62,
    )

    def case(number: int) -> None:
        source = random.Random(f"{OFFSET} {number}")
        root = tmp_path / "place" / "folder"
        shutil.rmtree(root.parent, ignore_errors=True)
        shutil.copytree(dataset, root)
        file = source.choice(sorted(root.rglob("*.parquet")))
        table = pq.read_table(file)
        rows = max(len(table), source.choice((1, 100, 300)))
        name = source.choice(table.column_names)
        column = pa.array([source.choice(values)()] * rows)
        names = table.column_names
        columns = {
            n: pa.array([c[0].as_py()] * rows, c.type) for n, c in zip(names, table, strict=True)
        }
        compression = source.choice(("zstd", "gzip", "snappy"))
        dictionary = source.random() < 0.5
        pq.write_table(
            pa.table({**columns, name: column}),
            file,
            compression=compression,
            use_dictionary=dictionary,
        )
        open_dataset(root)

    assert (
        counted("test_tables", 15 * FACTOR, case, tmp_path / "victim", tmp_path / "mark")
        > 7 * FACTOR
    )


def test_trajectories(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    from ceed_vla.training.trajectories import CollectConfig, collect, read_trajectories

    good = tmp_path.parent / f"{tmp_path.name}-trajectories"
    collect(
        CollectConfig(
            policy_path=str(checkpoint), roots=str(dataset), output_dir=str(good), frame_stride=1
        )
    )
    assert run_cases(good, relative(good), read_trajectories, tmp_path, 60, 7) > 30


def test_fitted_tokens(dataset: Path, tmp_path: Path) -> None:
    from ceed_vla.tokens.fast import FastTokensConfig
    from ceed_vla.training.fit_tokens import FitTokensConfig, fit_tokens

    good = tmp_path.parent / f"{tmp_path.name}-tokens"
    good.mkdir()
    fit_tokens(FitTokensConfig(roots=str(dataset), output=str(good / "tokens.json"), chunk_size=4))

    def read(folder: Path) -> None:
        tokens: Any = FastTokensConfig(path=str(folder / "tokens.json")).build(4, 7)
        tokens.decode(tokens.encode(torch.zeros(1, 4, 7)))

    assert run_cases(good, ["tokens.json"], read, tmp_path, 60, 8) > 20
