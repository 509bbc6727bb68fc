"""Training beside a frozen policy: an interrupted run ends as an uninterrupted one, bit for bit.

Damaged states and runs that differ are refused.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.training.axes.context import ContextConfig, context
from ceed_vla.training.axes.depth import ExitsConfig, exits
from ceed_vla.training.axes.programs import RouteConfig, route
from ceed_vla.training.beside_run import STATE, UNFINISHED
from ceed_vla.training.run_folder import PROGRESS

SIZES = {"steps": 6, "batch_size": 4, "eval_frames": 8, "save_every": 2}
COMMANDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "exits.safetensors": (exits, ExitsConfig, {"layers": [1]}),
    "context.safetensors": (context, ContextConfig, {}),
    "router.safetensors": (route, RouteConfig, {"programs": 2, "search_frames": 8}),
}


@pytest.fixture
def begun(studio: Any, tmp_path: Path, stop_at: Callable[[Any, int], None]) -> Any:
    """Start exits and interrupt them in their fourth step; return how to go on, and the states."""

    def go_on(**changes: Any) -> Path:
        given = {"policy_path": "teacher", "roots": str(studio.demo), "layers": [1]}
        given |= {"output_dir": str(tmp_path / "run"), "resume": True}
        return exits(ExitsConfig(**{**given, **SIZES, **changes}))

    stop_at(exits, 3)
    with pytest.raises(KeyboardInterrupt):
        go_on(resume=False)
    stop_at(exits, -1)
    return go_on, tmp_path / "run" / UNFINISHED


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int], None]:
    """Let a command be interrupted at a step; -1: never."""

    def stop(command: Any, at: int) -> None:
        module = importlib.import_module(command.__module__)
        from ceed_vla.training.optim import take_step

        def take(optimizer: Any, loss: Any, step: int, steps: int) -> None:
            if step == at:
                raise KeyboardInterrupt
            take_step(optimizer, loss, step, steps)

        monkeypatch.setattr(module, "take_step", take)

    return stop


@pytest.mark.parametrize("file", COMMANDS)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    studio: Any, tmp_path: Path, stop_at: Callable[[Any, int], None], file: str
) -> None:
    command, settings, own = COMMANDS[file]

    def run(name: str, **changes: Any) -> dict[str, Tensor]:
        given = {"policy_path": "teacher", "roots": str(studio.demo)}
        given |= {"output_dir": str(tmp_path / name)}
        folder: Path = command(settings(**{**given, **SIZES, **own, **changes}))
        assert not (folder / UNFINISHED).exists()
        return load_file(folder / file)

    whole = run("whole")
    stop_at(command, 3)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    progress = json.loads((tmp_path / "parts" / UNFINISHED / PROGRESS).read_text())
    assert progress["step"] == 2
    stop_at(command, -1)
    with pytest.raises(ConfigError, match=r"already holds a run; continue it with --resume=true"):
        run("parts")
    parts = run("parts", resume=True)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    with pytest.raises(CheckpointError, match="there is no run to resume in it"):
        run("parts", resume=True)


def test_a_resumed_run_reports_other_settings_and_uses_them(
    begun: Any, caplog: pytest.LogCaptureFixture
) -> None:
    go_on, states = begun
    other = states.parent.with_name("other")
    shutil.copytree(states.parent, other)
    same = load_file(go_on() / "exits.safetensors")
    faster = load_file(go_on(output_dir=str(other), lr=0.1) / "exits.safetensors")
    assert "goes on with other settings than it had: lr (0.002 before)" in caplog.text
    assert any(not torch.equal(faster[name], same[name]) for name in same)


def test_other_data_policies_and_modules_are_refused(
    begun: Any, studio: Any, tmp_path: Path
) -> None:
    go_on, _ = begun
    for changes, message in (
        ({"held_out": 0.5}, "held_out differ"),
        ({"policy_path": "student_all_tokens"}, "policy differ"),
        ({"layers": [1, 3]}, r"training.pt cannot be resumed \(.*\); repeat the settings"),
        ({"kind": "layer"}, r"training.pt cannot be resumed \(.*\); repeat the settings"),
        ({"steps": 1}, "must name a step up to 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            go_on(**changes)
    with pytest.raises(ConfigError, match="save_every"):
        go_on(save_every=0)
    assert go_on().is_dir()  # nothing was lost


@pytest.mark.parametrize("damage", ["half", "missing", "not finite", "optimiser"])
def test_damaged_states_are_refused(begun: Any, damage: str) -> None:
    go_on, states = begun
    file = states / json.loads((states / PROGRESS).read_text())["state"] / STATE
    if damage == "missing":
        file.unlink()
    elif damage == "half":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        state = torch.load(file, weights_only=True)
        if damage == "optimiser":
            state["optimizer"]["state"][0]["exp_avg_sq"][:] = -1
        else:
            next(iter(state["module"].values()))[:] = torch.nan
        torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"cannot be resumed"):
        go_on()


def test_the_programs_of_a_damaged_run_are_refused(
    studio: Any, tmp_path: Path, stop_at: Callable[[Any, int], None]
) -> None:
    given = {"policy_path": "teacher", "roots": str(studio.demo), "programs": 2}
    given |= {"output_dir": str(tmp_path / "run"), "search_frames": 8, **SIZES}
    stop_at(route, 1)
    with pytest.raises(KeyboardInterrupt):
        route(RouteConfig(**given))
    file = tmp_path / "run" / UNFINISHED / PROGRESS
    progress = json.loads(file.read_text())
    for text, message in (("0-9", "do not belong"), ("x", "are damaged"), (None, "no programs")):
        file.write_text(json.dumps({**progress, "programs": text}))
        with pytest.raises(CheckpointError, match=message):
            route(RouteConfig(**given, resume=True))
