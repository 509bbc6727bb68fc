"""Processors (tokenizer and image processor) of image-text-to-text models; code in a folder never
runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ceed_vla.backbones.transformers.step_files import LOCAL
from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.files import read_json
from ceed_vla.limited.tokenizers import check_tokenizers

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
LARGEST_SIDE = 8192
MOST_PIXELS = 2**25
# Settings of image processors that determine the size of their output.
_SIDES = (
    "height",
    "width",
    "shortest_edge",
    "longest_edge",
    "min_pixels",
    "max_pixels",
    "size",
    "crop_size",
)
_PATCHES = ("patch_size", "merge_size", "temporal_patch_size", "max_image_tiles", "max_num_crops")
_TOKENS = ("num_additional_image_tokens", "image_seq_length", "image_seq_len")
SIZES = (*_SIDES, *_PATCHES, *_TOKENS)


def load_processor(folder: str | Path, prompt: str = "") -> Any:
    """Load the processor (tokenizer and image processor) of a folder, with padding on the left.

    Args:
        folder: The folder.
        prompt: The prompt that it will read; tokenizers are tested on it.

    Raises:
        CheckpointError: There is no processor, or its settings are not safe.
    """
    from transformers import AutoProcessor

    for file in (Path(folder) / name for name in IMAGE_FILES):
        if file.is_file():
            _check_image_settings(str(file), read_json(file))
    if Path(folder).is_dir():
        check_tokenizers(Path(folder), [prompt])
    needed = (
        "it needs preprocessor_config.json or processor_config.json, and the tokenizer's files. "
        "Code from a checkpoint is never run."
    )
    with raised_as(
        CheckpointError, f"{folder} has no processor that can be read", needed, passing=()
    ):
        processor = AutoProcessor.from_pretrained(str(folder), **LOCAL)
    if (
        getattr(processor, "tokenizer", None) is None
        or getattr(processor, "image_processor", None) is None
    ):
        raise CheckpointError(
            f"{folder}: {type(processor).__name__} does not process images and text; copy "
            "tokenizer and image processor into the folder."
        )
    tokenizer = processor.tokenizer
    for owner in (processor, tokenizer):
        templates = getattr(owner, "chat_template", None)
        if isinstance(templates, dict):  # several, by name
            if "default" not in templates:
                raise CheckpointError(
                    f"{folder} has the chat templates {', '.join(sorted(templates))}; name the one "
                    'to use "default".'
                )
            owner.chat_template = templates["default"]
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise CheckpointError(
                f"{folder}: the tokenizer has neither a padding nor an end token; add one."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _check_image_settings(what: str, values: dict[str, Any], area: bool = False) -> None:
    """Raise `CheckpointError` for sizes that would exhaust the memory."""
    kinds = [str(value) for name, value in values.items() if name.endswith("_processor_type")]
    # Qwen's sizes are areas [px], those of other processors are sides.
    area = area or any("Qwen" in kind for kind in kinds)
    for name, value in values.items():
        if isinstance(value, dict):
            _check_image_settings(what, value, area)
        most = MOST_PIXELS if name.endswith(("_edge", "_pixels")) and area else LARGEST_SIDE
        least = {"image_std": 1e-3, "image_mean": -100.0}.get(name)
        if least is not None and value is not None:
            numbers = value if isinstance(value, list) else [value]
            if not numbers or not all(
                isinstance(v, int | float) and least <= v <= 100 for v in numbers
            ):
                raise CheckpointError(
                    f"{what}: {name} is {str(value)[:100]}; it must be numbers in [{least:g}, 100]."
                )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and name in SIZES and not 0 <= value <= most:
            raise CheckpointError(f"{what}: {name} is {value}; it must be in [0, {most}].")
