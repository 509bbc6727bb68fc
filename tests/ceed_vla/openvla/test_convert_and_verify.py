"""`ceed-vla convert` and `ceed-vla verify`: checkpoints that act like the published model, and
detected differences.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ceed_vla.checkpoints import load, save, weights_hash
from ceed_vla.cli import entry as cli
from ceed_vla.convert import ConvertConfig, convert
from ceed_vla.convert.openvla import published_policy
from ceed_vla.errors import CheckpointError, ConfigError

FRONT = "observation.images.front"
TASKS = ["put the red cube on the plate", "open the drawer"]


@pytest.fixture
def cases(copied: Any, pictures: np.ndarray, reference_pixels: Any, reference_tokens: Any) -> Path:
    """A folder with images.npz and expected.json from the reference (other code, same weights)."""
    folder = copied("siglip")
    policy, pre, _ = published_policy(ConvertConfig(str(folder), unnorm_key="garage", chunk_size=2))
    np.savez(folder / "images.npz", images=pictures[:2])
    edges = np.linspace(-1, 1, 256)
    found = []
    for picture, task in zip(pictures, TASKS, strict=False):
        prompt = f"In: What action should the robot take to {task}?\nOut:"
        ids = pre.steps[2].encode_text(prompt)
        pixels = reference_pixels(picture, folder)
        tokens = reference_tokens(policy.backbone, ids, pixels, 6)
        centres = ((edges[:-1] + edges[1:]) / 2)[np.clip(31999 - np.array(tokens[:3]), 0, 254)]
        low, high = np.array([-100.0, 0.2, -1.0]), np.array([300.0, 0.4, 1.0])
        found.append(
            {
                "instruction": task,
                "prompt": prompt,
                "input_ids": ids,
                "action_tokens": tokens,
                "first_action": (0.5 * (centres + 1) * (high - low) + low).tolist(),
                "pixel_values_sum": pixels.double().sum().item(),
                "pixel_values_shape": [1, *pixels.shape],
            }
        )
    write(folder, {"unnorm_key": "garage", "chunk": 2, "cases": found})
    return folder


def write(folder: Path, expected: dict[str, Any]) -> None:
    (folder / "expected.json").write_text(json.dumps(expected))


def expected_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())  # type: ignore[no-any-return]


def test_verify_prints_a_line_a_case(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(cases)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(
        "equal" in line and task in line for line, task in zip(lines[:2], TASKS, strict=True)
    )
    assert lines[2] == "all 2 cases equal the reference"


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "token": (
        lambda c: c["action_tokens"].__setitem__(4, 31800),
        "tokens: 1 of 6 differ, the first at 4",
    ),
    "tokens": (lambda c: c["action_tokens"].pop(), "tokens: 6 instead of 5"),
    "id": (lambda c: c["input_ids"].__setitem__(0, 7), "input ids: 1 of"),
    "pixels": (lambda c: c.update(pixel_values_sum=c["pixel_values_sum"] + 0.01), "pixel sum"),
    "shape": (lambda c: c.update(pixel_values_shape=[1, 3, 28, 29]), "pixel shape: 1 of 4"),
    "action": (
        lambda c: c["first_action"].__setitem__(1, c["first_action"][1] + 2e-6),
        "first action",
    ),
    "dimensions": (lambda c: c["first_action"].pop(), "first action"),
    "prompt": (lambda c: c.update(prompt="What now?"), "prompt: 'In: What"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_verify_finds_every_difference(
    change: str, cases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, message = CHANGES[change]
    expected = expected_of(cases)
    edit(expected["cases"][1])
    write(cases, expected)
    assert cli.main(["verify", str(cases)]) == 1
    captured = capsys.readouterr()
    assert "1 of 2 cases differ" in captured.err
    lines = captured.out.splitlines()
    assert "equal" in lines[0]
    assert "DIFFERS" in lines[1]
    assert any(message in line for line in lines[2:])


UNUSABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "No folder at"),
    "no images": (lambda f: (f / "images.npz").unlink(), "has no array 'images'"),
    "damaged images": (lambda f: (f / "images.npz").write_bytes(b"PK"), "has no array 'images'"),
    "no expectation": (lambda f: (f / "expected.json").unlink(), "expected.json cannot be read"),
    "no cases": (
        lambda f: write(f, {"chunk": 1, "cases": []}),
        "needs a whole number 'chunk' and a list 'cases'",
    ),
    "incomplete case": (
        lambda f: write(f, {"chunk": 1, "cases": [{}, {}]}),
        "case 0 lacks 'instruction'",
    ),
    "grayscale": (
        lambda f: np.savez(f / "images.npz", images=np.zeros((2, 8, 8), np.uint8)),
        "one RGB picture",
    ),
    "floats": (
        lambda f: np.savez(f / "images.npz", images=np.zeros((2, 8, 8, 3))),
        "float64, expected",
    ),
    "fewer images": (
        lambda f: np.savez(f / "images.npz", images=np.zeros((1, 8, 8, 3), np.uint8)),
        r"expected (2, H, W, 3) uint8",
    ),
    "unknown dataset": (
        lambda f: write(f, {**expected_of(f), "unnorm_key": "attic"}),
        "garage, kitchen",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_cases_that_cannot_be_used(
    kind: str, cases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, message = UNUSABLE[kind]
    break_it(cases)
    assert cli.main(["verify", str(cases)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["copied", "reference"])
def test_a_converted_checkpoint_acts_as_the_model(
    weights: str, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    flags = ["--from", "openvla", str(cases), "--output_dir", str(checkpoint), "--weights", weights]
    assert (
        cli.main(["convert", *flags, "--unnorm_key=garage", "--chunk_size=2", "--n_action_steps=1"])
        == 0
    )
    assert "ceed-vla verify" in capsys.readouterr().out
    assert cli.main(["verify", str(cases), "--policy_path", str(checkpoint)]) == 0
    size = (checkpoint / "model.safetensors").stat().st_size
    assert (size > 1e6) == (weights == "copied")
    policy, _, _ = load(checkpoint)
    assert policy.config.n_action_steps == 1
    assert policy.config.action_tokens.unnorm_key == "garage"
    assert policy.config.decoding.strict  # no early exit before distillation
    if weights == "reference":
        assert not any(parameter.requires_grad for parameter in policy.parameters())
    shutil.rmtree(cases)
    if weights == "copied":  # the checkpoint needs no other files
        load(checkpoint)
    else:
        with pytest.raises(CheckpointError, match=f"are in '{cases}', but there is no such folder"):
            load(checkpoint)


def test_a_referring_checkpoint_keeps_what_was_trained(
    cases: Path, tmp_path: Path, pictures: np.ndarray
) -> None:
    convert(
        ConvertConfig(str(cases), str(tmp_path / "base"), weights="reference", unnorm_key="garage")
    )
    policy, pre, post = load(tmp_path / "base")
    trained = {"backbone.projector.fc2.bias", "backbone.language_model.lm_head.weight"}
    for name, parameter in policy.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)
            parameter.data += torch.randn(parameter.shape)
    save(tmp_path / "student", policy, pre, post)
    from safetensors import safe_open

    with safe_open(tmp_path / "student" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == trained
    again, pre, _ = load(tmp_path / "student")
    batch = pre({FRONT: torch.from_numpy(pictures).permute(0, 3, 1, 2), "task": TASKS[0]})
    assert torch.equal(again.decode(batch, "ar").tokens, policy.decode(batch, "ar").tokens)
    save(tmp_path / "copy", again, pre, post)  # loaded and saved again without loss
    assert weights_hash(tmp_path / "copy") == weights_hash(tmp_path / "student")
    assert weights_hash(tmp_path / "base") != weights_hash(tmp_path / "student")


def test_bases_are_told_apart_by_their_reference(published: Any, tmp_path: Path) -> None:
    for kind in ("siglip", "fused"):
        source = ConvertConfig(
            str(published(kind)), str(tmp_path / kind), weights="reference", unnorm_key="garage"
        )
        convert(source)
    assert weights_hash(tmp_path / "siglip") != weights_hash(tmp_path / "fused")


def test_the_camera_may_have_another_size_than_the_model_sees(
    published: Any, tmp_path: Path, pictures: np.ndarray
) -> None:
    source = ConvertConfig(
        str(published("siglip")), str(tmp_path / "x"), unnorm_key="garage", camera_size="40x48"
    )
    convert(source)
    policy, pre, _ = load(tmp_path / "x")
    assert (
        policy.config.input_features[FRONT].shape
        == pictures.shape[3:] + pictures.shape[1:3]
        == (3, 40, 48)
    )
    batch = pre({FRONT: torch.from_numpy(pictures[:1]).permute(0, 3, 1, 2), "task": TASKS[0]})
    assert batch["observation.openvla.pixel_values"].shape == (1, 3, 28, 28)


def test_where_a_checkpoint_goes(published: Any, tmp_path: Path) -> None:
    source = {"path": str(published("siglip")), "unnorm_key": "garage"}
    with pytest.raises(ConfigError, match="--output_dir is empty"):
        convert(ConvertConfig(**source))
    with pytest.raises(ConfigError, match="name a new or empty folder"):
        convert(ConvertConfig(**source, output_dir=source["path"]))
    with pytest.raises(ConfigError, match="n_action_steps is 3; it must not exceed chunk_size = 2"):
        convert(
            ConvertConfig(**source, output_dir=str(tmp_path / "x"), chunk_size=2, n_action_steps=3)
        )


def test_a_chunk_of_another_length_is_said(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(ConvertConfig(str(cases), str(tmp_path / "one"), unnorm_key="garage"))
    assert cli.main(["verify", str(cases), "--policy_path", str(tmp_path / "one")]) == 1
    assert "decodes chunks of 1, the cases hold 2" in capsys.readouterr().err
    assert cli.main(["verify", str(cases), "--policy_path", "student"]) == 1
    assert "student runs a compact model" in capsys.readouterr().err


def test_the_type_of_a_checkpoint_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "cases", "--policy.path", "it", "--dtype", "bfloat16"]) == 1
    assert "a checkpoint, which has its own type; leave dtype out" in capsys.readouterr().err
