"""A predictor on an export answers as with torch, and engine auto chooses between the two."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="exports need the extra export")

import ceed_vla.serving.predictor_loading as loading
from ceed_vla.errors import CeedVLAError, ConfigError, VerificationError
from ceed_vla.export.cached import cached_export
from ceed_vla.serving.predictor import Predictor, PredictorSettings, Request, Response
from ceed_vla.serving.served_checkpoint import ServedCeed
from ceed_vla.serving.served_export import ServedExport
from tests.helpers.worker_requests import FRONT, INSTRUCTION, STATE, observation


@pytest.fixture(scope="module")
def exported() -> Path:
    """The shipped student's export, which must not be changed."""
    return cached_export("student")


@pytest.fixture(scope="module")
def torchs() -> Predictor:
    return Predictor(PredictorSettings("student", decoding="jacobi_h", warmup=1))


@pytest.fixture(scope="module")
def edge(exported: Path) -> Predictor:
    settings = PredictorSettings(str(exported), engine="edge", decoding="jacobi_h", warmup=1)
    return Predictor(settings)


def test_the_spec_is_the_checkpoints(torchs: Predictor, edge: Predictor) -> None:
    mine, theirs = vars(edge.spec).copy(), vars(torchs.spec).copy()
    for own in (mine, theirs):
        del own["checkpoint"], own["warmup_s"], own["engine"]
    assert mine == theirs
    assert (edge.spec.engine, torchs.spec.engine) == ("edge", "eager")


def test_answers_are_torchs_with_frozen_steps_of_increments(
    torchs: Predictor, edge: Predictor
) -> None:
    assert edge.spec.delta_dims == (0, 1, 2, 3, 4, 5)
    previous = None
    for seed, shift, frozen in ((0, 0, 0), (1, 1, 1), (2, 4, 2), (3, 2, 5)):
        request = Request(seed, observation(seed), INSTRUCTION, previous, shift, frozen)
        mine, theirs = edge.predict(request), torchs.predict(request)
        assert mine.error is None
        assert theirs.error is None
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_array_equal(mine.actions, theirs.actions)
        assert (mine.forwards, mine.exit_reason) == (theirs.forwards, theirs.exit_reason)
        assert set(mine.seconds) == set(theirs.seconds)
        previous = mine.tokens


def test_certain_steps_are_told_first_and_deadlines_end_decoding(
    torchs: Predictor, edge: Predictor
) -> None:
    request = Request(1, observation(), INSTRUCTION, stream=True)
    parts: dict[Predictor, list[Response]] = {torchs: [], edge: []}
    for predictor, told in parts.items():
        predictor.predict(request, early=told.append)
    assert parts[edge]
    for mine, theirs in zip(parts[edge], parts[torchs], strict=True):
        np.testing.assert_array_equal(mine.actions, theirs.actions)
        assert not mine.whole
    late = edge.predict(request, deadline=time.monotonic())
    assert (late.forwards, late.exit_reason) == (1, "deadline")
    program = Request(2, observation(), INSTRUCTION, decoding="program0-1-3")
    late = torchs.predict(program, deadline=time.monotonic())
    assert (late.forwards, late.exit_reason) == (2, "deadline")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({FRONT: None}, ""),
        ({FRONT: np.zeros((96, 96), np.uint8)}, ""),
        ({STATE: np.full(14, np.nan)}, ""),
        ({"instruction": "boil seven eggs"}, "bad_instruction"),
        ({"instruction": "put the " + "red " * 20}, "bad_instruction"),
    ],
)
def test_errors_are_torchs(
    torchs: Predictor, edge: Predictor, change: dict[str, Any], code: str
) -> None:
    raw = {**observation(), **change}
    instruction = raw.pop("instruction", INSTRUCTION)
    request = Request(1, {k: v for k, v in raw.items() if v is not None}, instruction)
    mine, theirs = edge.predict(request), torchs.predict(request)
    assert mine.error is not None
    assert (mine.error, mine.code) == (theirs.error, theirs.code)
    assert mine.code == code


def kind_of(**settings: Any) -> type:
    chosen = PredictorSettings(**{"engine": "auto", "warmup": 1, **settings})
    return type(Predictor(chosen)._policy)


def test_auto_chooses_an_export_if_it_runs_the_decoding(
    exported: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    assert kind_of(checkpoint="student") is ServedExport
    assert kind_of(checkpoint=str(exported)) is ServedExport
    assert not caplog.messages
    assert kind_of(checkpoint="student", decoding="jacobi_random") is ServedCeed
    assert "student runs with torch. The guess is 'random'" in caplog.text

    def differs(*_: object) -> None:
        raise VerificationError("Other tokens.")

    monkeypatch.setattr(loading, "_made_export", differs)
    assert kind_of(checkpoint="student") is ServedCeed
    assert "student runs with torch. Other tokens." in caplog.text
    with pytest.raises(VerificationError):
        kind_of(checkpoint="student", engine="edge")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    caplog.clear()
    assert kind_of(checkpoint="student") is ServedCeed
    assert caplog.messages == ["student runs with torch. onnxruntime is not installed."]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"engine": "eager"}, "is an export, which runs with edge"),
        ({"engine": "compiled"}, "is an export, which runs with edge"),
        ({"decoding": "jacobi_random"}, "The guess is 'random'"),
        ({"decoding": "plan"}, "has no decoding 'plan'"),
        ({"device": "cuda"}, "device is cuda; exports run on cpu"),
    ],
)
def test_an_export_refuses_what_it_does_not_run(
    exported: Path, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        kind_of(checkpoint=str(exported), **settings)


def test_an_export_whose_tokens_this_machine_does_not_reproduce_is_refused(
    exported: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    values = json.loads((copy / "export.json").read_text())
    values["checks"][-1]["tokens"][0] ^= 1
    (copy / "export.json").write_text(json.dumps(values))
    with pytest.raises(VerificationError, match="gives other tokens on this machine"):
        kind_of(checkpoint=str(copy))


def test_an_export_is_served_without_torch(exported: Path) -> None:
    code = (
        "import sys\n"
        "from ceed_vla.serving.predictor import Predictor, PredictorSettings\n"
        f"Predictor(PredictorSettings({str(exported)!r}, engine='auto', warmup=1))\n"
        "Predictor(PredictorSettings('student', engine='auto', warmup=1))\n"
        "print([name for name in ('torch', 'lerobot', 'transformers') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_state_beyond_float32_is_not_the_instructions_fault(
    torchs: Predictor, edge: Predictor
) -> None:
    request = Request(1, {**observation(), STATE: np.full(14, 1e39)}, INSTRUCTION)
    for predictor in (torchs, edge):
        answer = predictor.predict(request)
        assert answer.error is not None
        assert answer.code != "bad_instruction"


def test_no_torch_and_no_export_is_one_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CEED_VLA_CACHE", str(tmp_path))
    monkeypatch.setattr("ceed_vla.export.cached.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="has no export yet, and torch is not installed"):
        kind_of(checkpoint="student", engine="edge")
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    config = {"backbone": {"type": "openvla"}, "action_tokens": {"type": "openvla"}}
    for name in ("model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"type": "ceed_vla", **config}))
    with pytest.raises(CeedVLAError, match="has openvla action tokens"):
        cached_export(tmp_path)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin threads")
@pytest.mark.parametrize("checkpoint", ["student", "its export"])
def test_the_cores_of_the_settings_are_those_of_the_engine(checkpoint: str) -> None:
    named = checkpoint if checkpoint == "student" else str(cached_export("student"))
    core = max(os.sched_getaffinity(0))
    for pin, cores in (("none", ()), (str(core), (core,))):
        predictor: Any = Predictor(PredictorSettings(named, engine="edge", pin=pin, warmup=1))
        assert predictor._policy._policy.placement.cores == cores
