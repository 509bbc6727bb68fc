"""`ceed-vla calibrate`: off chunks, the test of a risk, and the names in a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ceed_vla.sim.calibrate
from ceed_vla import load
from ceed_vla.cli.entry import main
from ceed_vla.errors import ConfigError
from ceed_vla.report.command import write_page
from ceed_vla.sim.calibrate import (
    CalibrateConfig,
    calibrate,
    is_off,
    plain,
)
from ceed_vla.sim.progress import MEASURED, Progress
from ceed_vla.sim.risk import Measured, measured_row, p_value, upper_bound
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.tokens.uniform import ActionTokenizer


def test_an_action_is_off_by_more_than_a_twentieth_of_its_range_or_another_grip() -> None:
    tokens = ActionTokenizer(
        [-1.0, -1.0], [1.0, 1.0], chunk_steps=2, num_bins=201, gripper_dims=[1]
    )
    exact = tokens.encode(torch.tensor([[[0.0, 1.0], [0.5, -1.0]]]))
    changes = {(0, 0): 0.1, (0, 1): -0.01, (1, 0): 0.3}
    assert not is_off(tokens, exact, exact, 2).any()
    for (step, dim), change in changes.items():
        actions = tokens.decode(exact).clone()
        actions[0, step, dim] += change
        off = is_off(tokens, tokens.encode(actions), exact, 1)
        # 0.1 is 5 %, not more; step 1 is not executed
        assert off.tolist() == [(step, dim) == (0, 1)]
    actions[0, 0, 0] += 0.11
    assert is_off(tokens, tokens.encode(actions), exact, 1).all()


def test_the_p_value_is_valid_and_falls_with_the_risk() -> None:
    rng = np.random.default_rng(0)
    epsilon, alpha = 0.1, 0.1
    wrong = np.mean(
        [p_value((rng.random(60) < epsilon).astype(float), epsilon) <= alpha for _ in range(2000)]
    )
    # a policy with the risk epsilon passes no more often than that
    assert wrong <= alpha
    values = [p_value(np.r_[np.ones(k), np.zeros(200 - k)], epsilon) for k in range(30)]
    assert values == sorted(values)
    assert values[0] == pytest.approx((1 - epsilon) ** 200, rel=1e-6)
    assert values[20] == values[29] == 1
    exact = sum(math.comb(200, i) * epsilon**i * (1 - epsilon) ** (200 - i) for i in range(9))
    assert exact <= values[8] <= math.e * exact
    assert 0 < p_value(np.r_[np.ones(250), np.zeros(2750)], 0.1) < 0.01


def test_the_upper_bound_is_the_inverse_of_the_p_value() -> None:
    nothing, some = np.zeros(200), np.r_[np.ones(10), np.zeros(190)]
    assert upper_bound(nothing) == pytest.approx(1 - 0.05 ** (1 / 200), rel=1e-3)
    assert p_value(some, upper_bound(some)) == pytest.approx(0.05, rel=1e-3)
    assert upper_bound(np.ones(5)) == 1
    assert [plain(value) for value in (0.02, 1e-6, 100_000.0, 12.5)] == [
        "0.02",
        "0.000001",
        "100000",
        "12.5",
    ]


def test_thresholds_are_tested_from_the_strictest_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first failure ends a signal, even if a looser threshold would pass; fewest layers win."""
    # p is 0.064 for conf0.55 at 0.1: below alpha, but not below the half of it that each of two
    # signals has.
    risks = {
        "conf0.9": 0.0,
        "conf0.7": 0.01,
        "conf0.55": 0.07,
        "agree0": 0.0,
        "agree1": 0.0,
        "agree2": 0.03,
    }
    asked: list[str] = []

    def measured(name: str) -> Measured:
        asked.append(name)
        risk, forwards = risks.get(name, 0.5), 5.0 - 0.1 * len(asked)
        return Measured(name, np.full(400, risk), np.full(9, 1.0), np.full(9, forwards), [True] * 7)

    monkeypatch.setattr(ceed_vla.sim.calibrate, "collect_observations", lambda *_: [])
    monkeypatch.setattr(ceed_vla.sim.calibrate, "bare_parts", lambda _: None)
    seconds = {
        "process": [0.001],
        "checks": [0.0],
        "prefill": [0.004],
        "block": [0.003],
        "token": [0.1],
    }
    monkeypatch.setattr(ceed_vla.sim.timing, "measure", lambda *_: ({}, {"all": seconds}))
    config = CalibrateConfig(signals=["conf", "agree"], epsilons=[0.02, 0.1, 0.001], episodes=400)
    bundle = (
        SimpleNamespace(backbone=SimpleNamespace(), config=SimpleNamespace(n_action_steps=4)),
        None,
        None,
    )
    rows, chosen = ceed_vla.sim.calibrate._choose(config, bundle, None, measured)  # type: ignore[arg-type]
    assert asked == [
        "conf0.9",
        "conf0.7",
        "conf0.55",
        "agree0",
        "agree1",
        "agree2",
        "agree4",
        *ceed_vla.sim.calibrate.CAPS,
    ]
    assert chosen == {"risk0.02": "agree1", "risk0.1": "agree2", "risk0.001": "jacobi_h"}
    assert len(rows) == len(asked)
    assert [row.deadline_ms for row in rows[-4:]] == [3.0] * 4  # one forward each here
    # it has no exits
    unknown = replace(config, signals=["trust", "deer3"])
    with pytest.raises(ConfigError, match=r"trust, deer3; this policy has .*agree.*keep"):
        ceed_vla.sim.calibrate._choose(unknown, bundle, None, measured)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"epsilons": []},
        {"epsilons": [1.0]},
        {"signals": []},
        {"decoders": "deadline8"},
        {"decoders": "cap1,nothing"},
        {"episodes": 9001},
    ],
)
def test_options_that_cannot_work(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CalibrateConfig(**change)
    with pytest.raises(ConfigError, match=r"policy\.path"):
        calibrate(CalibrateConfig())


@pytest.mark.slow
def test_an_interrupted_calibration_resumes_after_its_measured_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(folder: str, **changed: Any) -> CalibrateConfig:
        given = {"episodes": 2, "batch": 2, "threads": 1, "signals": ["agree"], "epsilons": [0.99]}
        path, output = CheckpointPath("student"), str(tmp_path / folder)
        return CalibrateConfig(policy=path, output_dir=output, **given | changed)

    whole = calibrate(options("whole"))
    assert not (tmp_path / "whole" / MEASURED).exists()
    measured, asked = ceed_vla.sim.calibrate.measured, []

    def interrupted(config: Any, workers: Any, name: str) -> Measured:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(name)
        return measured(config, workers, name)

    monkeypatch.setattr(ceed_vla.sim.calibrate, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(options("parts"))
    first = list(asked)
    with pytest.raises(ConfigError, match=r"interrupted run \(2 measurements\)"):
        calibrate(options("parts"))
    with pytest.raises(ConfigError, match="was measured with other episodes, seed;"):
        calibrate(options("parts", resume=True, seed=41_100, episodes=3))
    asked.clear()

    def counted(config: Any, workers: Any, name: str) -> Measured:
        asked.append(name)
        return measured(config, workers, name)

    monkeypatch.setattr(ceed_vla.sim.calibrate, "measured", counted)
    resumed = calibrate(options("parts", resume=True))
    assert not set(first) & set(asked)
    assert not (tmp_path / "parts" / MEASURED).exists()
    for report in (whole, resumed):
        for row in report["decoders"].values():
            row.pop("deadline_ms", None)
    assert resumed["decoders"] == whole["decoders"]
    assert resumed["chosen"] == whole["chosen"]


@pytest.mark.parametrize("text", ["{}", '{"identity": {}, "measured": 3}', "[]", "x"])
def test_damaged_measurements_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MEASURED).write_text(text)
    with pytest.raises(ConfigError, match=MEASURED):
        Progress(tmp_path, {}, True)


ROW = {"risks": [0.0, 0.5], "forwards": [1, 2, 1], "layers": [4, 8, 4], "solved": [True, False]}


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"risks": "x"},
        3,
        {**ROW, "risks": [0.0]},
        {**ROW, "layers": [4]},
        {**ROW, "forwards": [[1, 2, 1]]},
        {**ROW, "risks": [0.0, float("nan")]},
        {"risks": [], "forwards": [], "layers": [], "solved": []},
    ],
)
def test_a_damaged_measurement_is_refused(tmp_path: Path, row: Any) -> None:
    def read(found: Any) -> Measured:
        content = {"identity": {}, "measured": {"cap1": found}}
        (tmp_path / MEASURED).write_text(json.dumps(content))
        return measured_row(Progress(tmp_path, {}, True), "cap1", pytest.fail)

    assert read(ROW).risks.mean() == 0.25
    with pytest.raises(ConfigError, match="damaged at 'cap1'"):
        read(row)


@pytest.mark.slow
def test_from_the_shipped_student_to_a_checkpoint_with_names(tmp_path: Path) -> None:
    options = {
        "episodes": 3,
        "batch": 3,
        "threads": 1,
        "signals": ["agree"],
        "epsilons": [0.99, 0.02],
    }
    options["executed_steps"] = 2
    folder = tmp_path / "calibrated"
    report = calibrate(
        CalibrateConfig(policy=CheckpointPath("student"), output_dir=str(folder), **options)
    )
    assert report == json.loads((folder / "calibration.json").read_text())
    assert report["decoders"]["agree0"]["risk"] == 0  # no token changed: the fixed point
    assert report["chosen"]["risk0.02"] == "jacobi_h"  # three episodes prove nothing
    policy, _, _ = load(folder / "checkpoint")
    assert policy.config.decodings == report["chosen"]
    assert policy.config.n_action_steps == report["executed_steps"] == 2  # as tested
    assert policy.decoding_config("risk0.02") == policy.decoding_config("jacobi_h")
    with pytest.raises(ConfigError, match=r"has no decoding 'risk0\.5'"):
        policy.decoding_config("risk0.5")
    audit = [
        "calibrate",
        f"--policy.path={folder / 'checkpoint'}",
        "--decoders=risk0.02,cap1_mid",
        "--episodes=2",
        "--batch=2",
        f"--output_dir={tmp_path / 'audit'}",
        "--threads=1",
    ]
    assert main(audit) == 0
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert found["decoders"]["risk0.02"]["risk"] == 0
    assert found["decoders"]["cap1_mid"]["forwards_mean"] == 1
    assert found["decoders"]["cap1_mid"]["risk"] > 0
    assert not (tmp_path / "audit" / "checkpoint").exists()
    page = write_page([folder, tmp_path / "audit"], tmp_path / "report.html").read_text()
    assert "With probability 0.9, the risk stays below its bound: risk0.99 is " in page
    assert "The risk of 2 decoders, measured; nothing was chosen." in page
    assert "ceed-vla calibrate --policy.path=" in page
