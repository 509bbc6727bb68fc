"""Sealed checkpoints: lost, exchanged, added and half-written files are errors; sealing others."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from safetensors.torch import load_file, save_file

import ceed_vla
from ceed_vla import CeedVLAConfig, CeedVLAPolicy
from ceed_vla.axes.depth.exits import make_exits
from ceed_vla.checkpoint_files import fingerprint
from ceed_vla.checkpoints import load, save, seal, weights_hash
from ceed_vla.checkpoints.manifest import MANIFEST, SEALED, check_files, own_files
from ceed_vla.cli.entry import main
from ceed_vla.errors import CheckpointError
from ceed_vla.folders import CONFIG, CONTEXT, EXITS, WEIGHTS
from ceed_vla.serving.predictor import declared_spec
from tests.helpers.edits import edit, step, unsealed

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE = "policy_preprocessor_step_4_normalizer_processor.safetensors"
LOADERS = [load, CeedVLAPolicy.from_pretrained]


@pytest.fixture
def sealed(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "policy")


@pytest.fixture(scope="module")
def with_exits(
    make_policy: Any,
    processors: tuple[Any, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    policy = make_policy()
    policy.backbone.exits = make_exits(policy.backbone, [1], "linear")
    torch.nn.init.normal_(policy.backbone.exits[1].linear.weight, std=0.1)
    policy.config.decodings = {"plan20": "deer1t2"}
    return save(tmp_path_factory.mktemp("with_exits") / "policy", policy, *processors)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# ---- refused by a manifest ----------------------------------------------------------------------


def test_a_manifest_lists_all_that_is_read(sealed: Path) -> None:
    assert json.loads((sealed / CONFIG).read_text())[SEALED] is True
    files = json.loads((sealed / MANIFEST).read_text())["files"]
    assert set(files) == {path.name for path in sealed.iterdir()} - {MANIFEST}
    assert {CONFIG, WEIGHTS, PRE, POST, STATE} < set(files)
    check_files(sealed)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_file_counts(sealed: Path, loader: Callable[[Path], Any]) -> None:
    for file in sorted(sealed.iterdir()):
        data = file.read_bytes()
        flip(file)
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            loader(sealed)
        file.write_bytes(data[:-2])
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            loader(sealed)
        file.unlink()
        with pytest.raises(CheckpointError, match=f"lacks {file.name}"):
            loader(sealed)
        file.write_bytes(data)
    loader(sealed)


def _scaled(folder: Path) -> None:
    tensors = load_file(folder / STATE)
    save_file({name: 3 * value for name, value in tensors.items()}, folder / STATE)


def _exchanged(folder: Path) -> None:
    mean, std = "observation.state.mean", "observation.state.std"
    tensors = load_file(folder / STATE)
    save_file({**tensors, mean: tensors[std], std: tensors[mean]}, folder / STATE)


def _edited(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / file, change)


def _pipe(folder: Path) -> None:
    (folder / STATE).unlink()
    os.mkfifo(folder / STATE)


def _relative(values: dict[str, Any]) -> None:
    values["steps"].insert(0, {"registry_name": "relative_actions_processor"})


def _outside(values: dict[str, Any]) -> None:
    values["files"]["../x"] = values["files"][CONFIG]


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "statistics times 3": (_scaled, STATE),
    "statistics exchanged": (_exchanged, STATE),
    "heads doubled": (_edited(CONFIG, lambda v: v["backbone"].update(heads=4)), CONFIG),
    "relative actions": (_edited(PRE, _relative), PRE),
    "another decoding": (_edited(CONFIG, lambda v: v.update(decode_with="cap1")), CONFIG),
    "another device": (
        _edited(PRE, lambda v: step(v, "device_processor")["config"].update(device="cuda")),
        PRE,
    ),
    "flag removed": (_edited(CONFIG, lambda v: v.pop(SEALED)), CONFIG),
    "flag is a text": (_edited(CONFIG, lambda v: v.update(sealed="no")), "sealed is 'no'"),
    "exits added": (
        lambda f: save_file({"a": torch.ones(1)}, f / EXITS),
        f"{EXITS} is not in {MANIFEST}",
    ),
    "a scorer added": (lambda f: os.mkfifo(f / CONTEXT), f"{CONTEXT} is not in {MANIFEST}"),
    "a pipe": (_pipe, STATE),
    "manifest of another program": (lambda f: (f / MANIFEST).write_text("{}"), "reads format 1"),
    "manifest with a path": (_edited(MANIFEST, _outside), "plain name"),
    "manifest without weights": (_edited(MANIFEST, lambda v: v["files"].pop(WEIGHTS)), WEIGHTS),
    "manifest without hashes": (_edited(MANIFEST, lambda v: v["files"].update({PRE: 3})), PRE),
    "manifest of itself": (
        _edited(MANIFEST, lambda v: v["files"].update({MANIFEST: v["files"][PRE]})),
        "lists itself",
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_named(
    sealed: Path,
    change: str,
    loader: Callable[[Path], Any],
) -> None:
    do, message = CHANGES[change]
    do(sealed)
    with pytest.raises(CheckpointError) as error:
        loader(sealed)
    assert message in str(error.value)


def test_files_of_two_checkpoints_do_not_mix(
    checkpoint: Path,
    with_exits: Path,
    tmp_path: Path,
) -> None:
    """Files of equal shapes are detected, too; only the manifest can tell them apart."""
    for name in own_files(checkpoint):
        if (with_exits / name).read_bytes() == (checkpoint / name).read_bytes():
            continue
        folder = shutil.copytree(with_exits, tmp_path / name)
        shutil.copy(checkpoint / name, folder / name)
        with pytest.raises(CheckpointError, match=r"manifest\.json|config\.json"):
            load(folder)


def test_whoever_reads_config_json_alone_reads_the_sealed_one(sealed: Path) -> None:
    import lerobot_policy_ceed_vla  # noqa: F401  (LeRobot's tools import their plugins)

    assert declared_spec(str(sealed)).chunk_steps == 4
    edit(sealed / CONFIG, lambda values: values.update(n_action_steps=1))
    readers: list[Callable[[Path], Any]] = [
        CeedVLAConfig.from_pretrained,
        lambda f: CeedVLAConfig.from_pretrained(f, cli_overrides=["--n_action_steps=2"]),
        PreTrainedConfig.from_pretrained,
        lambda f: declared_spec(str(f)),
    ]
    for reader in readers:
        with pytest.raises(CheckpointError, match=r"config\.json has \d+ bytes"):
            reader(sealed)
    (sealed / MANIFEST).unlink()
    for reader in readers:
        with pytest.raises(CheckpointError, match=r"lacks manifest\.json"):
            reader(sealed)


def test_other_files_are_the_users(sealed: Path) -> None:
    for name in ("README.md", ".gitattributes", "train_config.json", "robot.yaml", "LICENSE"):
        (sealed / name).write_text("mine")
    load(sealed)


# ---- exits and scorers of an unsealed checkpoint -----------------------------------------------


def test_exits_that_a_decoding_needs_are_not_lost(with_exits: Path, tmp_path: Path) -> None:
    folder = unsealed(shutil.copytree(with_exits, tmp_path / "policy"))
    assert list(load(folder)[0].backbone.exits) == [1]
    (folder / EXITS).unlink()
    for loader in LOADERS:
        with pytest.raises(CheckpointError, match=r"lacks exits\.safetensors") as error:
            loader(folder)
        assert "its decoding 'plan20' (deer1t2)" in str(error.value)
    edit(folder / CONFIG, lambda values: values.update(decodings={}))
    assert load(folder)[0].backbone.exits == {}  # without exits, the last norm is read


@pytest.mark.parametrize("name", [EXITS, CONTEXT])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_module_is_a_file(folder: Path, name: str, kind: str) -> None:
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("nowhere")
    for loader in LOADERS:
        with pytest.raises(CheckpointError, match=name):
            loader(folder)


def test_modules_of_another_policy_do_not_stay(
    policy: CeedVLAPolicy,
    with_exits: Path,
    tmp_path: Path,
) -> None:
    """LeRobot's `save_pretrained`, over a folder that had exits and a scorer."""
    folder = unsealed(shutil.copytree(with_exits, tmp_path / "policy"))
    save_file({"a": torch.ones(1)}, folder / CONTEXT)
    policy.save_pretrained(folder)
    assert not (folder / EXITS).exists()
    assert not (folder / CONTEXT).exists()


# ---- unsealed checkpoints, and sealing ----------------------------------------------------------


def test_an_unsealed_checkpoint_says_so_once(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        for loader in (*LOADERS, load):
            loader(folder)
    texts = [record.getMessage() for record in caplog.records]
    lines = [text for text in texts if "manifest" in text]
    assert len(lines) == 1
    assert f"`ceed-vla seal {folder}`" in lines[0]


def test_what_lerobot_writes_is_unsealed_until_it_is_sealed(
    sealed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The processors are saved after the policy, so the policy cannot write their hashes."""
    policy, pre, post = load(sealed)
    policy.save_pretrained(sealed)  # into a sealed folder, whose manifest is no longer valid
    assert not (sealed / MANIFEST).exists()
    assert json.loads((sealed / CONFIG).read_text())[SEALED] is False
    load(sealed)
    for part in (policy, pre, post):
        part.save_pretrained(tmp_path / "new")
    folder = tmp_path / "new"
    (folder / "train_config.json").write_text("{}")
    before = fingerprint(str(folder)), weights_hash(folder)
    assert main(["seal", str(folder)]) == 0
    assert "sealed" in capsys.readouterr().out
    # an evaluation of the checkpoint can be resumed
    assert (fingerprint(str(folder)), weights_hash(folder)) == before
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(listed) == own_files(folder) - {MANIFEST}
    assert load(folder)[0].config == policy.config
    flip(folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load(folder)


def test_a_configuration_does_not_carry_the_flag(sealed: Path, tmp_path: Path) -> None:
    config = CeedVLAConfig.from_pretrained(sealed)
    (tmp_path / "new").mkdir()
    config.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / CONFIG).read_text())[SEALED] is False


def test_a_checkpoint_that_was_changed_is_sealed_again(sealed: Path) -> None:
    (sealed / "notes").mkdir()
    edit(sealed / CONFIG, lambda values: values.update(n_action_steps=1))
    with pytest.raises(CheckpointError, match=f"run `ceed-vla seal {sealed}`"):
        load(sealed)
    assert seal(sealed) == [CONFIG]
    assert seal(sealed) == []
    assert load(sealed)[0].config.n_action_steps == 1
    assert (sealed / "notes").is_dir()


def test_only_what_loads_is_sealed(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for file, change, message in (
        (CONFIG, lambda v: v.update(n_action_steps=9), "n_action_steps is 9"),
        (PRE, lambda v: v.update(steps=[]), "lacks the step"),
        (CONFIG, lambda v: v.update(type="act"), "only such checkpoints are sealed"),
    ):
        edit(folder / file, change)
        changed = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert main(["seal", str(folder)]) == 1
        told = capsys.readouterr().err
        assert message in told
        assert ".new" not in told  # the folder that the user named, not the temporary one
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == changed
        (folder / file).write_bytes(before[file])
    assert main(["seal", str(tmp_path / "none")]) == 1
    assert "No checkpoint folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_links_into_a_cache_become_files(folder: Path, tmp_path: Path) -> None:
    """A folder of links, as the hub's client stores downloads."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for index, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(index))
        file.symlink_to(Path("..", "blobs", str(index)))
    seal(folder)
    load(folder)
    assert not (folder / WEIGHTS).is_symlink()
    assert SEALED not in json.loads((blobs / "0").read_text())  # the cache is unchanged


def test_the_shipped_checkpoints_are_sealed() -> None:
    for name in ("teacher", "student"):
        folder = ceed_vla.pretrained_path(name)
        assert json.loads((folder / CONFIG).read_text())[SEALED] is True
        check_files(folder)


def test_reading_needs_no_torch() -> None:
    """A robot node reads what a checkpoint declares; its policy may run in another Python."""
    code = (
        "import sys; from ceed_vla.serving.predictor import declared_spec; "
        "print(declared_spec('student').chunk_steps, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8", "False"]
