"""Images, prompts and tokenizers become OpenVLA's inputs; other observations are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ceed_vla.backbones.openvla.inputs import EMPTY_TOKEN, OpenVLAInputsStep
from ceed_vla.backbones.openvla.tokenizer import read_tokenizer
from ceed_vla.convert import ConvertConfig
from ceed_vla.convert.openvla import published_policy
from ceed_vla.errors import ObservationError

FRONT = "observation.images.front"
IDS, MASK = "observation.openvla.input_ids", "observation.openvla.attention_mask"
PIXELS = "observation.openvla.pixel_values"


@pytest.fixture(scope="module")
def model(published: Any) -> tuple[Any, Any]:
    policy, pre, _ = published_policy(ConvertConfig(str(published("siglip")), unnorm_key="kitchen"))
    return policy, pre


@pytest.mark.parametrize("strategy", ["resize-naive", "letterbox", "resize-crop"])
@pytest.mark.parametrize("shape", [(40, 48), (48, 40), (28, 28), (10, 200)])
def test_pixels_equal_pillow_and_numpy(
    strategy: str, shape: tuple[int, int], copied: Any, edit: Any, reference_pixels: Any
) -> None:
    folder = copied("fused")
    edit(folder / "preprocessor_config.json", image_resize_strategy=strategy)
    step = OpenVLAInputsStep().read_folder(str(folder))
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0)
    for given in (image, image.float() / 255):
        step._current_transition = {"complementary_data": {"task": "open"}}  # type: ignore[typeddict-item]
        pixels = step.observation({FRONT: given})[PIXELS]
        assert pixels.shape == (1, 6, 28, 28)
        torch.testing.assert_close(pixels[0], reference_pixels(picture, folder), atol=1e-6, rtol=0)


def test_prompts_are_padded_on_the_left(model: tuple[Any, Any]) -> None:
    image = torch.zeros(2, 3, 8, 8)
    batch = model[1]({FRONT: image, "task": ["Open the drawer", "open"]})
    ids, mask = batch[IDS], batch[MASK]
    assert ids.shape == mask.shape == (2, 17)
    assert mask.sum(1).tolist() == [17, 15]
    words = json.loads((Path(model[0].config.backbone.path) / "tokenizer.json").read_text())[
        "model"
    ]["vocab"]
    text = [
        "<s>",
        "In",
        ":",
        "What",
        "action",
        "should",
        "the",
        "robot",
        "take",
        "to",
        "open",
        "?",
        "Out",
        ":",
    ]
    assert ids[1][2:].tolist() == [*(words[word] for word in text), EMPTY_TOKEN]
    one = model[1]({FRONT: image, "task": "open"})  # one instruction for the whole batch
    assert one[IDS].tolist() == [ids[1][2:].tolist()] * 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, [1, 3]),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": True}, [1, 3, 2]),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, [3]),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "</s>"}}, [2, 3]),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}, [1, 3]),
    ],
)
def test_llama_tokenizers_mark_beginning_and_end_by_their_settings(
    settings: dict[str, Any], expected: list[int], copied: Any
) -> None:
    folder = copied()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_tokenizer(folder)("In") == expected


BAD: dict[str, tuple[Any, str]] = {
    "missing": (None, f"lacks '{FRONT}'"),
    "grayscale": (torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\); expected RGB images"),
    "with alpha": (torch.zeros(1, 4, 8, 8), "expected RGB images"),
    "channels last": (torch.zeros(1, 8, 8, 3), "expected RGB images"),
    "empty": (torch.zeros(1, 3, 0, 8), "expected RGB images"),
    "0 to 255": (torch.full((1, 3, 8, 8), 255.0), "from 255 to 255; images must be in"),
    "normalised": (torch.full((1, 3, 8, 8), -0.5), "images must be in"),
    "NaN": (torch.full((1, 3, 8, 8), float("nan")), "images must be in"),
    "int64": (
        torch.zeros(1, 3, 8, 8, dtype=torch.int64),
        r"int64; images must be floats in \[0, 1\] or uint8",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_image_that_cannot_be_read(kind: str, model: tuple[Any, Any]) -> None:
    image, message = BAD[kind]
    observation = {"observation.state": torch.zeros(1, 2)} if image is None else {FRONT: image}
    with pytest.raises(ObservationError, match=message):
        model[1]({**observation, "task": "open"})


@pytest.mark.parametrize("task", ["", "  ", ["open", "close"]])
def test_an_instruction_that_cannot_be_read(task: Any, model: tuple[Any, Any]) -> None:
    with pytest.raises(ObservationError, match="for 1 rows; pass 'task'"):
        model[1]({FRONT: torch.zeros(1, 3, 8, 8), "task": task})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop(PIXELS), "lacks 'observation.openvla.pixel_values'"),
        (lambda b: b.update({PIXELS: torch.zeros(1, 6, 28, 28)}), r"expected \(B, 3, any, any\)"),
        (lambda b: b.update({IDS: b[IDS][:, 1:]}), "does not mark left padding"),
        (
            lambda b: b.update({MASK: b[MASK].flip(1) * 0}),
            "every prompt must end in the last column",
        ),
    ],
)
def test_a_batch_that_was_not_pre_processed(
    change: Any, message: str, model: tuple[Any, Any]
) -> None:
    batch = model[1]({FRONT: torch.zeros(1, 3, 8, 8), "task": "open"})
    change(batch)
    with pytest.raises(ObservationError, match=message):
        model[0].decode(batch, "ar")
