"""Checkpoints and settings that an inference worker accepts, and how it refuses others.

It serves any policy of LeRobot and every decoder, compiled or not.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from workers import load_error, running

import ceed_vla
import ceed_vla.compiled.engine
from ceed_vla.checkpoints import save
from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.inference import InferenceWorker
from ceed_vla.ros_nodes.robot.local_policy import local_policy
from ceed_vla.serving.predictor import Predictor, PredictorSettings, Request
from ceed_vla.serving.served_checkpoint import ServedCheckpoint
from tests.helpers.edits import unsealed
from tests.helpers.worker_requests import INSTRUCTION, STATE, ask, observation
from tests.ros_nodes.conftest import tiny_act


@pytest.mark.parametrize("mode", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_a_missing_checkpoint_is_refused(mode: str, tmp_path: Path) -> None:
    with closing(InferenceWorker(local_policy(tmp_path / "nothing", mode=mode))) as worker:
        assert (load_error(worker) or "").startswith("No checkpoint folder")
        assert not worker.idle


def refused(checkpoint: str | Path, **settings: Any) -> str:
    """Return why a worker does not load a checkpoint."""
    with closing(InferenceWorker(local_policy(checkpoint, mode="thread", **settings))) as worker:
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
    """Folder of a tiny ACT policy, and the policy with its processors."""
    folder = tmp_path_factory.mktemp("act")
    policy, pre, post = tiny_act(folder, joints=6, spread=2.0)
    # As after training: ImageNet weights were loaded once, and the checkpoint contains them now.
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
    ("kind", "sizes", "steps"),
    [
        ("tdmpc", {"horizon": 3, "latent_dim": 8, "mlp_dim": 8, "image_encoder_hidden_dim": 4}, 2),
        (
            "vqbet",
            {
                "gpt_hidden_dim": 16,
                "gpt_input_dim": 16,
                "gpt_output_dim": 16,
                "gpt_n_layer": 1,
                "gpt_n_head": 2,
                "crop_shape": None,
                "pretrained_backbone_weights": None,
            },
            5,
        ),
    ],
)
def test_policies_with_queues_answer_anew(
    tmp_path: Path, kind: str, sizes: dict[str, Any], steps: int
) -> None:
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import (
        get_policy_class,
        make_policy_config,
        make_pre_post_processors,
    )

    camera = "observation.image"  # the only name that tdmpc reads
    torch.manual_seed(0)
    config = make_policy_config(
        kind,
        n_obs_steps=1,
        device="cpu",
        input_features={
            camera: PolicyFeature(type=FeatureType.VISUAL, shape=(3, 64, 64)),
            STATE: PolicyFeature(type=FeatureType.STATE, shape=(6,)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(6,))},
        **sizes,
    )
    stats = {name: {"min": torch.zeros(6), "max": torch.ones(6)} for name in (STATE, "action")} | {
        camera: {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    }
    policy = get_policy_class(kind)(config).eval()
    pre, post = make_pre_post_processors(config, dataset_stats=stats)
    for part in (policy, pre, post):
        part.save_pretrained(tmp_path)
    black, white = (np.full((64, 64, 3), level, np.uint8) for level in (0, 255))
    with running(tmp_path, mode="thread") as worker:
        assert (worker.spec.policy_type, worker.spec.chunk_steps) == (kind, steps)
        for number, image in enumerate((black, white), 1):
            raw = {camera: image, STATE: np.zeros(6, np.float32)}
            answer = ask(worker, Request(number, raw, "anything"))
            assert answer.error is None
            assert answer.actions.shape == (steps, 6)


def test_a_policy_with_a_queue_of_actions_alone_is_asked_for_its_chunk() -> None:
    chunk = torch.zeros(1, 50, 6)
    policy = SimpleNamespace(_queues={"action": deque()}, predict_action_chunk=lambda _: chunk)
    served = object.__new__(ServedCheckpoint)
    served._policy = policy  # as pi0, whose select_action fills another queue
    assert served._predicted({}) is chunk


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "fork"}, "'fork'; choose one of process, thread"),
        ({"threads": 0}, "threads is 0; it must be a whole number in"),
        ({"warmup": 0}, "warmup is 0; it must be a whole number in"),
        ({"replan_steps": 0}, "replan_steps is 0; it must be a whole number in"),
        ({"delay_s": -1.0}, r"delay_s is -1.0; it must be a finite number in \[0, 60\)"),
        ({"chunk_deadline": 0.0}, "chunk_deadline is 0.0"),
        ({"engine": "fast"}, "engine is 'fast'; it must be one of auto, eager, compiled, edge"),
        ({"pin": 2}, "pin is 2; it must be a string"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InferenceWorker(local_policy("student", **changes))


@pytest.mark.parametrize(("count", "raised"), [(2, True), (1, False)])
def test_inference_has_priority_where_it_leaves_a_core(
    count: int, raised: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    before = os.sched_getaffinity(0)
    if len(before) < count:
        pytest.skip("one core")
    os.sched_setaffinity(0, sorted(before)[:count])  # for the process
    try:
        with running("student", mode="process", engine="edge", priority=48):
            pass
    finally:
        os.sched_setaffinity(0, before)
    # "fifo 48", or why this user may not have it
    assert ("Scheduling of inference is" in capfd.readouterr().err) == raised


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

    compiled = ceed_vla.compiled.engine.compiled
    monkeypatch.setattr(
        ceed_vla.compiled.engine, "compiled", lambda backbone: compiled(backbone, backend=backend)
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
    with pytest.raises(ConfigError, match="supports only"):
        Predictor(
            PredictorSettings("student", engine="compiled", decoding="deer3t3_cap2", warmup=1)
        )
    for setting in ({"engine": "compiled"}, {"python": "python3"}):
        with pytest.raises(ConfigError, match="need the inference mode process, not thread"):
            InferenceWorker(local_policy("student", mode="thread", **setting))


def test_an_unknown_way_to_decode_is_refused() -> None:
    assert "'beam'" in refused("student", decoding="beam")
