"""A language model behind camera stems: exactness, checkpoints, stems, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ceed_vla import CeedVLAPolicy
from ceed_vla.axes.depth.exits import make_exits
from ceed_vla.axes.programs.router import ProgramRouter
from ceed_vla.backbones.check import check_backbone
from ceed_vla.backbones.language.config import LanguageConfig
from ceed_vla.backbones.language.stems import WORDS_KEY, StemConfig
from ceed_vla.checkpoints import load, resolve_checkpoint, save
from ceed_vla.errors import CheckpointError, ConfigError, ObservationError
from ceed_vla.processor_ceed_vla import make_ceed_vla_pre_post_processors
from tests.helpers.tabletop import tabletop_config
from tests.helpers.tiny_language_models import make_tiny_language_model

TASKS = ["put the red cube on the blue plate", "push the red cube", "stack the blue cube"]
STATE = {"mean": torch.zeros(14), "std": torch.ones(14)}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_language_model(tmp_path_factory.mktemp("language"))


def make_policy(folder: Path, **changes: Any) -> tuple[CeedVLAPolicy, Any, Any]:
    backbone = LanguageConfig(path=str(folder), **changes)
    config = tabletop_config(backbone=backbone, auxiliary_scale=[], chunk_size=3, n_action_steps=2)
    torch.manual_seed(0)
    policy = CeedVLAPolicy(config).eval()
    processors = make_ceed_vla_pre_post_processors(
        config, {"observation.state": dict(STATE)}, instructions=TASKS
    )
    with torch.no_grad():  # so that every token depends on those before it
        policy.backbone.action_tokens.weight *= 3
        policy.backbone.head.weight *= 10
    return policy, *processors


def observed(policy: CeedVLAPolicy, pre: Any, tasks: list[str]) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    images = {
        camera: torch.rand(len(tasks), 3, 96, 96, generator=random)
        for camera in policy.config.cameras
    }
    state = torch.randn(len(tasks), 14, generator=random)
    return pre({**images, "observation.state": state, "task": tasks})  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("gemma", {"head_dim": 8}),  # which scales its embeddings
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        ),
    ],
)
def test_all_routes_give_the_same_tokens(
    kind: str,
    changes: dict[str, Any],
    tmp_path: Path,
    keeps_the_contract: Callable[[Any, dict[str, Any]], None],
) -> None:
    folder = make_tiny_language_model(tmp_path / "model", kind, **changes)
    policy, pre, _ = make_policy(folder)
    batch = observed(policy, pre, TASKS)  # prompts of different lengths
    assert check_backbone(policy.backbone, batch, action_dim=7, guesses=2) > 0
    keeps_the_contract(policy.backbone, batch)


def test_a_checkpoint_needs_no_other_folder(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    policy, pre, post = make_policy(folder)
    expected = policy.decode(observed(policy, pre, TASKS), "ar").tokens
    save(tmp_path / "checkpoint", policy, pre, post)
    shutil.rmtree(folder)
    again, pre, _ = load(tmp_path / "checkpoint")
    assert torch.equal(again.decode(observed(again, pre, TASKS), "ar").tokens, expected)


def test_own_layers_of_exits_are_counted_in_the_prefix(model_folder: Path) -> None:
    policy, pre, _ = make_policy(model_folder)
    batch = observed(policy, pre, TASKS)
    layers = policy.backbone.num_layers
    for kind, more in (("linear", 0), ("layer", 1)):
        policy.backbone.exits = make_exits(policy.backbone, [1], kind)
        assert policy.decode(batch, "cap1").prefix_layers.tolist() == [layers + more] * len(TASKS)


def test_a_router_chooses_the_layers_and_stays_with_the_checkpoint(
    model_folder: Path, tmp_path: Path
) -> None:
    policy, pre, post = make_policy(model_folder)
    layers = tuple(range(policy.backbone.num_layers))
    router = ProgramRouter(policy.backbone.exit_parts()[2], [layers, layers[1:]])
    router.requires_grad_(False).score.bias[1] = 1.0
    policy.backbone.router = (router,)
    save(tmp_path / "checkpoint", policy, pre, post)
    again, pre, _ = load(tmp_path / "checkpoint")
    batch = observed(again, pre, TASKS)
    found = again.decode(batch, "route0_cap2")
    assert found.layer_forwards.tolist() == [len(layers) - 1] * len(TASKS)
    assert torch.equal(found.tokens, policy.decode(batch, "skip0p0_cap2").tokens)
    assert not torch.equal(found.tokens, policy.decode(batch, "cap1").tokens)
    exact = policy.decode(batch, "ar").tokens
    assert torch.equal(policy.decode(batch, "program1-0-1").tokens, exact)


def test_a_checkpoint_may_refer_to_the_model(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)  # loading must not depend on the working directory
    policy, pre, post = make_policy(Path(model_folder.name), weights="reference")
    monkeypatch.undo()
    policy.requires_grad_(False)
    save(tmp_path / "checkpoint", policy, pre, post)
    again, pre, _ = load(tmp_path / "checkpoint")
    batch = observed(again, pre, TASKS)
    assert torch.equal(again.decode(batch, "ar").tokens, policy.decode(batch, "ar").tokens)
    layers = list(again.backbone.language_model.layers.parameters())
    whole = sum(p.numel() * 4 for p in layers)
    save(tmp_path / "copied", *make_policy(model_folder))
    sizes = [
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("checkpoint", "copied")
    ]
    assert sizes[1] - sizes[0] >= whole


def test_one_instruction_holds_for_all_rows(model_folder: Path) -> None:
    policy, pre, _ = make_policy(model_folder)
    one, many = (observed(policy, pre, [TASKS[1]] * 2), observed(policy, pre, TASKS[:2]))
    images = {name: many[name] for name in policy.config.cameras}
    state = torch.randn(2, 14, generator=torch.Generator().manual_seed(1))
    found = pre({**images, "observation.state": state, "task": TASKS[1]})
    for name in ("observation.language.tokens", WORDS_KEY):
        assert torch.equal(found[name], one[name])
    policy.check_observation(found)


def test_cameras_may_have_any_name(model_folder: Path, tmp_path: Path) -> None:
    from lerobot.configs import FeatureType, PolicyFeature

    camera = {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96))}
    state = {"observation.state": PolicyFeature(FeatureType.STATE, (14,))}
    compact = tabletop_config(auxiliary_scale=[], input_features={**camera, **state})
    processors = make_ceed_vla_pre_post_processors(
        compact, {"observation.state": dict(STATE)}, instructions=TASKS
    )
    save(tmp_path / "compact", CeedVLAPolicy(compact), *processors)
    backbone = LanguageConfig(
        path=str(model_folder), stems=StemConfig(path=str(tmp_path / "compact"))
    )
    config = tabletop_config(
        backbone=backbone, auxiliary_scale=[], input_features={**camera, **state}
    )
    assert CeedVLAPolicy(config).backbone.stems.cameras == ("observation.image",)


def test_the_stems_are_those_of_the_other_policy(model_folder: Path) -> None:
    policy, pre, _ = make_policy(model_folder)
    batch = observed(policy, pre, TASKS)
    teacher, _, _ = load("teacher")
    words = batch[WORDS_KEY]
    codes = teacher.backbone.word_codes(words).flatten(1)
    for camera, stem in zip(teacher.backbone.cameras, teacher.backbone.stems, strict=True):
        (found,) = policy.backbone.stems(camera, batch[camera], words)
        assert torch.equal(found, stem(batch[camera] * 2 - 1, codes))
    assert not any(p.requires_grad for p in policy.backbone.stems.parameters())
    learnt = policy.backbone.distillation_parameters()
    assert {name.partition(".")[0] for name in learnt} == {
        "language_model",
        "action_tokens",
        "head",
    }
    assert not [name for name in learnt if "embed_tokens" in name]


def test_its_images_can_be_dropped(model_folder: Path) -> None:
    policy, pre, _ = make_policy(model_folder)
    embeddings = policy.backbone.embed_prefix(observed(policy, pre, TASKS))
    _, may_go, stays = policy.backbone.prefix_tokens(embeddings)
    assert may_go.sum(1).tolist() == [2 * 17] * 3
    assert (may_go | stays).sum(1).tolist() == embeddings.real.sum(1).tolist()


def test_every_place_of_the_features_can_be_a_patch(model_folder: Path, tmp_path: Path) -> None:
    policy, pre, post = make_policy(model_folder, stems=StemConfig(patches="features"))
    batch = observed(policy, pre, TASKS[:1])
    embeddings = policy.backbone.embed_prefix(batch)
    assert int(policy.backbone.prefix_tokens(embeddings)[1].sum()) == 2 * (12**2 + 1)
    assert check_backbone(policy.backbone, batch, action_dim=7, guesses=1) > 0
    save(tmp_path / "checkpoint", policy, pre, post)
    again = load(tmp_path / "checkpoint")[0]
    assert torch.equal(again.decode(batch, "ar").tokens, policy.decode(batch, "ar").tokens)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # the second lists the types of its layers
def test_only_the_first_layers(kind: str, model_folder: Path, tmp_path: Path) -> None:
    folder = make_tiny_language_model(tmp_path / "model", kind)
    policy, pre, post = make_policy(folder, layers=2)
    assert policy.backbone.num_layers == 2
    save(tmp_path / "checkpoint", policy, pre, post)
    assert load(tmp_path / "checkpoint")[0].backbone.num_layers == 2
    with pytest.raises(ConfigError, match=r"backbone.layers is 9; .* has 4 layers"):
        make_policy(model_folder, layers=9)


def test_what_does_not_fit_is_refused(model_folder: Path, tmp_path: Path) -> None:
    policy, pre, _ = make_policy(model_folder)
    with pytest.raises(ConfigError, match="do not know the words fridge, open"):
        policy.config.backbone.processor_steps(policy.config.shape, ["open the fridge"])
    with pytest.raises(CheckpointError, match="it must be the local folder of a model"):
        make_policy(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    shutil.copy(model_folder / "model.safetensors", tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        make_policy(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        make_policy(tmp_path / "empty")
    other = tmp_path / "other"
    shutil.copytree(resolve_checkpoint("teacher"), other)
    config = json.loads((other / "config.json").read_text())
    config["backbone"]["type"] = "vlm"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="it must be a compact policy"):
        make_policy(model_folder, stems=StemConfig(path=str(other)))
    batch = observed(policy, pre, TASKS)
    for name, value in (
        (WORDS_KEY, batch[WORDS_KEY][:, :5]),
        (
            "observation.language.attention_mask",
            batch["observation.language.attention_mask"][:, 1:],
        ),
        ("observation.state", batch["observation.state"] * torch.nan),
        ("observation.images.wrist", None),
    ):
        with pytest.raises(ObservationError, match=name):
            policy.decode({**batch, name: value})


def test_a_model_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    folder = make_tiny_language_model(tmp_path / "gpt2", "gpt2", n_layer=1, n_embd=32, n_head=2)
    with pytest.raises(ConfigError, match="GPT2Model has no `layers`"):
        make_policy(folder)
    other = make_tiny_language_model(tmp_path / "bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=900, intermediate_size=32, **sizes))
    bert.save_pretrained(other)
    with pytest.raises(ConfigError, match="BertModel has no `layers`"):
        make_policy(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem_channels": []}, "exactly 4 numbers"),
        ({"stem_channels": [31, 62, 95, 127]}, "multiple of 4"),
        ({"image_size": 8, "image_grid": 64}, "not a multiple of"),
        ({"words": 65536, "width": 4096}, "belong to different models"),
        ({"stem_channels": [32, 64, 1024, 1024]}, "belong to different models"),
        ({"words": 10**7}, "must be a whole number in"),
    ],
)
def test_damaged_stems_are_refused_before_they_are_built(
    changes: dict[str, Any],
    message: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save(tmp_path / "checkpoint", *make_policy(model_folder))
    values = json.loads((folder / "config.json").read_text())
    values["backbone"]["stems"] |= changes
    values["sealed"] = False
    (folder / "manifest.json").unlink()
    (folder / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr(LanguageConfig, "build", lambda *_: pytest.fail("is built"))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_adapters_leave_what_is_new_trainable(model_folder: Path) -> None:
    pytest.importorskip("peft")
    from ceed_vla.training.adapters import LoRAConfig, attach

    policy, _, _ = make_policy(model_folder)
    attach(policy, LoRAConfig(rank=2))
    learn = {
        name.partition(".")[0] for name, p in policy.backbone.named_parameters() if p.requires_grad
    }
    assert learn == {"project", "state", "action_tokens", "head", "language_model"}


def test_other_cameras_are_refused(model_folder: Path) -> None:
    from lerobot.configs import FeatureType, PolicyFeature

    config = tabletop_config(backbone=LanguageConfig(path=str(model_folder)), auxiliary_scale=[])
    config.input_features["observation.images.top"] = PolicyFeature(FeatureType.VISUAL, (3, 96, 96))
    with pytest.raises(ConfigError, match="the cameras must be the same"):
        CeedVLAPolicy(config)


def test_weights_that_are_missing(model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp" in name)
    weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 weights are missing"):
        make_policy(folder)
