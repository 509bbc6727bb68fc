"""The worker answers, says what went wrong, and never blocks or outlives its owner; in a thread and
in a process.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from workers import load_error, process_of, running

import ceed_vla
import ceed_vla.engine
from ceed_vla.checkpoints import save
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import ConfigError, NotFiniteError
from ceed_vla.real_time import decode_behind
from ceed_vla.ros_nodes.robot.inference import MODES, InferenceWorker
from ceed_vla.ros_nodes.robot.predictor import Predictor, PredictorSettings, Request, Response
from tests.helpers.edits import unsealed
from tests.ros_nodes.conftest import tiny_act

FRONT, WRIST, STATE = "observation.images.front", "observation.images.wrist", "observation.state"
INSTRUCTION = "put the red cube in the bin"
A = 7


def observation(seed: int = 0, side: int = 96) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = {key: rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for key in (FRONT, WRIST)}
    return {**images, STATE: rng.normal(size=14).astype(np.float32)}


def wait(worker: InferenceWorker, timeout: float = 60.0) -> Response:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if (response := worker.poll()) is not None:
            return response
        time.sleep(0.005)
    raise TimeoutError("no answer")


def ask(worker: InferenceWorker, request: Request) -> Response:
    assert worker.submit(request)
    return wait(worker)


@pytest.fixture(scope="module", params=MODES)
def worker(request: pytest.FixtureRequest) -> Iterator[InferenceWorker]:
    """The shipped student, in each place."""
    with running("student", mode=request.param, replan_steps=4) as started:
        yield started


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any, Any]:
    return ceed_vla.load("student")


def test_the_spec_is_the_checkpoints(worker: InferenceWorker) -> None:
    spec = worker.spec
    assert spec.cameras == {FRONT: (3, 96, 96), WRIST: (3, 96, 96)}
    assert spec.states == {STATE: 14}
    assert (spec.action_dim, spec.chunk_steps, spec.n_action_steps) == (A, 8, 4)
    assert spec.policy_type == "ceed_vla"
    assert spec.warmup_s > 0


def test_the_answer_is_the_policys(worker: InferenceWorker, policy: tuple[Any, Any, Any]) -> None:
    model, pre, _ = policy
    raw = observation()
    batch = {
        key: (
            torch.tensor(value).permute(2, 0, 1)[None].float() / 255
            if value.ndim == 3
            else torch.tensor(value)[None]
        )
        for key, value in raw.items()
    }
    batch = pre({**batch, "task": [INSTRUCTION]})
    first = ask(worker, Request(1, raw, INSTRUCTION))
    expected = model.decode(batch, "ceed")
    assert first.error is None
    assert first.id == 1
    assert first.tokens.tolist() == expected.tokens[0].tolist()
    np.testing.assert_array_equal(first.actions, expected.actions[0].numpy())
    assert first.actions.dtype == np.float32
    assert (first.forwards, first.exit_reason) == (expected.forwards, expected.exit_reason[0])
    assert set(first.seconds) == {"preprocess", "prefill", "decode", "total"}
    second = ask(worker, Request(2, raw, INSTRUCTION, first.tokens, shift_steps=3, frozen_steps=2))
    frozen = torch.tensor(first.tokens)[None, 3 * A : 5 * A]
    warm = {"decoding": "ceed", "previous": torch.tensor(first.tokens)[None], "shift_steps": 3}
    expected = decode_behind(model, batch, frozen, **warm)
    assert second.tokens.tolist() == expected.tokens[0].tolist()
    np.testing.assert_array_equal(second.actions[:2], first.actions[3:5])


def test_one_request_at_a_time(worker: InferenceWorker) -> None:
    assert worker.idle
    assert worker.poll() is None
    assert worker.submit(Request(7, observation(), INSTRUCTION))
    assert not worker.idle
    assert not worker.submit(Request(8, observation(), INSTRUCTION))
    assert wait(worker).id == 7
    assert worker.poll() is None
    assert worker.idle


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("decoding", "parts"), [("ar", 7), ("jacobi", 1), ("cap1", 0)])
def test_steps_that_are_certain_come_before_the_chunk(mode: str, decoding: str, parts: int) -> None:
    with running("student", mode=mode, decoding=decoding) as worker:
        request = Request(5, observation(), INSTRUCTION, stream=True)
        assert worker.submit(request)
        answers = [wait(worker)]
        while not answers[-1].whole:
            assert not worker.idle
            answers.append(wait(worker))
        assert worker.idle
        *early, whole = answers
        assert parts <= len(early) <= 7
        assert [len(one.actions) for one in early] == sorted({len(one.actions) for one in early})
        for one in early:
            np.testing.assert_array_equal(one.actions, whole.actions[: len(one.actions)])
            assert (one.id, one.error, one.forwards <= whole.forwards) == (5, None, True)
        again = ask(worker, replace(request, stream=False))  # in one
        np.testing.assert_array_equal(again.actions, whole.actions)
        # what is made up for is no token of the chunk
        behind = replace(request, previous=whole.tokens, frozen_steps=1)
        assert ask(worker, behind).whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FRONT: None}, f"lacks '{FRONT}'; it has {WRIST}, {STATE}"),
        ({FRONT: np.zeros((96, 96, 3), np.float32)}, r"float32 \(96, 96, 3\), expected uint8"),
        ({FRONT: np.zeros((96, 96), np.uint8)}, r"expected uint8 \(H, W, 3\)"),
        ({STATE: np.full(14, np.nan, np.float32)}, "14 finite numbers"),
        ({STATE: np.zeros(9, np.float32)}, "14 finite numbers"),
    ],
)
def test_a_bad_observation_is_answered_and_the_worker_goes_on(
    worker: InferenceWorker, change: dict[str, Any], message: str
) -> None:
    bad = {key: value for key, value in {**observation(), **change}.items() if value is not None}
    answer = ask(worker, Request(3, bad, INSTRUCTION))
    assert answer.error is not None
    assert re.search(message, answer.error)
    assert answer.actions.shape == (0, 0)
    assert worker.failed is None
    assert ask(worker, Request(4, observation(), INSTRUCTION)).error is None


@pytest.mark.parametrize("text", ["  ", "%%% ???", "xyzzy plugh", "red " * 50])
def test_an_instruction_that_the_policy_does_not_take_is_told_from_other_errors(
    worker: InferenceWorker, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = ask(worker, Request(3, observation(), text))
    assert answer.error is not None
    assert len(answer.error) <= 200
    assert answer.code == "bad_instruction"
    bad = {**observation(), STATE: np.zeros(9, np.float32)}
    assert ask(worker, Request(4, bad, INSTRUCTION)).code == ""
    for _ in range(50):
        ask(worker, Request(5, observation(), text))
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert len(out + err) < 2000


def test_scores_that_are_not_finite_are_told_from_other_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise NotFiniteError("The scores are not finite.")

    with running("student", mode="thread", warmup=1) as worker:
        monkeypatch.setattr(worker._policy._predictor._policy, "decode", broken)  # type: ignore[union-attr]
        answer = ask(worker, Request(1, observation(), INSTRUCTION))
    assert (answer.error, answer.code) == ("The scores are not finite.", "not_finite")


def test_tokens_that_do_not_fit_are_answered(worker: InferenceWorker) -> None:
    answer = ask(worker, Request(3, observation(), INSTRUCTION, np.arange(5), 1, 1))
    assert answer.error is not None
    assert "previous chunk" in answer.error or "frozen prefix" in answer.error


def test_a_deadline_in_the_past_leaves_one_iteration() -> None:
    with running("student", mode="thread", decoding="jacobi") as strict:
        answer = ask(strict, Request(1, observation(), INSTRUCTION, deadline_s=1e-6))
        assert (answer.forwards, answer.exit_reason) == (1, "deadline")
        answer = ask(strict, Request(2, observation(), INSTRUCTION, deadline_s=1e6))
        assert answer.exit_reason == "converged"
        assert answer.forwards > 1


def test_ar_decodes_every_step_so_that_the_next_chunk_freezes_no_guess(
    policy: tuple[Any, Any, Any],
) -> None:
    with running("student", mode="thread", decoding="ar", replan_steps=2) as greedy:
        answer = ask(greedy, Request(1, observation(), INSTRUCTION, deadline_s=1e-6))
    assert answer.error is None
    assert (answer.forwards, answer.exit_reason) == (8 * A - 1, "complete")
    assert policy[0].decoding_config("ar") == DecodingConfig(method="ar")


def test_the_added_delay_is_part_of_the_time_and_ends_at_close() -> None:
    with running("student", mode="thread", warmup=1, delay_s=0.2) as slow:
        assert slow.spec.warmup_s >= 0.2
        assert slow.submit(Request(1, observation(), INSTRUCTION))
    assert not slow.idle
    assert not slow.submit(Request(2, observation(), INSTRUCTION))
    slow.close()


# ---- processes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_stands_still_or_dies_never_blocks_the_control_loop() -> None:
    worker = InferenceWorker("student", mode="process", warmup=1)
    assert load_error(worker) is None
    process = process_of(worker)
    assert process != os.getpid()
    os.kill(process, signal.SIGINT)  # Ctrl-C in a terminal reaches it too, and is not for it
    os.kill(process, signal.SIGSTOP)
    # far more than a pipe holds
    assert worker.submit(Request(1, observation(side=1200), INSTRUCTION))
    assert worker.poll() is None
    os.kill(process, signal.SIGCONT)
    assert wait(worker).error is None
    os.kill(process, signal.SIGSTOP)
    assert worker.submit(Request(2, observation(), INSTRUCTION))
    os.kill(process, signal.SIGKILL)
    answer = wait(worker)
    assert answer.error == worker.failed == "The inference process ended (exit code -9)."
    assert not worker.idle
    assert not worker.submit(Request(3, observation(), INSTRUCTION))
    worker.close()


def test_a_process_that_stands_still_while_it_loads_is_killed_at_close() -> None:
    worker = InferenceWorker("student", mode="process")
    worker.begin()
    process = process_of(worker)
    os.kill(process, signal.SIGSTOP)
    time.sleep(0.5)
    assert not worker.ready
    worker.close(timeout_s=1.0)
    assert not alive(process)
    assert worker.failed is None  # it was meant to end


@pytest.mark.slow
def test_the_process_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        "import time\n"
        "from workers import process_of, running\n"
        "with running('student', warmup=1) as worker:\n"
        "    print(process_of(worker), flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests' / 'helpers'}"}
    owner = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    pid = int(owner.stdout.readline().split()[-1])
    assert alive(pid)
    owner.kill()
    owner.wait()
    end = time.monotonic() + 20
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs (one that nobody has waited for yet counts as ended)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_a_missing_checkpoint_is_refused(mode: str, tmp_path: Path) -> None:
    with closing(InferenceWorker(tmp_path / "nothing", mode=mode)) as worker:
        assert (load_error(worker) or "").startswith("No checkpoint folder")
        assert not worker.idle


def refused(checkpoint: str | Path, **settings: Any) -> str:
    """Why a worker does not load a checkpoint."""
    with closing(InferenceWorker(checkpoint, mode="thread", **settings)) as worker:
        return load_error(worker) or ""


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    unsealed(shutil.copytree(ceed_vla.pretrained_path("student"), folder))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "do not load" in refused(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"ceed_vla"', '"unheard_of"'))
    assert "holds a policy of type 'unheard_of'" in refused(folder)
    config.write_text("{}")
    assert "config.json lacks a type" in refused(folder)


def test_a_policy_that_reads_several_observations_is_refused(tmp_path: Path) -> None:
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig

    action = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(6,))}
    VQBeTConfig(
        device="cpu", n_obs_steps=5, input_features={}, output_features=action
    ).save_pretrained(tmp_path)
    for name in ("model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"):
        (tmp_path / name).touch()
    assert "reads 5 observations at once" in refused(tmp_path)


@pytest.fixture(scope="module")
def act(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    """Folder of a tiny ACT policy, and what is in it."""
    folder = tmp_path_factory.mktemp("act")
    policy, pre, post = tiny_act(folder, joints=6, spread=2.0)
    # As after training: the weights came from ImageNet once, and are in the checkpoint now.
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace(
            '"pretrained_backbone_weights": null',
            '"pretrained_backbone_weights": "ResNet18_Weights.IMAGENET1K_V1"',
        )
    )
    return folder, policy, pre, post


def test_any_lerobot_policy_is_served(act: tuple[Path, Any, Any, Any]) -> None:
    folder, policy, pre, post = act
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    state = np.linspace(-1, 1, 6, dtype=np.float32)
    with running(folder, mode="thread", replan_steps=2) as worker:
        spec = worker.spec
        raw = {"observation.images.top": image, STATE: state}
        answer = ask(worker, Request(1, raw, "anything", None, 0, 2, deadline_s=0.1))
    assert (spec.policy_type, spec.chunk_steps, spec.n_action_steps) == ("act", 6, 4)
    assert spec.cameras == {"observation.images.top": (3, 64, 64)}
    assert (answer.error, answer.tokens, answer.forwards, answer.exit_reason) == (None, None, 0, "")
    batch = {
        "observation.images.top": torch.tensor(image).permute(2, 0, 1)[None] / 255,
        STATE: torch.tensor(state)[None],
        "task": ["anything"],
    }
    with torch.no_grad():
        expected = post(policy.predict_action_chunk(pre(batch)))[0].numpy()
    assert answer.actions.shape == (6, 6)
    np.testing.assert_allclose(answer.actions, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "fork"}, "'fork'; choose one of process, thread"),
        ({"threads": 0}, "threads is 0; it must be a whole number in"),
        ({"warmup": 0}, "warmup is 0; it must be a whole number in"),
        ({"replan_steps": 0}, "replan_steps is 0; it must be a whole number in"),
        ({"delay_s": -1.0}, r"delay_s is -1.0; it must be a finite number in \[0, 60\)"),
        ({"chunk_deadline": 0.0}, "chunk_deadline is 0.0"),
        ({"engine": "fast"}, "engine is 'fast'; it must be one of eager, compiled"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InferenceWorker("student", **changes)


@pytest.mark.parametrize(("deadline", "chosen"), [(60.0, "plan90.5"), (1e-6, "plan7")])
def test_of_a_searchs_plans_the_one_that_fits_here_decodes(
    tmp_path: Path, deadline: float, chosen: str
) -> None:
    policy, pre, post = ceed_vla.load("student")
    policy.config.decodings = {
        "plan7": "cap1",
        "plan12": "cap2",
        "plan90.5": "cap4",
        "plan": "cap4",
    }
    save(tmp_path / "policy", policy, pre, post)
    settings: dict[str, Any] = {"decoding": "plan", "chunk_deadline": deadline, "mode": "thread"}
    with running(tmp_path / "policy", **settings) as worker:
        assert worker.spec.decoding == chosen
        assert (ask(worker, Request(1, observation(), INSTRUCTION)).forwards == 1) == (
            chosen == "plan7"
        )


def test_compiled_it_answers_the_same_and_no_request_waits_for_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compiled = ceed_vla.engine.compiled
    monkeypatch.setattr(
        ceed_vla.engine, "compiled", lambda backbone: compiled(backbone, backend=backend)
    )
    settings: dict[str, Any] = {"decoding": "jacobi", "warmup": 1}
    eager = Predictor(PredictorSettings("student", **settings))
    worker = Predictor(PredictorSettings("student", engine="compiled", **settings))
    ready = len(graphs)
    assert ready > 4  # prefill and the block's windows
    first = worker.predict(Request(1, observation(), INSTRUCTION))
    for shift, frozen in ((0, 0), (1, 1), (4, 2), (2, 5)):
        request = Request(2, observation(), INSTRUCTION, first.tokens, shift, frozen)
        mine, theirs = worker.predict(request), eager.predict(request)
        assert mine.tokens is not None
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        assert mine.forwards == theirs.forwards
    assert len(graphs) == ready
    with pytest.raises(ConfigError, match="runs eager only"):
        Predictor(
            PredictorSettings("student", engine="compiled", decoding="deer3t3_cap2", warmup=1)
        )
    for setting in ({"engine": "compiled"}, {"python": "python3"}):
        with pytest.raises(ConfigError, match="need the inference mode process, not thread"):
            InferenceWorker("student", mode="thread", **setting)


def test_an_unknown_way_to_decode_is_refused() -> None:
    assert "'beam'" in refused("student", decoding="beam")
