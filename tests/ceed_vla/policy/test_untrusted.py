"""What a checkpoint says is neither executed nor believed: steps, paths, sizes, statistics, weights, scores."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry
from safetensors.torch import load_file, save_file

from ceed_vla import CeedVLAPolicy
from ceed_vla.checkpoints import load
from ceed_vla.errors import CeedVLAError, CheckpointError, NotFiniteError, ObservationError, TokenError

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, FRONT = "observation.state", "observation.images.front"
LOADERS = [load, CeedVLAPolicy.from_pretrained]
Loader = Callable[[Path], Any]


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "policy")


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_tensors(file: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(file), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)


def step(pipeline: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in pipeline["steps"] if entry["registry_name"] == name)


# ---- code -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", [PRE, POST])
@pytest.mark.parametrize(
    "bad",
    [
        {"class": "subprocess.Popen", "config": {"args": ["touch", "MARK"]}},
        {"class": "os.system", "config": {"command": "touch MARK"}},
        {
            "registry_name": "to_batch_processor",
            "class": "subprocess.Popen",
            "config": {"args": ["touch", "MARK"]},
        },
        {"registry_name": "reward_classifier_processor", "config": {"pretrained_path": "x"}},
        {"registry_name": "action_tokenizer_processor", "config": {}},
        {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "someone/model"}},
        {"registry_name": ["ceed_vla_instruction_words"], "config": {}},
        {"registry_name": None},
        {},
    ],
)
def test_no_step_outside_the_list_is_built(
    folder: Path, name: str, bad: dict[str, Any], loader: Loader
) -> None:
    mark = folder.parent / "ran"
    text = json.dumps(bad).replace("MARK", str(mark))
    edit(folder / name, lambda values: values["steps"].append(json.loads(text)))
    with pytest.raises(CheckpointError, match="could run code"):
        loader(folder)
    assert not mark.exists()


def test_steps_of_a_package_that_the_user_named_are_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("somebodys_package")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Theirs(ObservationProcessorStep):
        def observation(self, observation: Any) -> Any:
            return observation

        def transform_features(self, features: Any) -> Any:
            return features

    Theirs.__module__ = "somebodys_package.steps"
    ProcessorStepRegistry.register(name="somebodys_step")(Theirs)
    try:
        entry = {"registry_name": "somebodys_step", "config": {}}
        edit(folder / PRE, lambda values: values["steps"].append(entry))
        with pytest.raises(CheckpointError, match=r"somebodys_step.*--discover_packages_path"):
            load(folder)
        monkeypatch.setattr(sys, "argv", ["lerobot-eval", "--env.discover_packages_path=somebodys_package"])
        _, pre, _ = load(folder)
        assert isinstance(pre.steps[-1], Theirs)
    finally:
        ProcessorStepRegistry.unregister("somebodys_step")


# ---- paths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "name", ["../state.safetensors", "/state.safetensors", "a/../../s.safetensors", "", 5, "."]
)
def test_a_state_file_stays_in_the_folder(folder: Path, name: Any, loader: Loader) -> None:
    shutil.copy(next(folder.glob("*_normalizer_processor.safetensors")), folder.parent / "state.safetensors")
    edit(folder / PRE, lambda v: step(v, "normalizer_processor").update(state_file=name))
    with pytest.raises(CheckpointError, match="plain name"):
        loader(folder)


def test_features_have_plain_names(folder: Path) -> None:
    def rename(values: dict[str, Any]) -> None:
        values["input_features"]["../../front"] = values["input_features"].pop(FRONT)

    edit(folder / "config.json", rename)
    with pytest.raises(CheckpointError, match="plain name"):
        load(folder)


# ---- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 10_000_000},
        {"layers": 1024},
        {"width": 65_536},
        {"vocabulary_size": 10**7},
        {"mlp_width": 10**6},
        {"image_grid": 256, "image_size": 4096},
        {"max_instruction_words": 4096},
    ],
)
def test_no_model_is_built_that_the_weights_do_not_fill(
    folder: Path, sizes: dict[str, int], loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ceed_vla.backbones.compact.config.CompactConfig.build", lambda *_: pytest.fail("a model was built")
    )
    edit(folder / "config.json", lambda values: values["backbone"].update(sizes))
    with pytest.raises(CheckpointError, match=r"different models|must be a whole number"):
        loader(folder)


# ---- normalisation ----------------------------------------------------------------------------------------------


def _without(name: str, file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(folder / file, lambda v: v.update(steps=[s for s in v["steps"] if s["registry_name"] != name]))

    return change


def _statistics(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = next(folder.glob("*preprocessor*normalizer_processor.safetensors"))
        tensors = load_file(file)
        for name, value in changes.items():
            tensors.pop(f"{STATE}.{name}", None)
            if value is not None:
                tensors[f"{STATE}.{name}"] = value
        save_file(tensors or {"other.mean": torch.ones(1)}, file)

    return change


def _settings(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(
        folder / PRE, lambda v: step(v, "normalizer_processor")["config"].update(changes)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("normalizer_processor", PRE), "lacks the step 'normalizer_processor'"),
        (_without("unnormalizer_processor", POST), "lacks the step 'unnormalizer_processor'"),
        (_without("ceed_vla_instruction_words", PRE), "lacks the step 'ceed_vla_instruction_words'"),
        (_statistics(mean=None, std=None), r"needs \(14,\) floats 'mean' .* it has none"),
        (_statistics(std=torch.zeros(14)), "divides dimension 0"),
        (_statistics(std=torch.ones(14).index_fill(0, torch.tensor(3), -1.0)), "divides dimension 3"),
        (_statistics(mean=torch.full((14,), torch.nan)), "not finite"),
        (_statistics(mean=torch.full((14,), 1e30)), "beyond 1e"),
        (_statistics(std=torch.ones(14, dtype=torch.int64)), "torch.int64"),
        (_statistics(std=torch.ones(2, 7)), r"it has \(2, 7\)"),
        (_statistics(std=torch.ones(7)), r"it has \(7,\)"),
        (_settings(norm_map={"STATE": "IDENTITY"}), "config.json has"),
        (_settings(features={}), "other features"),
        (_settings(normalize_observation_keys=[]), "some keys only"),
        (_settings(eps=1e6), "eps is"),
    ],
)
def test_a_normaliser_says_what_it_was_trained_with(
    folder: Path, change: Callable[[Path], None], message: str
) -> None:
    change(folder)
    for loader in LOADERS:
        with pytest.raises(CheckpointError, match=message):
            loader(folder)


def test_a_state_that_never_moves_gets_a_width(
    policy: CeedVLAPolicy, tmp_path: Path, raw_observation: Any
) -> None:
    from ceed_vla.checkpoints import save
    from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors

    stats = {STATE: {"mean": torch.zeros(14), "std": torch.zeros(14)}}
    processors = make_ceed_vla_pre_post_processors(policy.config, stats, instructions=["put it"])
    _, pre, _ = load(save(tmp_path / "new", policy, *processors))
    assert pre({**raw_observation(), "task": "put it"})[STATE].abs().max() < 1e5


# ---- weights and scores -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda w: w.index_fill(0, torch.tensor(0), torch.nan), "head.weight holds NaN or infinity"),
        (lambda w: w.index_fill(0, torch.tensor(0), torch.inf), "head.weight holds NaN or infinity"),
        (torch.zeros_like, "head.weight holds nothing but zeros"),
        (lambda w: w.long(), "head.weight is of type I64"),
        (lambda w: w.bool(), "head.weight is of type BOOL"),
        (lambda w: w[:5].clone(), r"head.weight has shape \(5, 32\)"),
    ],
)
def test_weights_that_no_training_writes(folder: Path, value: Any, message: str, loader: Loader) -> None:
    file = folder / "model.safetensors"
    edit_tensors(file, backbone__head__weight=value(load_file(file)["backbone.head.weight"]))
    with pytest.raises(CheckpointError, match=message):
        loader(folder)


@pytest.mark.parametrize("decoding", ["ar", "jacobi", "ceed"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["head.bias", "layers.1.down.weight"])
def test_scores_that_are_not_finite_are_an_error(
    make_policy: Any, batch: dict[str, Any], decoding: str, value: float, part: str
) -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.backbone.get_parameter(part).flatten()[0] = value
    with pytest.raises(NotFiniteError, match="row 0"):
        policy.decode(batch, decoding)


def test_one_row_that_breaks_later_is_named(make_policy: Any, batch: dict[str, Any]) -> None:
    policy, calls = make_policy(), []
    original = policy.backbone.block_logits

    def broken(prefix: Any, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        logits = original(prefix, tokens)
        if len(calls) == 2:
            logits[1, 0, 3] = torch.nan
        return logits

    policy.backbone.block_logits = broken
    for decoding in ("ar", "jacobi"):
        calls.clear()
        with pytest.raises(NotFiniteError, match=r"row 1 \(1 of 2\)"):
            policy.decode(batch, decoding)


# ---- what callers pass ------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("method", ["decode", "predict_action_chunk", "select_action", "forward", "augment"])
def test_observations_of_another_kind(
    policy: CeedVLAPolicy, training_batch: dict[str, Any], key: str, value: Any, method: str
) -> None:
    with pytest.raises(ObservationError, match=key.rpartition(".")[2]):
        getattr(policy, method)({**training_batch, key: value})


@pytest.mark.parametrize("batch", [None, 5, [], "observation", {}])
@pytest.mark.parametrize(
    "method", ["decode", "predict_action_chunk", "select_action", "forward", "augment", "check_observation"]
)
def test_what_is_no_batch(policy: CeedVLAPolicy, batch: Any, method: str) -> None:
    with pytest.raises(ObservationError, match="pre-processor"):
        getattr(policy, method)(batch)


@pytest.mark.parametrize(
    "arguments",
    [
        {"previous": [[0] * 28] * 2},
        {"previous": np.zeros((2, 28), np.int64)},
        {"previous": torch.zeros(2, 28)},
        {"previous": torch.full((2, 28), 99)},
        {"frozen": [[0] * 7] * 2},
        {"frozen": np.zeros((2, 7), np.int64)},
        {"frozen": torch.zeros(2, 7)},
        {"shift_steps": 1.5, "previous": torch.zeros(2, 28).long()},
        {"shift_steps": -1, "previous": torch.zeros(2, 28).long()},
        {"generator": 7},
        {"decoding": 5},
        {"decoding": None},
        {"decoding": "cap0"},
        {"record_states": np.zeros(3)},
        {"read": "yes"},
        {"previous": torch.zeros(2, 28).long().to_sparse()},
        {"previous": torch.zeros(2, 28, dtype=torch.long, device="meta")},
    ],
)
def test_arguments_of_another_kind(policy: CeedVLAPolicy, batch: Any, arguments: dict[str, Any]) -> None:
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
        ("config.json", lambda v: v["decoding"].update(window=True), "true or false for 'window'"),
        (PRE, lambda v: v["steps"].append({"registry_name": "ceed_vla_vlm_inputs"}), "could run code"),
        (PRE, lambda v: v["steps"].append({"registry_name": "absolute_actions_processor"}), "could run code"),
        (PRE, lambda v: step(v, "ceed_vla_instruction_words")["config"]["vocabulary"].reverse(), "in order"),
        (POST, lambda v: v["steps"].append({"registry_name": "rename_observations_processor"}), "run code"),
        (
            POST,
            lambda v: v["steps"].append(
                {"registry_name": "absolute_actions_processor", "config": {"enabled": True}}
            ),
            "relative actions",
        ),
        (POST, lambda v: step(v, "unnormalizer_processor").update(state_file=None), "empty state_file"),
        (POST, lambda v: step(v, "device_processor")["config"].update(device="CPU"), "device is 'CPU'"),
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
        make_pre_post_processors(CeedVLAPolicy.from_pretrained(folder, config=config).config, str(folder))

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
        "augmentation_noise": torch.zeros(rows, policy.augmentation_size),
    }
    policy.forward(right)
    for change in (
        {"action": torch.zeros(rows + 1, steps, 7)},
        {"action": torch.zeros(rows, steps, 7).to_sparse()},
        {"observation.environment_state": torch.full((rows, 2), 1e38)},
        {"action_is_pad": torch.full((rows, steps), torch.nan)},
        {"augmentation_noise": torch.full((rows, policy.augmentation_size), 7.0)},
    ):
        with pytest.raises(CeedVLAError):
            policy.forward({**right, **change})
    with pytest.raises(CeedVLAError, match="augmentation_noise"):
        policy.augment({**batch, "augmentation_noise": 5})
    with pytest.raises(CeedVLAError, match="does not run"):
        policy.half().decode(batch)


@pytest.mark.parametrize("options", [{"push_to_hub": True}, {"state_dict": 5}, {"state_dict": {1: 2}}])
def test_what_cannot_be_saved(policy: CeedVLAPolicy, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(CeedVLAError):
        policy.save_pretrained(tmp_path / "saved", **options)
    with pytest.raises(CheckpointError, match="cannot be written"):
        policy.save_pretrained("a\0b")


def test_lerobots_own_route_is_covered(folder: Path) -> None:
    """LeRobot's tools make the policy first; what it refuses never reaches their processors."""
    mark = folder.parent / "ran"
    bad = {"class": "subprocess.Popen", "config": {"args": ["touch", str(mark)]}}
    edit(folder / POST, lambda values: values["steps"].append(bad))
    with pytest.raises(CheckpointError, match="could run code"):
        make_pre_post_processors(CeedVLAPolicy.from_pretrained(folder).config, str(folder))
    assert not mark.exists()
