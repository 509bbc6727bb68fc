"""Values of wrong types raise this package's errors, also inside LeRobot's tools."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edits import edit, step
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors

from ceed_vla import CeedVLAPolicy
from ceed_vla.checkpoints import load
from ceed_vla.errors import CeedVLAError, CheckpointError, ObservationError, TokenError
from ceed_vla.supervision import augment, augmentation_size, auxiliary_loss

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, FRONT = "observation.state", "observation.images.front"
LOADERS = [load, CeedVLAPolicy.from_pretrained]
Loader = Callable[[Path], Any]


def call(policy: CeedVLAPolicy, name: str) -> Callable[[Any], Any]:
    """A method of the policy, or a function of training that uses it."""
    return partial(augment, policy) if name == "augment" else getattr(policy, name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (FRONT, torch.full((2, 3, 96, 96), torch.nan)),
        (FRONT, torch.full((2, 3, 96, 96), 255.0)),
        (FRONT, torch.full((2, 3, 96, 96), -0.1)),
        (FRONT, torch.rand(2, 3, 96, 96).double()),
        (FRONT, torch.rand(2, 3, 96, 96).half()),
        (FRONT, np.zeros((2, 3, 96, 96), np.float32)),
        (FRONT, torch.rand(2, 1, 96, 96)),
        (STATE, torch.zeros(2, 14).double()),
        (STATE, torch.zeros(2, 14).long()),
        (STATE, [[0.0] * 14] * 2),
        ("observation.language.tokens", torch.full((2, 12), 1e9)),
        ("observation.language.tokens", torch.full((2, 12), -1)),
        ("observation.language.tokens", torch.full((2, 12), 100_000)),
    ],
)
@pytest.mark.parametrize(
    "method", ["decode", "predict_action_chunk", "select_action", "forward", "augment"]
)
def test_observations_of_another_kind(
    policy: CeedVLAPolicy, training_batch: dict[str, Any], key: str, value: Any, method: str
) -> None:
    with pytest.raises(ObservationError, match=key.rpartition(".")[2]):
        call(policy, method)({**training_batch, key: value})


@pytest.mark.parametrize("batch", [None, 5, [], "observation", {}])
@pytest.mark.parametrize(
    "method",
    ["decode", "predict_action_chunk", "select_action", "forward", "augment", "check_observation"],
)
def test_what_is_no_batch(policy: CeedVLAPolicy, batch: Any, method: str) -> None:
    with pytest.raises(ObservationError, match="preprocessor"):
        call(policy, method)(batch)


@pytest.mark.parametrize(
    "arguments",
    [
        {"previous": [[0] * 28] * 2},
        {"previous": np.zeros((2, 28), np.int64)},
        {"previous": torch.zeros(2, 28)},
        {"previous": torch.full((2, 28), 99)},
        {"frozen_steps": 1},
        {"frozen_steps": [1], "previous": torch.zeros(2, 28).long()},
        {"frozen_steps": 1.5, "previous": torch.zeros(2, 28).long()},
        {"shift_steps": 1.5, "previous": torch.zeros(2, 28).long()},
        {"shift_steps": -1, "previous": torch.zeros(2, 28).long()},
        {"decoding": 5},
        {"decoding": None},
        {"decoding": "cap0"},
        {"previous": torch.zeros(2, 28).long().to_sparse()},
        {"previous": torch.zeros(2, 28, dtype=torch.long, device="meta")},
    ],
)
def test_arguments_of_another_kind(
    policy: CeedVLAPolicy, batch: Any, arguments: dict[str, Any]
) -> None:
    with pytest.raises((TokenError, CeedVLAError)):
        policy.decode(batch, **arguments)


@pytest.mark.parametrize("path", [None, 5, "", b"student", "\0", "x" * 5000, [], Path("nowhere")])
def test_paths_of_another_kind(path: Any) -> None:
    for loader in LOADERS:
        with pytest.raises(CheckpointError):
            loader(path)
    with pytest.raises(CeedVLAError, match="device"):
        load("student", device=path or "x")


@pytest.mark.parametrize("task", [5, [None], [], [["a"]], {"a": 1}, None, "?!", "xyzzy plugh"])
def test_instructions_of_another_kind(processors: Any, raw_observation: Any, task: Any) -> None:
    with pytest.raises(ObservationError, match="instruction"):
        processors[0]({**raw_observation(), "task": task})


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda v: v.update(chunk_size=0), "chunk_size is 0"),
        ("config.json", lambda v: v.update(nonsense=1), "nonsense"),
        ("config.json", lambda v: v.update(backbone=[]), "choice class"),
        ("config.json", lambda v: v.update(input_features=3), "config.json cannot be used"),
        ("config.json", lambda v: v.update(use_peft=True), "use_peft"),
        ("config.json", lambda v: v["decoding"].pop("max_iterations"), "lacks 'max_iterations'"),
        ("config.json", lambda v: v.pop("delta_dims"), "lacks 'delta_dims'"),
        ("config.json", lambda v: v["decoding"].update(window=True), "window is True"),
        (
            "config.json",
            lambda v: v.update(n_action_steps="2"),
            "n_action_steps is '2', which is read as 2",
        ),
        ("config.json", lambda v: v["action_tokens"].update(num_bins="31"), "num_bins is '31'"),
        (
            "config.json",
            lambda v: v["decoding"].update(exits=["cap1"]),
            "which has a field of its own; set max_iterations",
        ),
        (
            PRE,
            lambda v: v["steps"].append({"registry_name": "ceed_vla_vlm_inputs"}),
            "could run code",
        ),
        (
            PRE,
            lambda v: v["steps"].append({"registry_name": "absolute_actions_processor"}),
            "could run code",
        ),
        (
            PRE,
            lambda v: step(v, "ceed_vla_instruction_words")["config"]["vocabulary"].reverse(),
            "in order",
        ),
        (
            PRE,
            lambda v: step(v, "ceed_vla_instruction_words")["config"]["vocabulary"].pop(),
            "the model was trained with",
        ),
        (
            POST,
            lambda v: v["steps"].append({"registry_name": "rename_observations_processor"}),
            "run code",
        ),
        (
            POST,
            lambda v: v["steps"].append(
                {"registry_name": "absolute_actions_processor", "config": {"enabled": True}}
            ),
            "relative actions",
        ),
        (
            POST,
            lambda v: step(v, "unnormalizer_processor").update(state_file=None),
            "empty state_file",
        ),
        (
            POST,
            lambda v: step(v, "device_processor")["config"].update(device="CPU"),
            "device is 'CPU'",
        ),
    ],
)
def test_lerobots_tools_end_in_an_error_of_ours(
    folder: Path, file: str, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    import lerobot_policy_ceed_vla  # noqa: F401  (LeRobot's tools import their plugins)

    edit(folder / file, change)
    with pytest.raises(CeedVLAError, match=message):
        load(folder)

    def build() -> None:
        config = PreTrainedConfig.from_pretrained(folder)
        make_pre_post_processors(
            CeedVLAPolicy.from_pretrained(folder, config=config).config, str(folder)
        )

    with pytest.raises(CeedVLAError, match=message):
        build()


def test_training_batches_of_another_kind(make_policy: Any, batch: dict[str, Any]) -> None:
    policy = make_policy(auxiliary_scale=[1.0, 1.0])
    rows, steps = 2, policy.config.chunk_size
    right = {
        **batch,
        "action": torch.zeros(rows, steps, 7),
        "observation.environment_state": torch.zeros(rows, 2),
        "action_is_pad": torch.zeros(rows, steps, dtype=torch.bool),
        "augmentation_noise": torch.zeros(rows, augmentation_size(policy)),
    }
    policy.forward(right)
    for change in (
        {"action": torch.zeros(rows + 1, steps, 7)},
        {"action": torch.zeros(rows, steps, 7).to_sparse()},
        {"observation.environment_state": torch.full((rows, 2), 1e38)},
        {"action_is_pad": torch.full((rows, steps), torch.nan)},
        {"augmentation_noise": torch.full((rows, augmentation_size(policy)), 7.0)},
    ):
        with pytest.raises(CeedVLAError):
            policy.forward({**right, **change})
    with pytest.raises(CeedVLAError, match="augmentation_noise"):
        augment(policy, {**batch, "augmentation_noise": 5})
    with pytest.raises(CeedVLAError, match="does not run"):
        policy.half().decode(batch)


def test_what_load_returns_refuses_other_types(folder: Path) -> None:
    policy, pre, post = load(folder)
    for given in (None, 3, "text", {}, {"task": 5}, [1]):
        with pytest.raises(ObservationError, match="preprocessor cannot read"):
            pre(given)
        with pytest.raises(ObservationError, match="postprocessor cannot read"):
            post(given)
    policy.auxiliary_terms = "x"
    with pytest.raises(CeedVLAError, match="auxiliary_terms"):
        auxiliary_loss(policy, torch.zeros(1), torch.zeros(1, 4), torch.zeros(1, 2))


def test_what_cannot_be_saved(policy: CeedVLAPolicy, tmp_path: Path) -> None:
    with pytest.raises(CeedVLAError):
        policy.save_pretrained(tmp_path / "saved", push_to_hub=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        policy.save_pretrained("a\0b")


def test_lerobots_own_route_is_covered(folder: Path) -> None:
    """LeRobot's tools build the policy first, so a refused checkpoint never reaches their
    processors.
    """
    mark = folder.parent / "ran"
    bad = {"class": "subprocess.Popen", "config": {"args": ["touch", str(mark)]}}
    edit(folder / POST, lambda values: values["steps"].append(bad))
    with pytest.raises(CheckpointError, match="could run code"):
        make_pre_post_processors(CeedVLAPolicy.from_pretrained(folder).config, str(folder))
    assert not mark.exists()
