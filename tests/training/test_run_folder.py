"""The folder of a run: damaged states, links and foreign files are refused, and never lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError
from ceed_vla.files import write_text
from ceed_vla.training.teacher import TeacherRun, train


class Payload:
    """Unpickling this object writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.fixture
def stopped(studio: Any, tmp_path: Path) -> Any:
    """A short finished run: its settings to resume with, its progress.json and its last state."""
    train(studio.train_config(tmp_path / "run", steps=1, grounding_steps=0))
    progress = tmp_path / "run" / "progress.json"
    state = tmp_path / "run" / json.loads(progress.read_text())["state"]
    config = studio.train_config(tmp_path / "run", steps=1, grounding_steps=0, resume=True)
    return config, progress, state


@pytest.mark.parametrize("name", ["random_states_0.pkl", "optimizer.bin", "shards/.metadata"])
@pytest.mark.parametrize("damage", ["half", "code", "missing"])
def test_a_state_that_is_not_restored_stops_and_runs_no_code(
    stopped: Any, name: str, damage: str
) -> None:
    config, _, state = stopped
    file, touched = state / name, state / "touched"
    file.parent.mkdir(exist_ok=True)
    if damage == "missing":
        if file.name.startswith("."):
            pytest.skip("only sharded weights have it")
        file.unlink()
    elif damage == "half":
        file.write_bytes(b"half")
    elif file.name.startswith("."):
        file.write_bytes(pickle.dumps(Payload(touched)))
    else:
        torch.save(Payload(touched), file)
    with pytest.raises(CheckpointError, match=r"state_. cannot be resumed"):
        train(config)
    assert not touched.exists()


def test_descriptions_of_sharded_weights_are_read(tmp_path: Path) -> None:
    from torch.distributed import checkpoint

    from ceed_vla.training.states import check_metadata

    layers = {"a": torch.nn.Linear(2, 3).half(), "b": torch.nn.Linear(3, 1)}
    checkpoint.save(
        torch.nn.ModuleDict(layers).state_dict(), checkpoint_id=tmp_path / "model", no_dist=True
    )
    assert (tmp_path / "model" / ".metadata").is_file()
    check_metadata(tmp_path)


@pytest.mark.parametrize(
    "place", ["STATE", "STATE/optimizer.bin", "log.jsonl", "checkpoints", "tensorboard/x"]
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_resumed_run_stays_in_its_folder(
    stopped: Any, tmp_path: Path, place: str, kind: str
) -> None:
    config, progress, state = stopped
    path, outside = progress.parent / place.replace("STATE", state.name), tmp_path / "outside"
    if path.exists():
        path.rename(outside)
    path.symlink_to(outside) if kind == "link" else os.mkfifo(path)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} is a link, a pipe"):
        train(config)


@pytest.mark.parametrize("what", ["datasets and tasks", "held_out", "action_tokens"])
def test_a_run_does_not_continue_on_other_data(stopped: Any, studio: Any, what: str) -> None:
    config, progress, _ = stopped
    if what == "held_out":
        config.held_out = 0.3
    elif what == "action_tokens":
        tokens = config.policy.action_tokens
        tokens.action_range, tokens.action_low, tokens.action_high = "fixed", [-9.0] * 7, [9.0] * 7
    else:
        config.roots = f"{studio.demo},{studio.other}"
    with pytest.raises(CheckpointError, match=f"cannot be resumed: {what} differ from those that"):
        train(config)
    values = json.loads(progress.read_text())
    del values["origin"]  # an older run
    progress.write_text(json.dumps(values))
    train(config)


def test_the_run_folder_may_be_a_link(stopped: Any, tmp_path: Path) -> None:
    config, progress, _ = stopped
    (tmp_path / "link").symlink_to(progress.parent)
    config.output_dir = str(tmp_path / "link")
    train(config)


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("param_groups", "weight_decay", 0.9),
        ("param_groups", "betas", (0.5, 0.5)),
        ("state", "exp_avg_sq", None),
        ("state", "step", torch.tensor(-1.0)),
    ],
)
def test_optimiser_settings_of_another_run_are_refused(
    stopped: Any, where: str, name: str, value: Any
) -> None:
    from accelerate.utils.other import load

    config, _, state = stopped
    changed = 0
    for file in state.glob("optimizer*.bin"):
        saved = load(file)
        for entry in saved[where] if where == "param_groups" else saved[where].values():
            if name in entry:
                entry[name] = -entry[name] - 1 if value is None else value
                changed += 1
        torch.save(saved, file)
    assert changed
    with pytest.raises(CheckpointError, match=f"optimiser's {name}"):
        train(config)


def test_a_state_of_another_step_is_refused(stopped: Any) -> None:
    config, progress, _ = stopped
    values = json.loads(progress.read_text())
    progress.write_text(json.dumps({**values, "step": values["step"] - 1}))
    with pytest.raises(CheckpointError, match="the optimiser's step is"):
        train(config)


def test_optimiser_states_of_other_weights_are_refused(stopped: Any) -> None:
    from accelerate.utils.other import load

    config, _, state = stopped
    saved = load(state / "optimizer.bin")
    next(iter(saved["state"].values()))["momentum_buffer"] = torch.zeros(1, 1)
    torch.save(saved, state / "optimizer.bin")
    with pytest.raises(CheckpointError, match="momentum_buffer"):
        train(config)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"step": 1}',
        '{"step": 0.5, "state": "state_a"}',
        '{"step": -1, "state": "state_a"}',
        '{"step": 99, "state": "state_a"}',
        '{"step": 1, "state": "../state_a"}',
        '{"step": 1, "state": null}',
        '{"step": 1, "state": "state_a", "processes": "x"}',
        '{"step": 1, "state": "STATE", "takeovers": 5}',
        '{"step": 1, "state": "STATE", "takeovers": [["/etc"]]}',
        '{"step": 1, "state": "STATE"}',
    ],
)
def test_a_damaged_progress_file_is_an_error(stopped: Any, text: str) -> None:
    config, progress, state = stopped
    config.rounds = 1
    progress.write_text(text.replace("STATE", state.name))
    with pytest.raises(CheckpointError, match=re.escape(str(progress.parent))):
        TeacherRun(config, None, lambda *_: []).load_state()


def test_damaged_lines_of_the_log_are_dropped(
    stopped: Any, read_log: Callable[..., dict[int, float]]
) -> None:
    config, progress, _ = stopped
    log = progress.parent / "log.jsonl"
    before = read_log(progress.parent)
    log.write_text(
        log.read_text() + '{"step": "x"}\n[1]}\n{"loss": 2}\n\n{"step": 7, "loss": 1}\n{"st'
    )
    train(config)
    assert read_log(progress.parent) == before


@pytest.mark.parametrize(
    "name",
    ["log.jsonl", "state_a/mine", "state_b", "checkpoints/last", "tensorboard", "takeover/x"],
)
def test_files_of_somebody_else_are_left_alone(studio: Any, tmp_path: Path, name: str) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("keep me")
    with pytest.raises(ConfigError, match=rf"holds {name.split('/')[0]}.*new or empty folder"):
        train(studio.train_config(tmp_path / "run"))
    assert file.read_text() == "keep me"
    assert [f for f in (tmp_path / "run").rglob("*") if f.is_file()] == [file]


@pytest.mark.parametrize(
    ("number", "started", "message"),
    [
        (errno.ENOSPC, True, "disk full.*Make room there; continue from the last complete"),
        (errno.EDQUOT, False, "disk full.*Make room there; no state is complete"),
        (
            errno.EACCES,
            True,
            r"\(\[Errno 13\] Permission denied: 'log'\)\. Make it writable; continue from the last",
        ),
    ],
)
def test_what_is_kept_is_there(
    studio: Any, tmp_path: Path, number: int, started: bool, message: str
) -> None:
    run = TeacherRun(studio.train_config(tmp_path / "run", grounding_steps=0), None, None)
    (tmp_path / "run").mkdir(exist_ok=True)
    if started:
        (tmp_path / "run" / "progress.json").write_text("{}")
    with pytest.raises(CeedVLAError, match=message), run.folder.writing():
        raise OSError(number, os.strerror(number), "log")


def test_a_run_that_goes_on_with_other_settings_says_so(
    studio: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"grounding_steps": 0, "steps": 1}
    train(studio.train_config(tmp_path / "run", **sizes))
    train(studio.train_config(tmp_path / "run", **sizes, resume=True))
    assert "other settings" not in caplog.text
    train(studio.train_config(tmp_path / "run", **sizes, resume=True, takeover_weight=0.5))
    assert "other settings than it had: takeover_weight (0.4 before)" in caplog.text


def test_a_full_disk_names_the_file_that_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(OSError, match=re.escape(f"device: '{tmp_path / 'a.json'}'") + "$"):
        write_text(tmp_path / "a.json", "{}")
