"""LeRobot's pi0-FAST checkpoints: read offline, and without code of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import draccus
from lerobot.policies.pi0_fast import modeling_pi0_fast
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from torch import nn

from ceed_vla.backbones.transformers.architecture import read_architecture
from ceed_vla.backbones.transformers.backbone import read_weights
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.files import read_json

_RANGES = {
    "chunk_size": (1, 4096),
    "n_action_steps": (1, 4096),
    "tokenizer_max_length": (1, 65536),
    "max_decoding_steps": (2, 65536),
    "fast_skip_tokens": (0, 10**7),
    "image_resolution": (1, 4096),
    "empty_cameras": (0, 16),
}
HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


def describe_model(folder: str | Path) -> str:
    """LeRobot's configuration (JSON) in a checkpoint folder, for the CPU and without compilation."""
    values = read_json(Path(folder) / "config.json")
    kind = values.get("type")
    if kind != "pi0_fast":
        raise CheckpointError(f"{folder} holds a policy of type {kind!r}; this reads LeRobot's 'pi0_fast'.")
    return json.dumps({**values, "device": "cpu", "compile_model": False, "gradient_checkpointing": False})


def decode_architecture(architecture: str) -> PI0FastConfig:
    """LeRobot's configuration from its JSON; `CheckpointError` for values that LeRobot refuses, or without features."""
    values = read_architecture(architecture)
    values.pop("type", None)
    try:
        config = draccus.decode(PI0FastConfig, values)
        config.validate_features()
        for name, (low, high) in _RANGES.items():
            found = getattr(config, name)
            if not all(low <= value <= high for value in (found if isinstance(found, tuple | list) else [found])):
                raise ConfigError(f"{name} is {found}; it must lie in [{low}, {high}].")
    except Exception as error:  # draccus raises its own kinds, and passes on those of the configuration
        raise CheckpointError(f"LeRobot's config.json cannot be used ({error}).") from error
    return config


def build_model(architecture: str) -> modeling_pi0_fast.PI0FastPytorch:
    """LeRobot's model with random weights. It gets no tokenizer: the backbone knows the ids."""
    return modeling_pi0_fast.PI0FastPytorch(decode_architecture(architecture))


def load_weights(holder: nn.Module, folder: str | Path) -> None:
    """Read the weights of LeRobot's checkpoint into ``holder.model``; LeRobot's loader keeps random ones on failure."""
    read_weights(
        holder,
        Path(folder),
        rename=lambda name: name if name.startswith("model.") else f"model.{name}",
        copies={EMBEDDING: HEAD},  # published checkpoints hold the matrix that both share once
    )
