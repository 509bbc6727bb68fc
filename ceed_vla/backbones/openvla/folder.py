"""Published OpenVLA folders: configuration and statistics. Code in a folder never runs."""

from __future__ import annotations

import json
import math
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ceed_vla.backbones.transformers.config import (
    DTYPES,
    least_sizes,
    published_folder,
    read_architecture,
)
from ceed_vla.errors import CheckpointError, ConfigError, raised_as
from ceed_vla.files import read_json

# Of a fine-tuned model; has precedence over norm_stats in config.json.
STATISTICS = "dataset_statistics.json"
# Keys of config.json that describe the model; norm_stats belong to the action tokens.
_MODEL = (
    "arch_specifier",
    "llm_backbone_id",
    "n_action_bins",
    "pad_to_multiple_of",
    "text_config",
    "torch_dtype",
)
# Lists with one entry per vision tower.
_LISTS = (
    "timm_model_ids",
    "image_sizes",
    "timm_override_act_layers",
    "timm_model_kwargs",
)
DESCRIBING = (*_MODEL, *_LISTS, "use_fused_vision_backbone")
LANGUAGE_MODELS = ("llama", "mistral")
# Some names and settings make timm read files or hubs, so only these are allowed: the towers of
# Prismatic VLMs.
TOWERS = re.compile(
    r"vit_(tiny|small|base|large|so400m)_patch(8|14|16)"
    r"(_reg4)?(_dinov2|_siglip|_clip)?(_(224|256|336|384|512))?(\.[a-z0-9_]+)?"
)
_SIZES = ("depth", "embed_dim", "num_heads", "mlp_ratio", "patch_size", "reg_tokens", "init_values")
_SWITCHES = (
    "class_token",
    "no_embed_class",
    "pos_embed",
    "global_pool",
    "dynamic_img_size",
    "pre_norm",
)
TOWER_SETTINGS = (*_SIZES, *_SWITCHES)
TOWER_VALUES = (None, "learn", "none", "", "avg", "token", "map")  # in addition to numbers
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "swish")
LARGEST_SIDE = 4096  # of an image [px]
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
# Prompt of OpenVLA v0.1, whose language model is Vicuna.
VICUNA_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: What action should the "
    "robot take to {instruction}? ASSISTANT:"
)


def usual_prompt(config: dict[str, Any]) -> str:
    """The prompt that a model was trained with, with ``{instruction}`` in it."""
    return VICUNA_PROMPT if str(config.get("llm_backbone_id")).startswith("vicuna") else PROMPT


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read config.json of an OpenVLA folder.

    Raises:
        CheckpointError: The model is of another kind, or entries contradict each other.
    """
    file = published_folder(folder, "The path of the model") / "config.json"
    config = read_json(file)
    if config.get("model_type") != "openvla":
        raise CheckpointError(
            f"{file}: model_type is {config.get('model_type')!r}; it must be 'openvla'"
            + (
                ", but this is already a checkpoint of ceed-vla."
                if config.get("type") == "ceed_vla"
                else "."
            )
        )
    return check_config(file, config)


def check_config(file: Path | str, config: dict[str, Any]) -> dict[str, Any]:
    """Validate a configuration and add the defaults of the format.

    Args:
        file: The file of the configuration, for error messages.
        config: Its values.

    Raises:
        CheckpointError: The model cannot be built.
    """
    with raised_as(CheckpointError, f"{file} has a value of the wrong type", "copy it again."):
        config = {
            "n_action_bins": 256,
            "pad_to_multiple_of": 64,
            "use_fused_vision_backbone": None,
            **config,
        }
        missing = [
            key for key in ("text_config", "timm_model_ids", "image_sizes") if key not in config
        ]
        if missing:
            raise CheckpointError(
                f"{file} lacks {', '.join(missing)}; it is not a complete OpenVLA configuration. "
                "Copy it again."
            )
        towers = config["timm_model_ids"]
        text = dict(config["text_config"])
        read_architecture(json.dumps(text))
        least_sizes(text)
        if config["use_fused_vision_backbone"] is None:
            config["use_fused_vision_backbone"] = len(towers) == 2
        expected = 2 if config["use_fused_vision_backbone"] else 1
        for key in _LISTS:
            if config.get(key) is not None and len(config[key]) != expected:
                raise CheckpointError(
                    f"{file}: {key} has {len(config[key])} entries; use_fused_vision_backbone "
                    f"requires {expected}. Copy it again."
                )
        _check_towers(file, config)
        text.setdefault("model_type", str(config.get("llm_backbone_id", "llama")).partition("-")[0])
        if text["model_type"] in ("llama2", "vicuna"):
            text["model_type"] = "llama"
        if text["model_type"] not in LANGUAGE_MODELS:
            raise CheckpointError(
                f"{file}: the language model (text_config.model_type) is {text['model_type']!r}; "
                f"it must be one of {', '.join(LANGUAGE_MODELS)}."
            )
        types = [part.get(name) for part in (config, text) for name in ("torch_dtype", "dtype")]
        config["torch_dtype"] = str(next(filter(None, types), "float32")).removeprefix("torch.")
        if config["torch_dtype"] not in DTYPES:
            raise CheckpointError(
                f"{file}: torch_dtype is {config['torch_dtype']!r}; choose {', '.join(DTYPES)}."
            )
        padding = config["pad_to_multiple_of"]
        bins = config["n_action_bins"]
        words = text.setdefault("vocab_size", 32000) - padding
        if not (
            isinstance(padding, int)
            and padding >= 0
            and isinstance(bins, int)
            and 2 < bins <= words
        ):
            raise CheckpointError(
                f"{file}: {config['n_action_bins']} action ids do not fit a vocabulary of "
                f"{text['vocab_size']} that was padded by {config['pad_to_multiple_of']}."
            )
        return {**config, "text_config": text}


def _check_towers(file: Path | str, config: dict[str, Any]) -> None:
    """Raise `CheckpointError` for vision towers that timm must not build."""
    for name in config["timm_model_ids"]:
        if not isinstance(name, str) or not TOWERS.fullmatch(name):
            raise CheckpointError(
                f"{file}: timm cannot build the vision tower {str(name)[:200]!r}; it must be the "
                "plain name of a vision transformer of timm with DINOv2, SigLIP or CLIP weights."
            )
    for settings in config.get("timm_model_kwargs") or ():
        for name, value in settings.items():
            # `int` includes True and False.
            number = isinstance(value, int | float) and abs(value) <= LARGEST_SIDE
            if name not in TOWER_SETTINGS or not (number or value in TOWER_VALUES):
                raise CheckpointError(
                    f"{file}: timm_model_kwargs sets {name!r} to {str(value)[:200]!r}; it may set "
                    f"numbers of {', '.join(TOWER_SETTINGS)}."
                )
    for layer in config.get("timm_override_act_layers") or ():
        if layer not in (None, *ACTIVATIONS):
            raise CheckpointError(
                f"{file}: timm_override_act_layers has {layer!r}; it may have "
                f"{', '.join(ACTIVATIONS)}."
            )
    for size in config["image_sizes"]:
        sides = [size] if isinstance(size, int) else list(size)
        fits = all(isinstance(side, int) and 1 <= side <= LARGEST_SIDE for side in sides)
        if not fits or not 1 <= len(sides) <= 3:
            raise CheckpointError(
                f"{file}: image_sizes has {size!r}; sides must be whole numbers in [1, "
                f"{LARGEST_SIDE}]."
            )


def describe_model(folder: str | Path) -> dict[str, Any]:
    """The entries of config.json that describe the model; see `read_config`."""
    config = read_config(folder)
    return {key: config[key] for key in DESCRIBING if config.get(key) is not None}


def action_statistics(folder: str | Path, unnorm_key: str = "") -> tuple[str, dict[str, Any]]:
    """Read the statistics that convert normalised actions.

    They are in ``norm_stats`` of config.json. A fine-tuned model may have others in
    dataset_statistics.json, which have precedence.

    Args:
        folder: The folder.
        unnorm_key: Name of the dataset; needed if there are several.

    Returns:
        The name of the dataset, and its ``q01``, ``q99`` and ``mask``, each (A,).

    Raises:
        ConfigError: `unnorm_key` is missing or unknown; the message lists the datasets.
        CheckpointError: The statistics are missing or incomplete.
    """
    folder = Path(folder)
    sources = {folder / "config.json": read_config(folder).get("norm_stats") or {}}
    if (folder / STATISTICS).is_file():
        sources = {folder / STATISTICS: read_json(folder / STATISTICS), **sources}
    for source, stats in sources.items():
        if not isinstance(stats, dict):
            raise CheckpointError(
                f"{source}: the statistics are a {type(stats).__name__}; they must be a JSON "
                "object. Copy it again."
            )
    first = next(iter(sources))
    known = ", ".join(sorted({key for stats in sources.values() for key in stats}))
    if not known:
        raise CheckpointError(
            f"{folder} has neither norm_stats in config.json nor {STATISTICS}; copy it too."
        )
    if not unnorm_key and len(sources[first]) != 1:
        raise ConfigError(
            f"{first} has statistics of {len(sources[first])} datasets; choose an unnorm_key: "
            f"{known}."
        )
    key = unnorm_key or next(iter(sources[first]))
    file = next((source for source, stats in sources.items() if key in stats), None)
    if file is None:
        close = get_close_matches(key, known.split(", "), n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(
            f"unnorm_key is {key!r}{guess}; choose one of {known} "
            f"({' and '.join(map(str, sources))})."
        )
    return key, _quantiles(sources[file][key], f"{file}: the action statistics of {key}")


def _quantiles(stats: Any, what: str) -> dict[str, Any]:
    """``q01``, ``q99`` and ``mask`` of one dataset; `what` is its name in messages."""
    with raised_as(
        CheckpointError, f"{what} need q01 and q99, one number per dimension", "copy them again."
    ):
        action = stats["action"]
        low = [float(v) for v in action["q01"]]
        high = [float(v) for v in action["q99"]]
        mask = [bool(v) for v in action.get("mask") or [True] * len(low)]
    if not all(math.isfinite(v) for v in (*low, *high)):
        raise CheckpointError(f"{what} have NaN or infinity in q01 or q99; copy them again.")
    if not 0 < len(low) == len(high) == len(mask):
        raise CheckpointError(
            f"{what} have {len(low)} values in q01, {len(high)} in q99 and {len(mask)} in mask; "
            "the numbers must be equal. Copy them again."
        )
    return {"q01": low, "q99": high, "mask": mask}
