"""OpenVLA folders as they are published: configuration, statistics and weights. Nothing in them is executed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ceed_vla.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What of config.json describes the model; norm_stats belong to the action tokens.
DESCRIBING = (
    "arch_specifier",
    "dtype",
    "image_sizes",
    "n_action_bins",
    "pad_to_multiple_of",
    "text_config",
    "timm_model_ids",
    "timm_model_kwargs",
    "timm_override_act_layers",
    "torch_dtype",
    "use_fused_vision_backbone",
)
LANGUAGE_MODELS = ("llama", "mistral")


@dataclass(frozen=True)
class Architecture:
    """The describing part of an OpenVLA configuration.

    Attributes:
        values: Entries of config.json.
    """

    values: dict[str, Any]

    @property
    def words(self) -> int:
        """Vocabulary of the text model before it was padded: action ids count down from here."""
        return int(self.text["vocab_size"]) - int(self.values["pad_to_multiple_of"])

    @property
    def bins(self) -> int:
        """Action ids ``V``."""
        return int(self.values["n_action_bins"])

    @property
    def text(self) -> dict[str, Any]:
        """Configuration of the language model."""
        return dict(self.values["text_config"])

    @property
    def fused(self) -> bool:
        """Whether there are two vision towers."""
        return bool(self.values["use_fused_vision_backbone"])

    @property
    def dtype(self) -> str:
        """Type the weights were published in."""
        return str(self.values.get("torch_dtype") or self.values.get("dtype") or "float32")

    def check_bins(self, bins: int) -> None:
        """Raise `ConfigError` unless the action tokens have the model's number of bins."""
        if bins != self.bins:
            raise ConfigError(
                f"The action tokens have {bins} values, the model {self.bins} action ids; set "
                f"--policy.action_tokens.type=openvla with n_action_bins={self.bins}."
            )


# ---- configuration ----------------------------------------------------------------------------------------------


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: No such file, or another content.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); is this a model's folder?"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); copy it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a {type(values).__name__} instead of settings; copy it again.")
    return values


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of an OpenVLA folder.

    Raises:
        CheckpointError: No such folder, another kind of model, or entries that are missing or contradict each other.
    """
    if not str(folder) or not Path(folder).is_dir():
        raise CheckpointError(
            f"{str(folder)!r} is no folder; give the local folder of an OpenVLA model, with config.json and "
            "*.safetensors. A model of a hub must be downloaded first."
        )
    file = Path(folder) / "config.json"
    config = read_json(file)
    if config.get("model_type") != "openvla":
        raise CheckpointError(
            f"{file}: model_type is {config.get('model_type')!r}; this reader takes 'openvla'"
            + (", and this is a checkpoint of ceed-vla already." if config.get("type") == "ceed_vla" else ".")
        )
    return _checked(file, config)


def _checked(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the defaults of the format; raises `CheckpointError` for what cannot be built."""
    config = {"n_action_bins": 256, "pad_to_multiple_of": 64, "use_fused_vision_backbone": None, **config}
    missing = [
        key for key in ("text_config", "timm_model_ids", "image_sizes", "norm_stats") if key not in config
    ]
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}; it is no complete OpenVLA configuration.")
    towers, text = config["timm_model_ids"], dict(config["text_config"])
    if config["use_fused_vision_backbone"] is None:
        config["use_fused_vision_backbone"] = len(towers) == 2
    expected = 2 if config["use_fused_vision_backbone"] else 1
    for key in ("timm_model_ids", "image_sizes", "timm_override_act_layers", "timm_model_kwargs"):
        if config.get(key) is not None and len(config[key]) != expected:
            raise CheckpointError(
                f"{file}: {key} has {len(config[key])} entries, use_fused_vision_backbone says {expected}."
            )
    if text.setdefault("model_type", "llama") not in LANGUAGE_MODELS:
        raise CheckpointError(
            f"{file}: text_config.model_type is {text['model_type']!r}; the language models that can be read are "
            f"{', '.join(LANGUAGE_MODELS)}."
        )
    words = int(text.setdefault("vocab_size", 32000)) - int(config["pad_to_multiple_of"])
    if not 1 < int(config["n_action_bins"]) <= words:
        raise CheckpointError(
            f"{file}: {config['n_action_bins']} action ids do not fit a vocabulary of {text['vocab_size']} that "
            f"was padded by {config['pad_to_multiple_of']}."
        )
    return {**config, "text_config": text}


def read_architecture(folder: str | Path) -> dict[str, Any]:
    """The entries of config.json that describe the model; see `read_config`."""
    config = read_config(folder)
    return {key: config[key] for key in DESCRIBING if config.get(key) is not None}


def action_statistics(folder: str | Path, unnorm_key: str = "") -> tuple[str, dict[str, Any]]:
    """Statistics by which actions are un-normalised.

    Args:
        folder: The published folder.
        unnorm_key: Data set whose statistics are meant; not needed where there is one.

    Returns:
        The data set's name, and its ``q01``, ``q99`` and ``mask``, ``A`` values each.

    Raises:
        ConfigError: The name is unknown, or missing where there are several; the message lists them.
        CheckpointError: Statistics that are incomplete.
    """
    file, stats = Path(folder) / "config.json", read_config(folder)["norm_stats"]
    known = ", ".join(sorted(stats))
    if not unnorm_key and len(stats) != 1:
        raise ConfigError(f"{file} has statistics of {len(stats)} data sets; choose an unnorm_key: {known}.")
    key = unnorm_key or next(iter(stats))
    if key not in stats:
        raise ConfigError(f"unnorm_key is {key!r}; {file} has {known}.")
    action = stats[key].get("action") or {}
    low, high = action.get("q01"), action.get("q99")
    if not low or not high or len(low) != len(high):
        raise CheckpointError(f"{file}: norm_stats.{key}.action needs q01 and q99, one value a dimension.")
    mask = action.get("mask") or [True] * len(low)
    if len(mask) != len(low):
        raise CheckpointError(
            f"{file}: norm_stats.{key}.action has {len(low)} dimensions and {len(mask)} in mask."
        )
    return key, {
        "q01": [float(v) for v in low],
        "q99": [float(v) for v in high],
        "mask": [bool(v) for v in mask],
    }


# ---- weights ----------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, one or its shards.

    Raises:
        CheckpointError: None, or a shard that the index names is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = ", ".join(
            sorted(file.name for pattern in ("*.bin", "*.pt") for file in folder.glob(pattern))
        )
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}"
            + (f", only {pickled}; pickled weights are not read: convert them." if pickled else ".")
        )
    shards = sorted(set((read_json(folder / INDEX).get("weight_map") or {}).values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing) or 'all shards'}, which {INDEX} names; copy them too."
        )
    return [folder / name for name in shards]


def read_weights(files: list[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, tensor) of every weight, one at a time.

    Raises:
        CheckpointError: A file is truncated or damaged.
    """
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  (not a mapping)
                    yield file, name, weights.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); copy it again.") from error


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> list[str]:
    """Read a folder's weights into a model, converted to the model's types.

    Returns:
        The model's names of its weights.

    Raises:
        CheckpointError: Weights that are missing, damaged or of other sizes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"The weights of this policy lie in {str(folder)!r}, which is no folder (any more); correct "
            "backbone.path in the checkpoint's config.json."
        )
    own, read, unknown = model.state_dict(), set(), []
    for file, published, tensor in read_weights(weight_files(folder)):
        name = published.replace(".scale_factor", ".gamma")  # the published code renames timm's LayerScale
        if name not in own:
            if not name.endswith("rotary_emb.inv_freq"):  # older transformers saved what is computed
                unknown.append(published)
            continue
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file}: {published} has shape {tuple(tensor.shape)}, config.json describes "
                f"{tuple(own[name].shape)}; configuration and weights belong to different models."
            )
        own[name].copy_(tensor)
        read.add(name)
    tensors = {own[name].data_ptr() for name in read}
    missing = sorted(
        name for name in own.keys() - read if own[name].data_ptr() not in tensors
    )  # a tied head is not
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights that config.json describes (the first is {missing[0]}); a shard "
            "or a tower is missing."
        )
    if unknown:
        logger.warning("%s has %d weights that the model does not use: %s", folder, len(unknown), unknown[0])
    return sorted(own)
