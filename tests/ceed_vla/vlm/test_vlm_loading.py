"""Model folders: refused folders and their messages; code in a folder never runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES

from ceed_vla.backbones.vlm.config import VLMConfig
from ceed_vla.backbones.vlm.loading import (
    architecture,
    build_model,
    check_decoding,
    choose_action_ids,
    load_model,
)
from ceed_vla.backbones.vlm.model import IDS_KEY, MASK_KEY, STATE_KEY, VLMBackbone
from ceed_vla.backbones.vlm.processor import load_processor
from ceed_vla.errors import CheckpointError, ConfigError, ObservationError
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from tests.helpers.tabletop import tabletop_config


def load(folder: Path) -> Any:
    return load_model(folder, torch.float32, "sdpa")


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def copy(base: Any, tmp_path: Path) -> Path:
    """A copy of a model's folder, which tests change."""
    return shutil.copytree(base("smolvlm"), tmp_path / "copy")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_rebuilt_from_its_architecture(family: str, base: Any) -> None:
    model = load(base(family))
    again = build_model(architecture(model), torch.float32, "sdpa")
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert architecture(again) == architecture(model)


def test_sharded_weights_are_read(copy: Path) -> None:
    whole = load(copy).state_dict()
    (copy / "model.safetensors").unlink()
    model = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.from_pretrained(copy)
    )
    model.load_state_dict(whole)
    model.save_pretrained(copy, max_shard_size="100KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 2
    assert all(torch.equal(load(copy).state_dict()[name], tensor) for name, tensor in whole.items())
    lost = sorted(copy.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(
        CheckpointError, match=f"lacks {lost.name}, which model.safetensors.index.json names"
    ):
        load(copy)


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "must be the local folder"), (".", r"config\.json cannot be read")],
)
def test_folders_that_hold_no_model(path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / path)


def test_another_kind_of_model(copy: Path) -> None:
    change_json(copy / "config.json", model_type="llama")
    with pytest.raises(CheckpointError, match=r"model_type 'llama'.*llava, .*qwen2_5_vl"):
        load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        load(copy)


def test_code_in_a_folder_is_never_run(copy: Path, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    for name in ("configuration_own", "modeling_own", "processing_own"):
        (copy / f"{name}.py").write_text(f"open({str(proof)!r}, 'w').close()\n")
    own = {"AutoConfig": "configuration_own.C", "AutoModelForImageTextToText": "modeling_own.M"}
    change_json(copy / "config.json", auto_map=own)
    load(copy)  # a known type uses the library's class
    change_json(copy / "config.json", model_type="own")
    with pytest.raises(CheckpointError, match=r"its own code .auto_map., which is never run"):
        load(copy)
    for file in ("processor_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (copy / file).is_file():
            change_json(
                copy / file, auto_map={"AutoProcessor": "processing_own.P"}, processor_class="P"
            )
    with pytest.raises(CheckpointError, match="Code from a checkpoint is never run"):
        load_processor(copy)
    assert not proof.exists()


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin; pickled files can run code"):
        load(copy)


def test_other_files_than_the_validated_ones_are_not_read(copy: Path) -> None:
    config = (copy / "config.json").read_text()
    direct = {"transformers_weights": "adapter_model.bin"}
    mapped = {"attribute_map": {"transformers_weights": "mine"}, "mine": "adapter_model.bin"}
    for changes in (direct, mapped):
        change_json(copy / "config.json", **changes)
        with pytest.raises(CheckpointError, match="transformers_weights"):
            load(copy)
        (copy / "config.json").write_text(config)
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has adapters"):
        load(copy)


def test_the_default_of_several_chat_templates_is_used(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    (copy / "additional_chat_templates").mkdir()
    for name in ("default", "tool_use"):
        place = copy if name == "default" else copy / "additional_chat_templates"
        file = place / ("chat_template.jinja" if name == "default" else f"{name}.jinja")
        file.write_text(f"{name}: {{{{ messages[0]['content'] }}}}")
    processor = load_processor(copy)
    assert processor.chat_template.startswith("default: ")
    (copy / "chat_template.jinja").unlink()
    (copy / "additional_chat_templates" / "rag.jinja").write_text("rag")
    with pytest.raises(CheckpointError, match="has the chat templates rag, tool_use; name the one"):
        load_processor(copy)
    processor.save_pretrained(copy / "again")
    assert all(file.is_file() for file in (copy / "again").iterdir())


def test_damaged_and_missing_weights(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    rest = {k: v for k, v in weights.items() if k != name}
    save_file(rest, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 weights are missing"):
        load(copy)
    save_file(
        {**weights, name: weights[name][:3]}, copy / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="mismatch"):
        load(copy)
    (copy / "model.safetensors").write_bytes(b"\x00" * 32)
    with pytest.raises(CheckpointError, match="do not load"):
        load(copy)


def test_a_folder_without_processor(copy: Path) -> None:
    (copy / "processor_config.json").unlink(missing_ok=True)
    (copy / "preprocessor_config.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no processor"):
        load_processor(copy)


# ---- vocabulary ----------------------------------------------------------------------------------


def test_action_ids_avoid_what_has_a_meaning(base: Any) -> None:
    for family in FAMILIES:
        model, processor = load(base(family)), load_processor(base(family))
        last = choose_action_ids(model, processor, "last", 255)
        special = set(processor.tokenizer.all_special_ids) | {processor.image_token_id}
        assert len(set(last)) == 255
        assert not special & set(last)
        assert choose_action_ids(model, processor, "last_reversed", 255) == last[::-1]
        added = choose_action_ids(model, processor, "added", 255)
        assert added[0] == len(processor.tokenizer)
        assert model.get_input_embeddings().num_embeddings == added[-1] + 1
        assert len(model.get_output_embeddings().weight) == added[-1] + 1


def test_tokenizer_and_model_that_disagree(copy: Path) -> None:
    model, processor = load(copy), load_processor(copy)
    processor.tokenizer.add_tokens([f"<new{i}>" for i in range(20)])
    with pytest.raises(
        ConfigError,
        match=r"copy: the tokenizer has ids up to \d+, but the model's embedding has \d+ rows",
    ):
        choose_action_ids(model, processor, "last", 255)
    processor = load_processor(copy)
    processor.image_token_id += 1
    with pytest.raises(ConfigError, match="copy: the image token is"):
        choose_action_ids(model, processor, "last", 255)


def test_a_vocabulary_that_is_too_small(copy: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Lower num_bins or set --policy.backbone.action_ids=added"
    ):
        choose_action_ids(load(copy), load_processor(copy), "last", 2000)


@pytest.mark.parametrize("ids", [[], [0, 0], [-1, 3], [0, 10**6]])
def test_action_ids_outside_the_vocabulary(ids: list[int], copy: Path) -> None:
    with pytest.raises(ConfigError, match="action ids"):
        VLMBackbone(load(copy), ids, 14)


# ---- unsupported models --------------------------------------------------------------------------


TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_a_model_without_a_usable_cache() -> None:
    text = {
        "model_type": "lfm2",
        "vocab_size": 900,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    }
    config = transformers.AutoConfig.for_model(
        "lfm2_vl",
        text_config={
            **TINY,
            **text,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        vision_config={**TINY, "model_type": "siglip2_vision_model"},
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(
        ConfigError, match="Jacobi decoding needs a causal language model with attention"
    ):
        check_decoding(VLMBackbone(model, range(100, 200), 14))


def test_a_head_that_is_more_than_a_matrix(base: Any) -> None:
    model = load(base("llava"))
    backbone = VLMBackbone(model, range(400, 500), 14)
    check_decoding(backbone)
    model.lm_head.register_forward_hook(lambda module, args, logits: 30 * torch.tanh(logits / 30))
    real = model.get_output_embeddings
    plain = torch.nn.Linear(64, model.config.text_config.vocab_size, bias=False)
    plain.weight = real().weight
    model.get_output_embeddings = lambda: plain
    with pytest.raises(ConfigError, match="soft cap"):
        check_decoding(backbone)


def test_a_model_of_another_build() -> None:
    text = {**TINY, "model_type": "opt", "ffn_dim": 16, "vocab_size": 300}
    config = transformers.Blip2Config(vision_config=TINY, qformer_config=TINY, text_config=text)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ConfigError, match="use LLaVA"):
        VLMBackbone(model, range(100), 14)


# ---- settings and observations -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cameras": "mosaic"}, "separate, stacked"),
        ({"proprio": "tokens"}, "text, projected, none"),
        ({"action_ids": "first"}, "last, last_reversed, added"),
        ({"dtype": "int8"}, "float32, bfloat16, float16"),
        ({"prompt": "do it"}, "must contain {instruction}"),
        ({"prompt": "{instruction} {state}"}, "no other field"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VLMConfig(**settings)


def test_a_policy_without_path() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.path is empty"):
        CeedVLAPolicy(tabletop_config(backbone=VLMConfig()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({IDS_KEY: None}, "lacks 'observation.vlm.input_ids'"),
        ({"observation.vlm.pixel_values": None}, "lacks observation.vlm.pixel_values"),
        ({STATE_KEY: None}, "lacks 'observation.state'"),
        ({STATE_KEY: torch.zeros(2, 4)}, r"expected \(B, 5\)"),
        ({STATE_KEY: torch.full((2, 5), torch.nan)}, "not finite"),
        ({MASK_KEY: torch.zeros(2, 7, dtype=torch.long)}, "left padding"),
    ],
)
def test_batches_that_are_refused(
    changes: dict[str, Any], message: str, backbone: Any, observe: Any
) -> None:
    model, step = backbone("smolvlm", state_dim=5)
    batch = {**observe(step, 2), **changes}
    with pytest.raises(ObservationError, match=message):
        model.check_observation({key: value for key, value in batch.items() if value is not None})


def test_a_processor_of_another_model(backbone: Any, observe: Any) -> None:
    model, _ = backbone("smolvlm")
    _, step = backbone("llava")
    with pytest.raises(ObservationError, match="cannot read the observation"):
        model.prefill(observe(step, 2))
