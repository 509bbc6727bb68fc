"""The teacher's training: it learns, resumes to the same losses, and uses takeover rounds.

Bad settings are refused.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ceed_vla
from ceed_vla import supervision
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError, DatasetError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.training.teacher import TeacherRun, TrainConfig, train
from tests.helpers.edits import unsealed


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def assert_same_run(one: Path, two: Path, read_log: Callable[..., dict[int, float]]) -> None:
    assert read_log(one) == read_log(two)
    final = "checkpoints/final/pretrained_model"
    a, b = weights(one / final), weights(two / final)
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


# ---- learning ------------------------------------------------------------------------------------


def test_the_loss_falls(studio: Any, read_log: Callable[..., dict[int, float]]) -> None:
    losses = list(read_log(studio.teacher_run, "ar_loss").values())
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    accuracy = list(read_log(studio.teacher_run, "token_accuracy").values())
    assert accuracy[-1] > accuracy[0]


def test_the_final_checkpoint_is_without_the_head_that_only_training_uses(studio: Any) -> None:
    final = CeedVLAPolicy.from_pretrained(studio.teacher)
    assert final.config.backbone.early_readout == 0
    assert final.backbone.early_auxiliary is None
    assert final.backbone.auxiliary is not None
    state = json.loads((studio.teacher_run / "progress.json").read_text())["state"]
    assert any(
        "early_auxiliary" in name
        for name in load_file(studio.teacher_run / state / "model.safetensors")
    )


def test_grounding_frames_come_first_and_then_beside(
    studio: Any, read_log: Callable[..., dict[int, float]]
) -> None:
    assert sorted(read_log(studio.teacher_run, "grounding_loss")) == list(range(1, 64))
    assert sorted(read_log(studio.teacher_run, "ar_loss")) == list(range(4, 64))


def test_a_policy_that_does_not_see_learns_no_actions(
    studio: Any, tmp_path: Path, read_log: Callable[..., dict[int, float]]
) -> None:
    asked: list[Path] = []

    def localisation(policy: Path) -> dict[str, float]:
        asked.append(policy)
        return {"target in a": 0.01, "target in b": 0.03 if len(asked) == 1 else 0.015}

    output, settings = tmp_path / "run", {"grounding_gate": 0.02, "steps": 2}
    with pytest.raises(
        ConfigError,
        match=r"After 3 grounding steps the median error of target in b is 3\.0 cm; 1 of 2",
    ):
        train(studio.train_config(output, grounding_steps=3, **settings), localisation=localisation)
    assert read_log(output, "ar_loss") == {}
    assert (asked[0] / "model.safetensors").is_file()
    train(
        studio.train_config(output, grounding_steps=5, resume=True, **settings),
        localisation=localisation,
    )
    assert len(asked) == 2
    assert sorted(read_log(output, "grounding_loss")) == list(range(1, 8))
    assert sorted(read_log(output, "ar_loss")) == [6, 7]


def test_the_checkpoint_acts(studio: Any) -> None:
    policy, pre, _ = ceed_vla.load(studio.teacher)
    from ceed_vla.data.frames import open_dataset

    result = policy.decode(pre(open_dataset(studio.demo).batch(np.array([0, 20]), 4)), "ar")
    assert result.actions.shape == (2, 4, 7)


def test_the_settings_stay_as_they_were(studio: Any, tmp_path: Path) -> None:
    config = studio.train_config(tmp_path / "run", steps=1, grounding_steps=0)
    before = deepcopy(config)
    train(config)
    assert config == before


def test_actions_are_learnt_beside_the_named_terms_alone(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms: list[int | None] = []
    original = supervision.auxiliary_loss

    def note(policy: CeedVLAPolicy, *arguments: Any) -> Any:
        terms.append(policy.auxiliary_terms)
        return original(policy, *arguments)

    monkeypatch.setattr(supervision, "auxiliary_loss", note)
    train(studio.train_config(tmp_path / "run", steps=1, grounding_steps=2, named_terms=5))
    assert terms == [None, None, 5, 5]  # the step with actions also has grounding frames
    with pytest.raises(ConfigError, match="named_terms is -1"):
        studio.train_config(tmp_path / "run", named_terms=-1)


def test_training_continues_from_a_checkpoint(
    studio: Any,
    tmp_path: Path,
    read_log: Callable[..., dict[int, float]],
    tiny_policy: Callable[..., Any],
) -> None:
    other = tiny_policy(chunk_size=8, n_action_steps=4)  # the checkpoint's own chunk of 4 wins
    config = studio.train_config(
        tmp_path / "more", policy_path=str(studio.teacher), policy=other, steps=2, grounding_steps=0
    )
    train(config)
    start = next(iter(read_log(studio.teacher_run, "ar_loss").values()))
    assert read_log(tmp_path / "more", "ar_loss")[1] < 0.8 * start
    student = unsealed(shutil.copytree(studio.teacher, tmp_path / "student"))
    settings = json.loads((student / "config.json").read_text())
    settings["decoding"] |= {"watch": "executed", "max_iterations": 2, "confidence": 0.2}
    (student / "config.json").write_text(json.dumps(settings))
    more = replace(config, policy_path=str(student), output_dir=str(tmp_path / "strict"), steps=1)
    # the exit of a student is discarded
    assert ceed_vla.load(train(more))[0].config.decoding == DecodingConfig()


# ---- interrupts ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(studio: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(studio.train_config(output))
    return output


@pytest.mark.parametrize("step", [0, 4, 8])
def test_an_interrupted_run_resumes_to_the_same_losses(
    studio: Any,
    whole: Path,
    tmp_path: Path,
    interrupt_at: Callable[[int], None],
    step: int,
    read_log: Callable[..., dict[int, float]],
) -> None:
    interrupt_at(step)
    with pytest.raises(KeyboardInterrupt):
        train(studio.train_config(tmp_path / "run"))
    interrupt_at(-1)
    train(studio.train_config(tmp_path / "run", resume=True))
    assert_same_run(whole, tmp_path / "run", read_log)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_inside_a_save_leaves_the_state_before(
    studio: Any,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    read_log: Callable[..., dict[int, float]],
) -> None:
    from accelerate import Accelerator

    original = Accelerator.save_state

    def save_state(self: Accelerator, folder: str) -> Any:
        if Path(folder).name != "state_a" or not (tmp_path / "run" / "state_b").exists():
            return original(self, folder)
        if moment == "after":
            original(self, folder)  # all files are written except the line that names the state
        else:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    with pytest.raises(KeyboardInterrupt):
        train(studio.train_config(tmp_path / "run"))
    monkeypatch.setattr(Accelerator, "save_state", original)
    train(studio.train_config(tmp_path / "run", resume=True))
    assert_same_run(whole, tmp_path / "run", read_log)


def test_resuming_a_finished_run_changes_nothing(
    studio: Any, whole: Path, read_log: Callable[..., dict[int, float]]
) -> None:
    before = read_log(whole)
    train(studio.train_config(whole, resume=True))
    assert read_log(whole) == before


def test_a_damaged_state_is_an_error(studio: Any, tmp_path: Path) -> None:
    train(studio.train_config(tmp_path / "run", steps=1, grounding_steps=0))
    for state in (tmp_path / "run").glob("state_?"):
        (state / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        train(studio.train_config(tmp_path / "run", resume=True))


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_last_state_is_kept(
    studio: Any, tmp_path: Path, read_log: Callable[..., dict[int, float]]
) -> None:
    code = (
        "import resource, signal, sys, draccus, json\n"
        "from ceed_vla.training.teacher import TrainConfig, TeacherRun\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "run = TeacherRun(draccus.decode(TrainConfig, json.loads(sys.argv[1])), None, None)\n"
        "save = run.save_state\n"
        "def save_state():\n"
        "    if run.step:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    save()\n"
        "run.save_state = save_state\n"
        "run.run()\n"
    )
    settings = json.dumps(draccus.encode(studio.train_config(tmp_path / "run")))
    done = subprocess.run([sys.executable, "-c", code, settings], capture_output=True, text=True)
    assert done.returncode == 1
    assert "CeedVLAError: " in done.stderr.splitlines()[-1]
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert json.loads((tmp_path / "run" / "progress.json").read_text())["step"] == 0
    train(studio.train_config(tmp_path / "run", resume=True))
    assert max(read_log(tmp_path / "run")) == 12


# ---- takeover rounds -----------------------------------------------------------------------------


class Recorder:
    """Records small datasets; raises in the middle of the given call."""

    def __init__(self, write_dataset: Callable[..., Path], fail_at: int = -1) -> None:
        self.write_dataset, self.fail_at, self.calls = write_dataset, fail_at, 0

    def __call__(self, policy: Path, index: int, folder: Path, minutes: float) -> list[Path]:
        assert minutes == 0  # no budget
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        assert (policy / "model.safetensors").is_file()
        assert policy.parent.name == f"round_{index}"
        root = folder / f"round_{index}"
        return [root if root.exists() else self.write_dataset(root, (5, 6), seed=20 + index)]


def test_rounds_add_data(studio: Any, tmp_path: Path, write_dataset: Callable[..., Path]) -> None:
    measured: list[str] = []

    def closed_loop(policy: Path) -> tuple[int, int]:
        measured.append(policy.parent.name)
        return 1, 2

    recorder = Recorder(write_dataset)
    run = TeacherRun(studio.train_config(tmp_path / "run", rounds=2), closed_loop, recorder)
    run.run()
    assert recorder.calls == 2
    assert measured == ["round_0", "round_1", "final"]
    assert len(run.mixture.stores) == 3
    assert run.mixture.shares.tolist() == pytest.approx([0.6, 0.2, 0.2])
    assert {store.root.name for store in run.mixture.stores} == {"demo", "round_0", "round_1"}


@pytest.mark.parametrize("fail_at", [1, 2])
def test_an_interrupted_round_is_repeated(
    studio: Any,
    tmp_path: Path,
    write_dataset: Callable[..., Path],
    fail_at: int,
    read_log: Callable[..., dict[int, float]],
) -> None:
    train(
        studio.train_config(tmp_path / "whole", rounds=2), record_takeover=Recorder(write_dataset)
    )
    settings = {"rounds": 2, "save_every": 100}
    with pytest.raises(KeyboardInterrupt):
        train(
            studio.train_config(tmp_path / "run", **settings),
            record_takeover=Recorder(write_dataset, fail_at=fail_at),
        )
    again = Recorder(write_dataset)
    train(studio.train_config(tmp_path / "run", **settings, resume=True), record_takeover=again)
    assert again.calls == 3 - fail_at
    assert_same_run(tmp_path / "whole", tmp_path / "run", read_log)


def test_takeover_data_with_other_features_are_refused(
    studio: Any, tmp_path: Path, write_dataset: Callable[..., Path]
) -> None:
    def record(policy: Path, index: int, folder: Path, minutes: float) -> list[Path]:
        return [write_dataset(folder / "other", (5,), state_dim=6)]

    with pytest.raises(DatasetError, match=r"observation\.state"):
        train(studio.train_config(tmp_path / "run", rounds=1), record_takeover=record)


# ---- settings that cannot work -------------------------------------------------------------------


def test_an_output_folder_in_use_is_refused(studio: Any) -> None:
    with pytest.raises(ConfigError, match="already holds a run"):
        train(studio.train_config(studio.teacher_run))


def test_nothing_to_resume(studio: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run to resume"):
        train(studio.train_config(tmp_path, resume=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output_dir": ""}, ConfigError, "output_dir"),
        ({"roots": ""}, ConfigError, "--roots"),
        ({"roots": "GROUNDING"}, ConfigError, "holds no actions"),
        ({"roots": "MISSING"}, DatasetError, "No LeRobotDataset"),
        ({"roots": "OTHERS"}, DatasetError, r"differ in observation\.state"),
        ({"rounds": 1}, ConfigError, "nothing records takeovers"),
        ({"grounding_gate": 0.01}, ConfigError, "grounding_gate needs --grounding_roots"),
        ({"roots": "FILE", "output_dir": "FILE"}, ConfigError, "which is a file"),
    ],
)
def test_settings_that_cannot_work(
    studio: Any,
    tmp_path: Path,
    write_dataset: Callable[..., Path],
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    places = {
        "GROUNDING": str(studio.grounding),
        "MISSING": str(tmp_path / "missing"),
        "FILE": __file__,
    }
    places["OTHERS"] = f"{studio.demo},{write_dataset(tmp_path / 'other', (5,), state_dim=6)}"
    changes = {key: places.get(value, value) for key, value in changes.items()}
    with pytest.raises(error, match=message):
        train(studio.train_config(tmp_path / "run", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"save_every": 0},
        {"mixed_precision": "fp8"},
        {"takeover_weight": 1.0},
        {"rounds": -1},
        {"lr": float("inf")},
        {"lr": 1e30},
        {"lr": 0.0},
        {"warmup": -5},
        {"validate_every": -1},
        {"seed": -1},
        {"threads": 100_000},
        {"weight_decay": float("nan")},
        {"max_clipped": 2.0},
        {"steps": "9"},
        {"root_weights": "1,2"},
        {"root_weights": "nan"},
        {"root_weights": "-1"},
        {"root_weights": "a"},
        {"root_weights": "0"},
    ],
)
def test_values_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        TrainConfig(**{"roots": "data", **changes})


def test_grounding_data_need_the_target(
    studio: Any, tmp_path: Path, tiny_policy: Callable[..., Any]
) -> None:
    with pytest.raises(DatasetError, match="auxiliary_scale has 0"):
        train(studio.train_config(tmp_path / "run", policy=tiny_policy(auxiliary_scale=[])))
    train(
        studio.train_config(
            tmp_path / "run", policy=tiny_policy(auxiliary_scale=[]), grounding_roots="", steps=1
        )
    )


def test_a_loss_that_is_not_finite_stops_the_run(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ceed_vla.CeedVLAPolicy.forward

    def forward(self: Any, batch: Any, reduction: str = "mean") -> Any:
        loss, parts = original(self, batch, reduction)
        return loss * float("nan"), parts

    monkeypatch.setattr(ceed_vla.CeedVLAPolicy, "forward", forward)
    with pytest.raises(CeedVLAError, match=r"nan at step 3.*lr"):
        train(studio.train_config(tmp_path / "run"))


# ---- other ways to run ---------------------------------------------------------------------------


def test_bf16(studio: Any, tmp_path: Path, read_log: Callable[..., dict[int, float]]) -> None:
    from accelerate.state import AcceleratorState

    # accelerate allows one precision per process
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train(studio.train_config(tmp_path / "run", mixed_precision="bf16", steps=2))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert len(read_log(tmp_path / "run")) == 5
