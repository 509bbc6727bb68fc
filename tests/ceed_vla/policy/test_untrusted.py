"""Checkpoints are untrusted: their code never runs, and steps, paths, sizes, statistics, weights
and logits are validated.
"""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import edit, edit_tensors, step
from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry
from safetensors.torch import load_file, save_file

from ceed_vla import CeedVLAPolicy
from ceed_vla.checkpoints import load
from ceed_vla.errors import CheckpointError, NotFiniteError

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, FRONT = "observation.state", "observation.images.front"
LOADERS = [load, CeedVLAPolicy.from_pretrained]
Loader = Callable[[Path], Any]


# ---- code ----------------------------------------------------------------------------------------


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
        monkeypatch.setattr(
            sys, "argv", ["lerobot-eval", "--env.discover_packages_path=somebodys_package"]
        )
        _, pre, _ = load(folder)
        assert isinstance(pre.steps[-1], Theirs)
    finally:
        ProcessorStepRegistry.unregister("somebodys_step")


# ---- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "name", ["../state.safetensors", "/state.safetensors", "a/../../s.safetensors", "", 5, "."]
)
def test_a_state_file_stays_in_the_folder(folder: Path, name: Any, loader: Loader) -> None:
    shutil.copy(
        next(folder.glob("*_normalizer_processor.safetensors")), folder.parent / "state.safetensors"
    )
    edit(folder / PRE, lambda v: step(v, "normalizer_processor").update(state_file=name))
    with pytest.raises(CheckpointError, match="plain name"):
        loader(folder)


def test_features_have_plain_names(folder: Path) -> None:
    def rename(values: dict[str, Any]) -> None:
        values["input_features"]["../../front"] = values["input_features"].pop(FRONT)

    edit(folder / "config.json", rename)
    with pytest.raises(CheckpointError, match="plain name"):
        load(folder)


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 10_000_000},
        {"layers": 1024},
        {"width": 65_536},
        {"words": 10**7},
        {"mlp_width": 10**6},
        {"image_grid": 256, "image_size": 4096},
        {"max_instruction_words": 4096},
    ],
)
def test_no_model_is_built_that_the_weights_do_not_fill(
    folder: Path, sizes: dict[str, int], loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ceed_vla.backbones.compact.config.CompactConfig.build",
        lambda *_: pytest.fail("a model was built"),
    )
    edit(folder / "config.json", lambda values: values["backbone"].update(sizes))
    with pytest.raises(CheckpointError, match=r"different models|must be a whole number"):
        loader(folder)


# ---- normalisation -------------------------------------------------------------------------------


def _without(name: str, file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(
            folder / file,
            lambda v: v.update(steps=[s for s in v["steps"] if s["registry_name"] != name]),
        )

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
        (
            _without("ceed_vla_instruction_words", PRE),
            "lacks the step 'ceed_vla_instruction_words'",
        ),
        (_statistics(mean=None, std=None), r"needs \(14,\) floats 'mean' .* it has none"),
        (_statistics(std=torch.zeros(14)), "divides dimension 0"),
        (
            _statistics(std=torch.ones(14).index_fill(0, torch.tensor(3), -1.0)),
            "divides dimension 3",
        ),
        (_statistics(mean=torch.full((14,), torch.nan)), "not finite"),
        (_statistics(mean=torch.full((14,), 1e30)), "exceeds 1e"),
        (_statistics(std=torch.ones(14, dtype=torch.int64)), "torch.int64"),
        (_statistics(std=torch.ones(2, 7)), r"it has \(2, 7\)"),
        (_statistics(std=torch.ones(7)), r"it has \(7,\)"),
        (_settings(norm_map={"STATE": "IDENTITY"}), "config.json has"),
        (_settings(features={}), "other features"),
        (_settings(normalize_observation_keys=[]), "only some keys"),
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
    make_policy: Any, tmp_path: Path, raw_observation: Any
) -> None:
    from ceed_vla.checkpoints import save
    from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors

    policy = make_policy()  # its configuration takes the number of words
    stats = {STATE: {"mean": torch.zeros(14), "std": torch.zeros(14)}}
    processors = make_ceed_vla_pre_post_processors(policy.config, stats, instructions=["put it"])
    _, pre, _ = load(save(tmp_path / "new", policy, *processors))
    assert pre({**raw_observation(), "task": "put it"})[STATE].abs().max() < 1e5


# ---- weights and scores --------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            lambda w: w.index_fill(0, torch.tensor(0), torch.nan),
            "head.weight has NaN or infinity",
        ),
        (
            lambda w: w.index_fill(0, torch.tensor(0), torch.inf),
            "head.weight has NaN or infinity",
        ),
        (torch.zeros_like, "head.weight is all zeros"),
        (lambda w: w.long(), "head.weight is of type I64"),
        (lambda w: w.bool(), "head.weight is of type BOOL"),
        (lambda w: w[:5].clone(), r"head.weight has shape \(5, 32\)"),
    ],
)
def test_weights_that_no_training_writes(
    folder: Path, value: Any, message: str, loader: Loader
) -> None:
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
