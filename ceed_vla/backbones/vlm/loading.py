"""Image-text-to-text models from local folders: they are validated, and their code never runs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ceed_vla.backbones.transformers.cache_check import close, with_and_without_cache
from ceed_vla.backbones.transformers.config import published_folder, read_architecture
from ceed_vla.backbones.transformers.published import read_published
from ceed_vla.backbones.vlm.model import VLMBackbone
from ceed_vla.errors import CheckpointError, ConfigError, raised_as
from ceed_vla.files import read_json


def load_model(folder: str | Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Read an image-text-to-text model with all its weights.

    Raises:
        CheckpointError: The model is of another kind or needs its own code, or weights are damaged,
            missing or of other sizes.
    """
    folder = published_folder(folder, "backbone.path")
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        reason = (
            "needs its own code (auto_map), which is never run"
            if "auto_map" in config
            else "is not supported"
        )
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {kind!r} {reason}; it must be one of the "
            "image-text-to-text models "
            f"{', '.join(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))}."
        )
    return read_published(
        AutoModelForImageTextToText, folder, dtype=dtype, attn_implementation=attention
    )


def architecture(model: PreTrainedModel) -> str:
    """The model's configuration as one line of JSON, from which `build_model` builds the model."""
    return json.dumps(model.config.to_diff_dict(), sort_keys=True)


def build_model(text: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Build the model that a text from `architecture` describes; its weights must still be read."""
    values = read_architecture(text)
    with raised_as(
        CheckpointError,
        "backbone.architecture does not describe a model",
        "copy config.json again.",
    ):
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    return cast("PreTrainedModel", model.eval())


def choose_action_ids(model: PreTrainedModel, processor: Any, kind: str, count: int) -> list[int]:
    """Choose the vocabulary ids of the action bins.

    Args:
        model: The model; its embedding is extended if "added" ids need more rows.
        processor: The model's processor.
        kind: See `VLMConfig.action_ids`.
        count: Number of bins.

    Raises:
        ConfigError: Tokenizer and model disagree, or the vocabulary is too small.
    """
    tokenizer = processor.tokenizer
    rows = cast("Any", model.get_input_embeddings()).num_embeddings
    words = 1 + max(tokenizer.get_vocab().values())
    if words > rows:
        raise ConfigError(
            f"{model.name_or_path}: the tokenizer has ids up to {words - 1}, but the model's "
            f"embedding has {rows} rows; they belong to different models, or tokens were added to "
            "only one of them. Take both from the same model."
        )
    image = getattr(model.config, "image_token_id", None)
    if image is not None and getattr(processor, "image_token_id", image) != image:
        raise ConfigError(
            f"{model.name_or_path}: the image token is {processor.image_token_id} for the "
            f"processor and {image} for the model; take both from the same model."
        )
    if kind == "added":
        if words + count > rows:
            # Mean resizing needs the whole embedding's covariance, and the new rows are trained.
            model.resize_token_embeddings(words + count, mean_resizing=False)
        return list(range(words, words + count))
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) | {image}
    ordinary = [i for i in range(words) if i not in special][-count:]
    if len(ordinary) < count:
        raise ConfigError(
            f"{model.name_or_path}: the vocabulary has {len(ordinary)} ordinary ids; it must have "
            f"one for each of the {count} action bins. Lower num_bins or set "
            "--policy.backbone.action_ids=added."
        )
    return ordinary[::-1] if kind == "last_reversed" else ordinary


@torch.no_grad()
def check_decoding(backbone: VLMBackbone) -> None:
    """Test on a few tokens that the cache can be cut, and that the head is one matrix.

    Raises:
        ConfigError: One of them does not hold, so that decoding would be wrong.
    """
    model = cast("Any", backbone.model)
    ids = backbone.action_ids[None, :4]
    accepted = inspect.signature(model.forward).parameters
    # PaliGemma warns without these.
    extra = {"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in accepted else {}
    needed = "Jacobi decoding needs a causal language model with attention in every layer."
    with raised_as(
        ConfigError,
        f"{type(model).__name__} cannot continue a key/value cache that was cut back",
        needed,
    ):
        afresh, continued = with_and_without_cache(
            backbone.decoder, model.get_input_embeddings()(ids)
        )
        logits = model(input_ids=ids, use_cache=False, **extra).logits  # (1, t, words)
        hidden = model.model(input_ids=ids, use_cache=False, **extra).last_hidden_state
        scores = model.get_output_embeddings()(hidden)
    if not close(afresh, continued):
        raise ConfigError(
            f"{type(model).__name__} returns other values with a key/value cache than without. "
            f"{needed}"
        )
    if not close(logits, scores):
        raise ConfigError(
            f"The head of {type(model).__name__} is more than one matrix (a soft cap or a scale), "
            "so the logits of the action ids alone would be wrong. Use another model."
        )
