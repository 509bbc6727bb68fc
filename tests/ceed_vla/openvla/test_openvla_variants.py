"""Variants of published folders, against the libraries that OpenVLA was published with.

`golden.json` contains the results of transformers 4.40.1 and timm 0.9.10 for the folders that
`VARIANTS` describes, with weights from numpy. They ran once, in float32, with OpenVLA's processor
and greedy decoding over all ids of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ceed_vla.verify import VerifyConfig, verify

GOLDEN = Path(__file__).parent / "golden.json"
DINO, SIGLIP, CLIP = (
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224.openai",
)
IN1K = "vit_large_patch16_224.augreg_in21k_ft_in1k"
FUSED = [DINO, SIGLIP]
TASKS = ["put the red cube on the plate", "Open the drawer"]
QUANTILES = {"q01": [-0.25, -0.5, -1.0], "q99": [0.75, -0.5, 2.0]}


def action(**more: Any) -> dict[str, Any]:
    return {"action": {**QUANTILES, **more}, "num_transitions": 10}


ONE = {"norm_stats": {"kitchen": action(mask=[True, True, False])}}
EXPANDED = {  # contradicts the short form, and has precedence
    "tvf_resize_params": [{"antialias": True, "interpolation": 2, "max_size": None, "size": 30}],
    "tvf_crop_params": [{"output_size": [28, 28]}],
    "tvf_normalize_params": [{"inplace": False, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}],
    "tvf_do_letterbox": True,
    "tvf_letterbox_fill": [10, 200, 90],
}
# folder settings (see write_folder), and what images and decoding are: size, chunk, unnorm_key,
# tokenizer, files
VARIANTS: dict[str, dict[str, Any]] = {
    "letterbox": {
        "towers": FUSED,
        "pixels": {"image_resize_strategy": "letterbox"},
        "size": (40, 64),
    },
    "letterbox tall": {
        "towers": FUSED,
        "pixels": {"image_resize_strategy": "letterbox"},
        "size": (57, 40),
    },
    "resize-crop": {
        "towers": FUSED,
        "pixels": {
            "image_resize_strategy": "resize-crop",
            "interpolations": ["lanczos", "bilinear"],
        },
        "size": (60, 44),
    },
    "expanded transforms": {"pixels": EXPANDED, "size": (40, 64)},
    "images of another size": {"size": (120, 20)},
    "CLIP": {"towers": [CLIP]},
    "DINOv2": {"towers": [DINO]},
    "DINOv2 and CLIP": {"towers": [DINO, CLIP]},
    "ImageNet": {"towers": [IN1K]},
    "larger towers": {"image_sizes": [42], "pixels": {"input_sizes": [[3, 42, 42]]}},
    "own key heads": {"text": {"num_key_value_heads": 4, "rms_norm_eps": 1e-3, "rope_theta": 77.0}},
    "tied head": {"text": {"tie_word_embeddings": True}},
    "scaled positions": {"text": {"rope_scaling": {"type": "linear", "factor": 4.0}}},
    "biases": {"text": {"attention_bias": True}},
    "Mistral": {"text": {"model_type": "mistral"}, "llm_backbone_id": "mistral-v0.1-7b-pure"},
    "bfloat16 shards": {"towers": FUSED, "torch_dtype": "bfloat16", "shards": 3},
    "float16": {"torch_dtype": "float16"},
    "no mask": {"norm_stats": {"kitchen": action()}},
    "mask in the middle": {"norm_stats": {"kitchen": action(mask=[True, False, True])}},
    "several data sets": {
        "norm_stats": {"attic": {"action": {"q01": [0.0], "q99": [9.0]}}, "kitchen": action()}
    },
    "statistics of a fine-tune": {
        "norm_stats": {"attic": {"action": {"q01": [0.0], "q99": [9.0]}}},
        "files": {"dataset_statistics.json": {"kitchen": action(mask=[True, True, False])}},
    },
    "one action": {"chunk": 1},
    "eight actions": {"chunk": 8},
    "128 bins": {"n_action_bins": 128},
    "Llama tokenizer": {"tokenizer": "json"},
    "Llama tokenizer, older file": {"tokenizer": "model"},
    "end token": {
        "tokenizer": "json",
        "files": {
            "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}
        },
    },
    "Vicuna's prompt": {"tokenizer": "json", "llm_backbone_id": "vicuna-v15-7b"},
}


def write_variant(folder: Path, name: str, write_folder: Callable[..., Path]) -> tuple[int, str]:
    """Write a variant's folder with its images; returns the actions of a chunk and the name of the
    dataset.
    """
    settings = {
        "towers": [SIGLIP],
        "chunk": 3,
        "size": (40, 48),
        "tokenizer": "words",
        "files": {},
        **ONE,
    }
    settings |= VARIANTS[name]
    chunk, (height, width), kind, files = (
        settings.pop(key) for key in ("chunk", "size", "tokenizer", "files")
    )
    write_folder(folder, **settings)
    if kind != "words":
        write_llama_tokenizer(folder, kind)
    for file, values in files.items():
        (folder / file).write_text(json.dumps(values))
    random = np.random.default_rng(0)
    coarse = random.integers(
        0, 256, (len(TASKS), height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8
    )
    np.savez(
        folder / "images.npz", images=coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]
    )
    return chunk, "kitchen"


def write_llama_tokenizer(folder: Path, kind: str) -> None:
    """A byte-pair tokenizer like Llama's, as tokenizer.json or as tokenizer.model."""
    letters = [chr(c) for c in range(97, 123)] + list("▁WOI?.,:")
    merges = [
        ("t", "h"),
        ("▁", "th"),
        ("▁th", "e"),
        ("o", "t"),
        ("b", "ot"),
        ("▁", "a"),
        ("c", "t"),
        ("i", "o"),
        ("io", "n"),
        ("▁a", "ct"),
        ("▁act", "ion"),
        ("r", "o"),
        ("▁", "ro"),
        ("▁ro", "bot"),
    ]
    joined = [left + right for left, right in merges]
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *joined,
        *letters,
    ]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    if kind == "model":
        from sentencepiece import sentencepiece_model_pb2 as proto

        model = proto.ModelProto()
        model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
        model.normalizer_spec.name, model.normalizer_spec.add_dummy_prefix = "identity", True
        model.normalizer_spec.remove_extra_whitespaces = False
        for i, piece in enumerate(pieces):
            role = {0: 2, 1: 3, 2: 3}.get(i, 6 if i < 259 else 1)  # unknown, control, byte, normal
            model.pieces.add(piece=piece, score=0.0 if i < 259 else 258.0 - i, type=role)
        (folder / "tokenizer.model").write_bytes(model.SerializeToString())
        return
    from tokenizers import Tokenizer, models, normalizers

    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    values = json.loads(tokenizer.to_str())
    values["model"]["merges"] = [" ".join(pair) for pair in merges]  # spelling of older files
    (folder / "tokenizer.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_equals_the_published_libraries(
    name: str, write_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chunk, key = write_variant(tmp_path / "folder", name, write_folder)
    cases = json.loads(GOLDEN.read_text())[name]
    expected = {"unnorm_key": key, "chunk": chunk, "cases": cases}
    (tmp_path / "folder" / "expected.json").write_text(json.dumps(expected))
    assert len({tuple(case["action_tokens"]) for case in cases}) == len(TASKS)  # the inputs matter
    try:
        assert verify(VerifyConfig(str(tmp_path / "folder"))) == "all 2 cases equal the reference"
    except Exception:
        print(capsys.readouterr().out)
        raise


def test_both_files_of_a_llama_tokenizer_are_one_tokenizer(
    write_folder: Any, tmp_path: Path
) -> None:
    from ceed_vla.backbones.openvla.tokenizer import read_tokenizer

    found = []
    for kind in ("json", "model"):
        write_variant(tmp_path / kind, "one action", write_folder)
        write_llama_tokenizer(tmp_path / kind, kind)
        found.append(read_tokenizer(tmp_path / kind))
    for text in (
        "In: What action should the robot take to open?\nOut:",
        " the  robot",
        "ünïcode",
        "",
    ):
        assert found[0](text) == found[1](text), text
    assert found[0].size == found[1].size
