"""Unusable OpenVLA folders raise one clear error, and code in a folder never runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ceed_vla.backbones.openvla.folder import action_statistics
from ceed_vla.convert import ConvertConfig
from ceed_vla.convert.openvla import published_policy
from ceed_vla.errors import CeedVLAError, CheckpointError, ConfigError
from ceed_vla.weights import weight_files

CONFIG, INDEX = "config.json", "model.safetensors.index.json"


def build(folder: Path, **changes: Any) -> Any:
    return published_policy(ConvertConfig(str(folder), **{"unnorm_key": "kitchen", **changes}))


def rename_weight(folder: Path, old: str, new: str | None) -> None:
    weights = load_file(folder / "model.safetensors")
    tensor = weights.pop(old)
    save_file(weights | ({new: tensor} if new else {}), folder / "model.safetensors")


def shrink_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: weights[name][:-1].contiguous()}, folder / "model.safetensors")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def shard(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("model-*.safetensors"))))


HEAD = "language_model.lm_head.weight"
DAMAGES: dict[str, tuple[str, Callable[[Path, Any], Any], str]] = {
    "no config": ("siglip", lambda f, _: (f / CONFIG).unlink(), r"config\.json cannot be read"),
    "damaged config": (
        "siglip",
        lambda f, _: (f / CONFIG).write_text("{"),
        r"config\.json is not JSON",
    ),
    "config is a list": ("siglip", lambda f, _: (f / CONFIG).write_text("[]"), "holds a list"),
    "another model": (
        "siglip",
        lambda f, e: e(f / CONFIG, model_type="llava"),
        "model_type is 'llava'",
    ),
    "a checkpoint of ours": (
        "siglip",
        lambda f, e: e(f / CONFIG, model_type=None, type="ceed_vla"),
        "already a checkpoint of ceed-vla",
    ),
    "incomplete config": (
        "siglip",
        lambda f, _: (f / CONFIG).write_text('{"model_type": "openvla"}'),
        "lacks text_config, timm_model_ids, image_sizes;",
    ),
    "one tower of two": (
        "fused",
        lambda f, e: e(f / CONFIG, timm_model_ids=["vit_base_patch16_siglip_224"]),
        "timm_model_ids has 1 entries; use_fused_vision_backbone requires 2",
    ),
    "unknown tower": (
        "siglip",
        lambda f, e: e(f / CONFIG, timm_model_ids=["vit_enormous"]),
        "timm cannot build the vision tower 'vit_enormous'",
    ),
    "no transformer": (
        "siglip",
        lambda f, e: e(f / CONFIG, timm_model_ids=["resnet18"], timm_model_kwargs=[{}]),
        "resnet18",
    ),
    "language model without a usable cache": (
        "siglip",
        lambda f, e: e(f / CONFIG, text_config={"model_type": "mamba"}),
        "'mamba'; it must be one of llama, mistral",
    ),
    "vocabulary too small": (
        "siglip",
        lambda f, e: e(f / CONFIG, text_config={"model_type": "llama", "vocab_size": 128}),
        "256 action ids do not fit a vocabulary of 128",
    ),
    "no weights": (
        "siglip",
        lambda f, _: (f / "model.safetensors").unlink(),
        "has neither model.safetensors",
    ),
    "pickled weights": (
        "siglip",
        lambda f, _: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"only pytorch_model\.bin; pickled files can run code when they are read",
    ),
    "truncated weights": (
        "siglip",
        lambda f, _: truncate(f / "model.safetensors"),
        r"model\.safetensors do not load",
    ),
    "missing shard": (
        "fused",
        lambda f, _: shard(f).unlink(),
        r"lacks model-00001-of-00003\.safetensors",
    ),
    "truncated shard": (
        "fused",
        lambda f, _: truncate(shard(f)),
        r"model-00001-of-00003\.safetensors do not load",
    ),
    "index without shards": (
        "fused",
        lambda f, _: (f / INDEX).write_text('{"weight_map": {}}'),
        "lacks all shards",
    ),
    "shard that the index forgets": (
        "fused",
        lambda f, e: e(f / INDEX, weight_map={"a": shard(f).name}),
        r"lacks \d+ weights .*compared with config\.json",
    ),
    "missing weight": (
        "siglip",
        lambda f, _: rename_weight(f, HEAD, None),
        r"lacks 1 weights .*the first is language_model\.lm_head\.weight",
    ),
    "weights of another vocabulary": (
        "siglip",
        lambda f, _: shrink_weight(f, HEAD),
        r"lm_head\.weight has shape \(32063, 16\), but config\.json describes \(32064, 16\)",
    ),
    "no tokenizer": (
        "siglip",
        lambda f, _: (f / "tokenizer.json").unlink(),
        r"lacks tokenizer\.json",
    ),
    "damaged tokenizer": (
        "siglip",
        lambda f, _: (f / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json cannot be read",
    ),
    "tokenizer with more words than the model": (
        "siglip",
        lambda f, _: add_word(f, 40000),
        r"the tokenizer has ids up to 40000 .*vocab_size in config\.json is 32064",
    ),
    "no image settings": (
        "siglip",
        lambda f, _: (f / "preprocessor_config.json").unlink(),
        r"lacks preprocessor_config\.json",
    ),
    "images for other towers": (
        "siglip",
        lambda f, e: e(
            f / "preprocessor_config.json",
            input_sizes=[[3, 28, 28]] * 2,
            means=[[0.5] * 3] * 2,
            stds=[[0.5] * 3] * 2,
            interpolations=["bicubic"] * 2,
        ),
        r"makes images of \[\[28, 28\], \[28, 28\]\] pixels, "
        r"but the vision towers in config\.json read \[\[28, 28\]\]",
    ),
    "unknown strategy": (
        "siglip",
        lambda f, e: e(f / "preprocessor_config.json", image_resize_strategy="stretch"),
        "'stretch'; it must be one of resize-naive, letterbox, resize-crop",
    ),
    "masks of another action": (
        "siglip",
        lambda f, e: e(
            f / CONFIG,
            norm_stats={"kitchen": {"action": {"q01": [0], "q99": [1], "mask": [True] * 2}}},
        ),
        "the action statistics of kitchen have 1 values in q01, 1 in q99 and 2 in mask",
    ),
    "no statistics": (
        "siglip",
        lambda f, e: e(f / CONFIG, norm_stats=None),
        r"has neither norm_stats in config\.json nor dataset_statistics\.json",
    ),
    "values of another kind": (
        "siglip",
        lambda f, e: e(f / CONFIG, image_sizes=224),
        r"config\.json has a value of the wrong type",
    ),
    "unknown type of weights": (
        "siglip",
        lambda f, e: e(f / CONFIG, torch_dtype="float8"),
        "torch_dtype is 'float8'; choose float32, bfloat16, float16",
    ),
    "unknown interpolation": (
        "siglip",
        lambda f, e: e(f / "preprocessor_config.json", interpolations=["cubic"]),
        r"preprocessor_config\.json needs .*interpolations \(nearest, lanczos, bilinear, bicubic",
    ),
    "no mean for a tower": (
        "fused",
        lambda f, e: e(f / "preprocessor_config.json", means=[[0.5] * 3]),
        "needs input_sizes, .* one entry per vision tower",
    ),
    "images of another size than the towers see": (
        "siglip",
        lambda f, e: e(f / "preprocessor_config.json", input_sizes=[[3, 56, 56]]),
        r"makes images of \[\[56, 56\]\] pixels, "
        r"but the vision towers in config\.json read \[\[28, 28\]\]",
    ),
    "towers of two sizes": (
        "fused",
        lambda f, e: e(f / "preprocessor_config.json", input_sizes=[[3, 28, 28], [3, 42, 42]]),
        r"the vision towers read \[\[28, 28\], \[42, 42\]\] pixels; all must be equal",
    ),
    "statistics without quantiles": (
        "siglip",
        lambda f, e: e(f / CONFIG, norm_stats={"kitchen": {"action": {"q01": [0.0]}}}),
        r"config\.json: the action statistics of kitchen need q01 and q99, one number per "
        "dimension",
    ),
}


def add_word(folder: Path, number: int) -> None:
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"]["further"] = number
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_cannot_be_used_is_one_clear_error(
    damage: str, copied: Any, edit: Any
) -> None:
    kind, break_it, message = DAMAGES[damage]
    folder = copied(kind)
    break_it(folder, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        build(folder)
    assert str(folder) in str(caught.value) or "vision tower" in str(caught.value)


@pytest.mark.parametrize("path", ["", "nowhere", "openvla/openvla-7b"])
def test_a_wrong_folder(path: str) -> None:
    with pytest.raises(CheckpointError, match="it must be the local folder of a model"):
        build(Path(path) if path else Path("x" * 3))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("attic", r"unnorm_key is 'attic'; choose one of garage, kitchen \(.*config\.json\)"),
        ("", "statistics of 2 datasets; choose an unnorm_key: garage, kitchen"),
    ],
)
def test_statistics_are_chosen_by_name(key: str, message: str, published: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        build(published("siglip"), unnorm_key=key)


def test_a_single_data_set_needs_no_name_and_a_missing_mask_normalises_all(copied: Any) -> None:
    stats = {"only": {"action": {"q01": [0, 1], "q99": [1, 2]}}}
    assert action_statistics(copied(norm_stats=stats)) == (
        "only",
        {"q01": [0.0, 1.0], "q99": [1.0, 2.0], "mask": [True, True]},
    )


def test_statistics_of_a_fine_tune_count_first(copied: Any) -> None:
    folder = copied()
    own = {"kitchen": {"action": {"q01": [-7], "q99": [7]}}}
    (folder / "dataset_statistics.json").write_text(json.dumps(own))
    assert action_statistics(folder) == ("kitchen", {"q01": [-7.0], "q99": [7.0], "mask": [True]})
    # of the base, which still exists
    assert action_statistics(folder, "garage")[1]["q01"] == [
        -100.0,
        0.2,
        -1.0,
    ]
    with pytest.raises(
        ConfigError, match=r"'kitchn' \(did you mean kitchen\?\); choose one of garage, kitchen"
    ):
        action_statistics(folder, "kitchn")


@pytest.mark.parametrize(("most", "refused"), [(20, True), (100, False)])
def test_positions_that_depend_on_the_length_are_refused(
    most: int, refused: bool, copied: Any, edit: Any
) -> None:
    folder = copied()
    text = json.loads((folder / CONFIG).read_text())["text_config"]
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": most}
    edit(folder / CONFIG, text_config={**text, **scaling})
    policy, pre, _ = build(folder)
    batch = pre({"observation.images.front": torch.zeros(1, 3, 8, 8), "task": "open"})
    if not refused:
        assert torch.equal(policy.decode(batch, "ar").tokens, policy.decode(batch, "jacobi").tokens)
        return
    with pytest.raises(ConfigError, match=r"behind 20 .*\(dynamic\) .* a cache is invalid"):
        policy.decode(batch, "jacobi")


def test_positions_that_change_once_are_refused_where_they_do(copied: Any, edit: Any) -> None:
    folder = copied()
    text = json.loads((folder / CONFIG).read_text())["text_config"]
    heads = text["hidden_size"] // text["num_attention_heads"]
    factors = {"short_factor": [1.0] * (heads // 2), "long_factor": [3.0] * (heads // 2)}
    for most, refused in ((20, True), (100, False), (2, False)):
        rope = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            **factors,
            "original_max_position_embeddings": most,
        }
        edit(
            folder / CONFIG,
            text_config={**text, "rope_parameters": rope, "max_position_embeddings": 4096},
        )
        policy, pre, _ = build(folder)
        batch = pre({"observation.images.front": torch.zeros(1, 3, 8, 8), "task": "open"})
        if refused:
            with pytest.raises(
                ConfigError, match=r"behind 20 .*\(longrope\) .* a cache is invalid"
            ):
                policy.decode(batch, "jacobi")
        else:
            assert torch.equal(
                policy.decode(batch, "ar").tokens, policy.decode(batch, "jacobi").tokens
            )


def test_one_file_wins_over_an_index_that_was_left_behind(copied: Any) -> None:
    folder = copied()
    (folder / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_weights_are_converted_and_unknown_ones_refused(copied: Any) -> None:
    folder = copied()
    weights = {
        name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors")
    policy, _, _ = build(folder, dtype="float32")
    assert policy.backbone.projector.fc1.weight.dtype == torch.float32
    save_file({**weights, "action_head.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has 1 weights \(the first is action_head\.weight\)"
    ):
        build(folder, dtype="float32")


def test_a_tied_head_is_not_missing(copied: Any) -> None:
    folder = copied()
    config = json.loads((folder / CONFIG).read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (folder / CONFIG).write_text(json.dumps(config))
    rename_weight(folder, HEAD, None)
    language_model = build(folder)[0].backbone.language_model
    assert language_model.lm_head.weight is language_model.model.embed_tokens.weight


def test_settings_of_the_language_model_count(published: Any, copied: Any) -> None:
    text = {"model_type": "llama", "rope_theta": 77.0, "rms_norm_eps": 1e-3}
    known = json.loads((published("siglip") / CONFIG).read_text())["text_config"]
    config = build(copied("siglip", text_config={**known, **text}))[
        0
    ].backbone.language_model.config
    assert config.rope_parameters["rope_theta"] == 77
    assert config.rms_norm_eps == 1e-3


def test_nothing_in_a_folder_runs(copied: Any, tmp_path: Path) -> None:
    folder = copied()
    for name in ("modeling_prismatic", "configuration_prismatic", "processing_prismatic"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "auto_map" in json.loads((folder / CONFIG).read_text())
    build(folder)
    assert not (tmp_path / "ran").exists()
    assert not any("prismatic" in name for name in sys.modules)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of auto, float32"),
        ({"weights": "linked"}, "weights is 'linked'; it must be one of copied, reference"),
        ({"quantization": "2bit"}, "it must be one of none, 8bit, 4bit"),
        ({"quantization": "4bit"}, "quantised weights cannot be copied"),
        ({"quantization": "4bit", "weights": "reference"}, "needs a GPU"),
        ({"from_": "gpt"}, "from is 'gpt'; it must be one of openvla"),
        ({"vocabulary": "actions"}, "--vocabulary has no effect with --from openvla"),
        ({"from_": "pi0_fast", "dtype": "float16"}, "--dtype.* has no effect with --from pi0_fast"),
        ({"camera_size": "480,640"}, "camera_size is '480,640'; it must be HEIGHTxWIDTH"),
        ({"prompt": "Do it!"}, r"must contain \{instruction\}"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], message: str, published: Any) -> None:
    with pytest.raises(CeedVLAError, match=message):
        build(published("siglip"), **changes)
