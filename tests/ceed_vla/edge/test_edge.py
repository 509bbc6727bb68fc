"""An export decodes torch's tokens without torch, and refuses files that are not its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="exports need the extra export")

import onnx
from damaged_exports import DAMAGES, other_graph, outside_graph, with_settings
from onnx import numpy_helper

import ceed_vla
import ceed_vla.sim.tabletop  # registers ceed_vla/Tabletop-v0
from ceed_vla.checkpoints.sealing import SealConfig, seal_folder
from ceed_vla.edge import EdgePolicy
from ceed_vla.errors import (
    CheckpointError,
    ConfigError,
    NotFiniteError,
    ObservationError,
    TokenError,
    VerificationError,
)
from ceed_vla.export.cached import cached_export
from ceed_vla.export.export import ExportConfig, export
from ceed_vla.real_time import decode_behind
from ceed_vla.sim.environment import observation_batch

STATE = "observation.state"
INSTRUCTION = "put the red cube in the bin"
DECODERS = ("ar", "jacobi", "jacobi_h", "ceed", "cap1", "gap0.2", "agree4_cap6", "conf0.9_fresh")


@pytest.fixture(scope="module")
def exported() -> Path:
    """The shipped student's export, which must not be changed."""
    return cached_export("student")


@pytest.fixture(scope="module")
def edge(exported: Path) -> EdgePolicy:
    return EdgePolicy(exported, threads=1)


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, for damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture(scope="module")
def observations(edge: EdgePolicy) -> list[tuple[dict[str, np.ndarray], str, np.ndarray | None]]:
    """Two episodes under the student's control: observation, instruction, last tokens."""
    found = []
    for seed, task in ((40000, "cube_in_bin"), (40001, "push_cube")):
        env = gymnasium.make("ceed_vla/Tabletop-v0", task=task)
        observation, info = env.reset(seed=seed)
        previous = None
        for _ in range(2):
            raw = as_arrays(observation_batch([observation], [info["instruction"]]))
            found.append((raw, info["instruction"], previous))
            result = edge.decode(raw, info["instruction"], previous=previous)
            previous = np.asarray(result.tokens)
            for action in np.asarray(result.actions)[0][:4]:
                observation, *_ = env.step(action)
        env.close()
    return found


def as_arrays(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """Images (H, W, 3) uint8 and the state (D,) of a batch of one row."""
    images = {
        name: (value[0] * 255).round().byte().permute(1, 2, 0).numpy()
        for name, value in batch.items()
        if name.startswith("observation.images.")
    }
    return {**images, STATE: batch[STATE][0].numpy()}


def as_batch(raw: dict[str, np.ndarray], instruction: str) -> dict[str, Any]:
    images = {
        name: (torch.from_numpy(value).permute(2, 0, 1)[None].float() / 255).contiguous(
            memory_format=torch.channels_last
        )
        for name, value in raw.items()
        if value.ndim == 3
    }
    return {**images, STATE: torch.from_numpy(raw[STATE])[None], "task": [instruction]}


def note(seen: list[tuple[int, int]], tokens: Any, proven: int, forwards: int) -> None:
    seen.append((proven, forwards))


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("decoding", DECODERS)
def test_tokens_are_torchs(
    edge: EdgePolicy, observations: list[Any], decoding: str, frozen: int
) -> None:
    policy, preprocess, _ = ceed_vla.load("student")
    for raw, instruction, previous in observations:
        if frozen and previous is None:
            continue
        last = None if previous is None else torch.from_numpy(previous)
        seen: dict[str, list[tuple[int, int]]] = {"torch": [], "edge": []}
        wanted = policy.decode(
            preprocess(as_batch(raw, instruction)),
            decoding,
            previous=last,
            frozen_steps=frozen,
            on_proven=partial(note, seen["torch"]),
        )
        found = edge.decode(
            raw,
            instruction,
            decoding,
            previous=previous,
            frozen_steps=frozen,
            on_proven=partial(note, seen["edge"]),
        )
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.actions, wanted.actions)
        for name in ("iterations", "exact_tokens", "exact", "layer_forwards", "prefix_layers"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), name)
        assert (found.forwards, found.exit_reason) == (wanted.forwards, wanted.exit_reason)
        assert seen["edge"] == seen["torch"]
        assert set(found.seconds) == {"preprocess", "prefill", "decode"}


def test_the_example_of_the_page(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[3] / "docs" / "how-to" / "export.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(examples) == 3
    code = "".join(examples).replace("outputs/export", str(exported))
    exec(compile(code, str(page), "exec"), {})
    assert re.search(r"^\(1, 8, 7\) [12]$", capsys.readouterr().out, re.MULTILINE)


def test_a_deadline_ends_a_block(edge: EdgePolicy, observations: list[Any]) -> None:
    raw, instruction, _ = observations[0]
    result = edge.decode(raw, instruction, "jacobi", deadline_s=1e-6)
    assert (result.forwards, result.exit_reason) == (1, ["deadline"])
    with pytest.raises(ConfigError, match="token-by-token decoding has no early exit"):
        edge.decode(raw, instruction, "ar", deadline_s=1.0)


def test_it_runs_without_torch(exported: Path) -> None:
    script = f"""
import sys
import numpy as np
from ceed_vla.edge import EdgePolicy
policy = EdgePolicy({str(exported)!r})
images = dict.fromkeys(policy.settings.images.cameras, np.zeros((96, 96, 3), np.uint8))
result = policy.decode({{**images, {STATE!r}: np.zeros(14)}}, {INSTRUCTION!r})
assert result.actions.shape == (1, 8, 7), result.actions.shape
print([name for name in ("torch", "lerobot", "transformers") if name in sys.modules])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("size", [(96, 96), (128, 160), (240, 100), (48, 60)])
def test_images_are_resized_as_by_torch(edge: EdgePolicy, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None] / 255,
        size=(96, 96),
        mode="bilinear",
        antialias=True,
    )
    found = edge.reader.image(image, edge.settings.images.cameras[0])
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)


def test_wrong_observations(edge: EdgePolicy, observations: list[Any]) -> None:
    raw, instruction, _ = observations[0]
    camera = edge.settings.images.cameras[0]
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({k: v for k, v in raw.items() if k != STATE}, instruction, "lacks 'observation.state'"),
        ({**raw, STATE: np.zeros(3)}, instruction, "expected numbers of the shape .14"),
        ({**raw, STATE: np.full(14, np.nan)}, instruction, "NaN or infinite"),
        ({**raw, camera: raw[camera][0]}, instruction, "expected .height, width, 3."),
        ({**raw, camera: raw[camera].astype(np.int64)}, instruction, "must be uint8"),
        ({**raw, camera: raw[camera] / 2.0}, instruction, "has values from .* must be in .0, 1"),
        ({**raw, camera: raw[camera] * np.nan}, instruction, "has values from nan"),
        ({**raw, STATE: raw[STATE].reshape(2, 7)}, instruction, r"is \(2, 7\) float32"),
        ({**raw, STATE: [[1, 2], [3]]}, instruction, "is not an array"),
        (None, instruction, "has no features .NoneType"),
        (raw, None, "it must be one text"),
        (raw, "?", "has no word"),
        (raw, "sing loudly", "no word of the policy's vocabulary"),
    ]
    for observation, text, message in wrong:
        with pytest.raises(ObservationError, match=message):
            edge.decode(observation, text)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"decoding": "beam"}, ConfigError, "Unknown decoder 'beam'"),
        ({"decoding": "jacobi_random"}, ConfigError, "takes torch's random numbers"),
        ({"executed_steps": 9}, ConfigError, r"executed_steps is 9; it must be an int in \[1, 8\]"),
        ({"frozen_steps": 2}, TokenError, "there is no previous chunk"),
        ({"previous": np.zeros((1, 55), np.int64)}, TokenError, "expected an array"),
        ({"previous": np.full((1, 56), 255)}, TokenError, "tokens from 255 to 255"),
        (
            {"previous": np.zeros((1, 56), np.int64), "frozen_steps": 8},
            TokenError,
            r"frozen_steps is 8; it must be in \[0, 4\]",
        ),
        (
            {"previous": np.zeros((1, 56), np.int64), "shift_steps": 9},
            TokenError,
            "shift_steps is 9",
        ),
    ],
)
def test_wrong_arguments(
    edge: EdgePolicy,
    observations: list[Any],
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    raw, instruction, _ = observations[0]
    with pytest.raises(error, match=message):
        edge.decode(raw, instruction, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"executed_steps": 0}, {"executed_steps": 99}, {"frozen_steps": 8}, {"frozen_steps": "2"}],
)
def test_wrong_steps_behind_frozen_ones(
    edge: EdgePolicy, observations: list[Any], arguments: dict[str, Any]
) -> None:
    raw, instruction, _ = observations[0]
    batch = {"observation": raw}
    policy, _, _ = ceed_vla.load("student")
    steps = {"frozen_steps": 2, "previous": np.zeros((1, 56), np.int64), **arguments}
    for decode, given in (
        (edge.decode_behind, edge.prepare(raw, instruction)),
        (partial(decode_behind, policy), batch),
    ):
        with pytest.raises(ConfigError, match=rf"{next(iter(arguments))} is .*must be an int in"):
            decode(given, **steps)


def test_decoders_of_axes_are_refused(edge: EdgePolicy) -> None:
    with pytest.raises(ConfigError, match="'ngram3' does not run on an export; use ar, jacobi"):
        edge.decoding_config("ngram3")


def test_logits_that_are_not_finite_are_an_error(
    edge: EdgePolicy, observations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, instruction, _ = observations[0]
    wanted = edge.decode(raw, instruction, "ar").tokens
    for decoding in ("ar", "jacobi"):
        with monkeypatch.context() as changed:
            changed.setattr(edge.reader, "state", lambda _: np.full((1, 14), np.nan, np.float32))
            with pytest.raises(NotFiniteError):
                edge.decode(raw, instruction, decoding)
        # Nothing of it is left in the cache.
        np.testing.assert_array_equal(edge.decode(raw, instruction, "ar").tokens, wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_logit_that_is_not_finite_is_an_error(
    copy: Path, observations: list[Any], value: float
) -> None:
    """Of one token only, in all slots; the other logits are larger or smaller."""
    model = onnx.load(copy / "block.onnx")
    weights = {item.name: item for item in model.graph.initializer}
    (name,) = (name for name in weights if name.endswith("head.bias"))
    bias = numpy_helper.to_array(weights[name]).copy()
    bias[100] = value
    weights[name].CopyFrom(numpy_helper.from_array(bias, name))
    content = model.SerializeToString()
    (copy / "block.onnx").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    with_settings(copy, lambda s: s["files"].update({"block.onnx": digest}))
    with pytest.raises(NotFiniteError):
        EdgePolicy(copy, threads=1)
    with_settings(copy, lambda s: s.pop("checks"))
    edge = EdgePolicy(copy, threads=1)
    raw, instruction, _ = observations[0]
    for decoding in ("ar", "jacobi", "ceed"):
        with pytest.raises(NotFiniteError):
            edge.decode(raw, instruction, decoding)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_exports(copy: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(copy)
    with pytest.raises((CheckpointError, ConfigError, VerificationError), match=message):
        EdgePolicy(copy)


def test_fewer_bins_than_the_graphs_have(copy: Path, observations: list[Any]) -> None:
    with_settings(copy, lambda s: s["tokens"].update(num_bins=20))
    with_settings(copy, lambda s: s.pop("checks"))
    raw, instruction, _ = observations[0]
    with pytest.raises(CheckpointError, match=r"returned token .* but the settings have 20 bins"):
        EdgePolicy(copy).decode(raw, instruction, "ar")


@pytest.mark.parametrize("threads", ["2", -1, 1.5])
def test_wrong_threads(exported: Path, threads: Any) -> None:
    with pytest.raises(ConfigError, match=r"threads is .*; it must be in"):
        EdgePolicy(exported, threads=threads)


def _affinities() -> list[set[int]]:
    return [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin threads")
def test_pinned_threads_give_the_same_tokens(
    exported: Path, edge: EdgePolicy, observations: list[Any]
) -> None:
    own = os.sched_getaffinity(0)
    if len(own) < 2:
        pytest.skip("one core")
    first, second = sorted(own)[:2]
    on_second = _affinities().count({second})
    pinned = EdgePolicy(exported, 2, f"{first},{second}")
    free = EdgePolicy(exported, 2, "none")
    for raw, instruction, previous in observations:
        for decoder in DECODERS:
            wanted = edge.decode(raw, instruction, decoder, previous=previous)
            for policy in (pinned, free):
                found = policy.decode(raw, instruction, decoder, previous=previous)
                assert np.array_equal(found.tokens, wanted.tokens)
    assert os.sched_getaffinity(0) == own
    # One thread of trunk and block each, and one for a stem; none where `pinned` decodes.
    assert _affinities().count({second}) - on_second == 3
    assert {first} not in _affinities()


@pytest.mark.slow
def test_weights_of_int8_change_few_tokens(
    edge: EdgePolicy, observations: list[Any], tmp_path: Path
) -> None:
    told = export(ExportConfig("student", str(tmp_path / "int8"), weights="int8"))
    assert re.search(r"\d% of the tokens equal|; tokens equal", told)
    small = EdgePolicy(tmp_path / "int8", threads=1)
    assert small.settings.weights == "int8"
    size = sum(file.stat().st_size for file in (tmp_path / "int8").glob("*.onnx"))
    assert size < 10e6
    assert not list((tmp_path / "int8").glob("float32*"))
    shares = []
    for raw, instruction, previous in observations:
        mine = small.decode(raw, instruction, "jacobi", previous=previous)
        theirs = edge.decode(raw, instruction, "jacobi", previous=previous)
        shares.append(np.mean(np.asarray(mine.tokens) == np.asarray(theirs.tokens)))
        assert np.abs(np.asarray(mine.actions) - np.asarray(theirs.actions)).mean() < 0.05
    assert np.mean(shares) > 0.8


@pytest.mark.slow
def test_a_student_with_fewer_prefix_tokens(tmp_path: Path) -> None:
    """The command compares its tokens with torch's."""
    folder = tmp_path / "reduced"
    shutil.copytree(ceed_vla.pretrained_path("student"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["backbone"]["kept_tokens"] = [0, 1, 2, 20, 21, 30, 40]
    (folder / "config.json").write_text(json.dumps(config))
    seal_folder(SealConfig(str(folder)))
    assert "tokens equal" in export(ExportConfig(str(folder), str(tmp_path / "export")))
    assert EdgePolicy(tmp_path / "export").settings.cache.prefix == 8  # and the state


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a link, a mount or not empty; name a new folder"):
        export(ExportConfig("student", str(tmp_path)))
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"needs onnxscript, .* not installed.*setup\.sh export"):
        export(ExportConfig("student", str(tmp_path / "new")))


def test_stems_that_ran_ahead_change_nothing(edge: EdgePolicy, observations: list[Any]) -> None:
    raw, instruction, previous = observations[1]
    cameras = edge.settings.images.cameras
    wanted = edge.decode(raw, instruction, previous=previous)
    ahead = [edge.run_stem(camera, raw[camera], instruction) for camera in cameras]
    rest = {STATE: raw[STATE]}
    found = edge.decode(rest, instruction, previous=previous, features=ahead)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    part = {STATE: raw[STATE], cameras[1]: raw[cameras[1]]}
    found = edge.decode(part, instruction, previous=previous, features=ahead[:1])
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    # Stems depend on the words, so those of another instruction are not used.
    other = [
        edge.run_stem(camera, np.zeros_like(raw[camera]), "stack the cubes") for camera in cameras
    ]
    found = edge.decode(raw, instruction, previous=previous, features=other)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    with pytest.raises(ObservationError, match="lacks"):
        edge.decode(rest, instruction, features=other)
    with pytest.raises(ObservationError, match="There is no camera 'top'; choose one of observ"):
        edge.run_stem("top", raw[cameras[0]], instruction)


def test_weights_beside_the_process_are_not_read(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Onnxruntime looks for the external data of a graph in memory in the working folder."""
    (tmp_path / "beside.bin").write_bytes(b"\0" * 4)
    monkeypatch.chdir(tmp_path)
    other_graph(copy, outside_graph("beside.bin"))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        EdgePolicy(copy)
