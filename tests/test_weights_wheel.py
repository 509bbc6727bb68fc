"""A wheel of weights: built from a folder, installed, and found by name without an import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from script_modules import load_script

import ceed_vla
from ceed_vla.checkpoints import resolve_checkpoint
from ceed_vla.checkpoints.manifest import config_text, write_manifest
from ceed_vla.checkpoints.sealing import seal
from ceed_vla.errors import CheckpointError, ConfigError
from tests.helpers.policies_by_reference import refer_relatively, save_student_beside_base

ROOT = Path(__file__).parents[1]
COMMITTED = {  # folders of `weights`, with an instruction that they know
    "libero_object": "pick up the milk",
    "metaworld_mt10": "push the puck to a goal",
}
# run in a folder outside the clone: load by name, and decode one chunk of an observation of zeros
DECODE = """
import sys, torch, ceed_vla
for name in (sys.argv[1], sys.argv[1] + "/teacher"):
    policy, pre, post = ceed_vla.load(name)
    features = policy.config.input_features
    frame = {key: torch.zeros(feature.shape) for key, feature in features.items()}
    action = post(policy.predict_action_chunk(pre({**frame, "task": sys.argv[2]})))
    print(name, tuple(action.shape), bool(action.isfinite().all()))
"""


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("weights_wheel")


# setuptools removes the class of an error, so another process cannot unpickle it
@pytest.mark.filterwarnings("ignore")
def test_from_a_run_to_a_name(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "run" / "student" / "checkpoints" / "final"
    final.mkdir(parents=True)
    (final / "pretrained_model").symlink_to(ceed_vla.pretrained_path("student"))
    card = tmp_path / "card.md"
    card.write_text("# Card\n")
    wheel = script.build(script.WheelConfig("ofatest", tmp_path / "run", card, tmp_path / "out"))
    assert wheel.parent == tmp_path / "out"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no wheel ceed_vla_other is installed"):
        resolve_checkpoint("other/student")
    folder = resolve_checkpoint("ofatest/student")
    assert folder == tmp_path / "site" / "ceed_vla_ofatest" / "student"
    assert "ceed_vla_ofatest" not in sys.modules
    assert ceed_vla.load("ofatest/student")[0].config.chunk_size == 8
    assert (folder.parent / "README.md").read_text() == "# Card\n"
    with pytest.raises(CheckpointError, match="missing from this installation"):
        resolve_checkpoint("ofatest/teacher")


# setuptools removes the class of an error, so another process cannot unpickle it
@pytest.mark.filterwarnings("ignore")
def test_the_name_of_a_wheel_is_that_of_its_student(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"weights_wheel.py --name libero_object"):
        ceed_vla.load("libero_object")
    folder = tmp_path / "weights" / "libero_object"
    shutil.copytree(ceed_vla.pretrained_path("teacher"), folder / "student")
    (folder / "README.md").write_text("# Card\n")
    wheel = script.build(script.WheelConfig("libero_object"))
    assert wheel.parent == tmp_path / "dist"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = tmp_path / "site" / "ceed_vla_libero_object" / "student"
    assert resolve_checkpoint("libero_object") == found
    assert resolve_checkpoint("libero_object/student") == found
    assert ceed_vla.load("libero_object")[0].config.chunk_size == 8
    (tmp_path / "libero_object").mkdir()  # no checkpoint: a warning, and the wheel's
    assert resolve_checkpoint("libero_object") == found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMMITTED)
def test_committed_weights_are_found_by_name_outside_the_clone(
    script: Any, name: str, tmp_path: Path
) -> None:
    folder = ROOT / "weights" / name
    output, empty, site = tmp_path / "dist", tmp_path / "empty", tmp_path / "site"
    wheel = script.build(script.WheelConfig(name, folder, output=output))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DECODE, name, COMMITTED[name]],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shape = ceed_vla.load(folder / "student")[0].config
    chunk = (1, shape.chunk_size, *shape.action_feature.shape)
    assert done.stdout.splitlines() == [
        f"{name} {chunk} True",
        f"{name}/teacher {chunk} True",
    ]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 30e6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("relative", [False, True])
def test_adapters_come_with_the_model_that_they_refer_to(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    weights = tmp_path / "weights"
    student, policy = save_student_beside_base(weights)
    (weights / "README.md").write_text("# Card\n")

    def build() -> Path:
        wheel: Path = script.build(
            script.WheelConfig(f"words{relative:d}", weights, output=tmp_path)
        )
        return wheel

    if relative:
        refer_relatively(student)
        (student / "notes").mkdir()  # then the folder stays, and its files are replaced
        seal(student)
        assert ceed_vla.load(student)[0].backbone.num_layers == 2
    wheel = build()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (weights / "base").rename(tmp_path / "elsewhere")
    monkeypatch.syspath_prepend(tmp_path / "site")
    found, own = ceed_vla.load(f"words{relative:d}/student")[0].state_dict(), policy.state_dict()
    assert all(torch.equal(found[name], own[name]) for name in own)
    with pytest.raises(CheckpointError, match=r"base, which is missing; make it .*README\.md may"):
        build()


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_needs_a_plugin_is_packed(script: Any, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    student = Path(shutil.copytree(ceed_vla.pretrained_path("student"), weights / "student"))
    (weights / "README.md").write_text("# Card\n")
    values = json.loads((student / "config.json").read_text())
    text = config_text({**values, "packages": ["not_imported"]})
    (student / "config.json").write_text(text)
    write_manifest(student)
    with pytest.raises(CheckpointError, match="needs a package that is not imported"):
        ceed_vla.load(student)
    assert script.build(script.WheelConfig("plugin", weights, output=tmp_path)).is_file()


def test_one_wheel_has_one_base(script: Any, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for name in ("teacher", "student"):
        found, _ = save_student_beside_base(tmp_path / name)
        shutil.move(found, tmp_path / "weights" / name)
    (tmp_path / "weights" / "README.md").write_text("# Card\n")
    with pytest.raises(CheckpointError, match=r"refer to different models: .*; build a wheel for"):
        script.build(script.WheelConfig("two", tmp_path / "weights", output=tmp_path))


def test_nothing_to_build(script: Any, tmp_path: Path) -> None:
    (tmp_path / "card.md").touch()
    with pytest.raises(CheckpointError, match="neither teacher nor student"):
        script.build(script.WheelConfig("x", tmp_path, tmp_path / "card.md", tmp_path))
    for name, card, error in (
        ("../x", tmp_path / "card.md", "lower-case"),
        ("x", tmp_path / "none.md", "no model card"),
    ):
        with pytest.raises(ConfigError, match=error):
            script.build(script.WheelConfig(name, tmp_path, card, tmp_path))
