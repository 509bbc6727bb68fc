"""Damaged files of every kind, by seeded mutations: each is one of our errors or harmless, and
nothing else is touched.

The mutations know no format: values of JSON and YAML are replaced, removed, moved and blown up,
bytes flipped and cut. A case runs in a child with limits of time and memory (`corpus`).
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
from tests.helpers.corpus import LONGEST, Counts, try_cases
from tests.helpers.edits import unsealed
from tests.helpers.tabletop import tabletop_config

SIZES = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "mlp_width": 16,
    "stem_channels": [4] * 4,
    "chunk_size": 4,
}
# More cases than the suite has time for, and what became of them in a file:
# FUZZ_FACTOR=20 FUZZ_SEED=1 FUZZ_REPORT=counts.txt pytest -n 0 --timeout 0 tests/test_fuzz.py
FACTOR, OFFSET = (
    int(os.environ.get("FUZZ_FACTOR", "1")),
    1000 * int(os.environ.get("FUZZ_SEED", "0")),
)
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2.5, 1e30, float("nan"), float("inf"), -(10**20), 10**12),
    *(
        "",
        "x",
        "nan",
        "../../victim",
        "/tmp/victim",
        "a" * 2000,
        "\x1b[2J",
        "{x.__class__}",
        "cuda",
    ),
    *([], {}, [1, 2], {"a": 1}, [[[]]]),
    *(
        {"class": "os.system", "config": {"command": "touch ran"}},
        "__import__('os').system('touch ran')",
    ),
    *(
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        {"auto_map": {"AutoTokenizer": "ran.Ran"}},
    ),
)
# Values that take much more time or memory than any that is meant, each made when it is drawn.
LARGE: tuple[Callable[[], Any], ...] = (
    lambda: "1" * 60_000,
    lambda: "risk" + "1" * 60_000,
    lambda: {"risk" + "1" * 60_000: "ar"},
    lambda: {f"risk{number}": "ar" for number in range(100_000)},
    lambda: [[] for _ in range(500_000)],
    lambda: [0.5] * 300_000,
    lambda: ["a" * 1000] * 10_000,
    lambda: json.loads("[" * 150 + "]" * 150),
    lambda: 10**4000,
    lambda: "a" * 3_000_000,
    lambda: "_".join(["conf0.1"] * 10_000),
    lambda: "(a+)+$",
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))


# ---- mutations -----------------------------------------------------------------------------------


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested mappings and lists; of long lists the first three."""
    yield place
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:3])
        if isinstance(value, list)
        else ()
    )
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
        elif kind < 0.32:
            holder[place[-1]] = source.choice(LARGE)()
        else:
            holder[place[-1]] = copy.deepcopy(source.choice(STRANGE))
    return value


def dump_yaml(values: Any) -> str:
    """YAML; long ones as JSON, which is YAML too and quickly written."""
    text = json.dumps(values, default=str)
    return text if len(text) > 20_000 else yaml.safe_dump(values)


def damage_text(file: Path, source: random.Random) -> None:
    read: Callable[[str], Any] = yaml.safe_load if file.suffix == ".yaml" else json.loads
    write: Callable[[Any], str] = dump_yaml if file.suffix == ".yaml" else json.dumps
    if file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        at = source.randrange(len(lines))
        lines[at] = json.dumps(mutated(json.loads(lines[at]), source))
        file.write_text("\n".join(lines) + "\n")
        return
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
    text = file.suffix in (".json", ".jsonl", ".yaml")
    (damage_text if text and source.random() < 0.9 else damage_bytes)(file, source)


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    """At the end, what became of all cases, where FUZZ_REPORT names a file for it."""
    yield
    if file := os.environ.get("FUZZ_REPORT"):
        total = Counts()
        for counts in TOTAL.values():
            total.add(counts)
        lines = [f"{kind}: {counts}" for kind, counts in {**TOTAL, "all": total}.items()]
        Path(file).write_text("\n".join(lines) + "\n")


TOTAL: dict[str, Counts] = {}


def run_cases(
    good: Path, names: list[str], read: Callable[[Path], Any], tmp_path: Path, count: int, seed: int
) -> int:
    """Damage a copy of `good` `count` times and read it; how often that was refused in a few
    lines.
    """
    victim, mark, folder = tmp_path / "victim", tmp_path / "mark", tmp_path / "place" / "folder"
    victim.write_text("mine")
    mark.mkdir()

    def case(number: int) -> None:
        source = random.Random(f"{seed + OFFSET} {number}")
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(good, folder)
        damage(folder / source.choice(names), source)
        read(folder)

    return counted(tmp_path.name.rstrip("0123456789"), count * FACTOR, case, victim, mark) // FACTOR


def counted(kind: str, count: int, case: Callable[[int], Any], victim: Path, mark: Path) -> int:
    """Try cases, note what became of them, and fail for any that neither was refused nor is
    harmless.
    """
    counts, failures = try_cases(count, case, victim, mark)
    TOTAL.setdefault(kind, Counts()).add(counts)
    assert not failures, f"{counts}\n" + "\n".join(
        f"case {f.number}: {f.what}" for f in failures[:5]
    )
    found = sorted(str(path.relative_to(victim.parent)) for path in victim.parent.iterdir())
    assert set(found) <= {"place", "victim", "mark"}, "something was written outside the folder"
    return counts.refused


# ---- the kinds of files --------------------------------------------------------------------------


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


def test_tables_that_unpack_to_much(dataset: Path, tmp_path: Path) -> None:
    """Columns of a data set in other types, encodings and lengths, which compress to little."""
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
