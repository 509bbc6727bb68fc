"""Read LeRobot's pi0-FAST checkpoints, and make policies of them. Offline, and without code from a checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import draccus
from lerobot.policies.pi0_fast import modeling_pi0_fast
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from safetensors.torch import save_file
from torch import nn

from ceed_vla.backbones.architecture import read_architecture as read_values
from ceed_vla.backbones.pi0_fast_config import Pi0FastConfig, Pi0FastTokensConfig
from ceed_vla.backbones.pi0_fast_inputs import PromptTokensStep, load_text_tokenizer
from ceed_vla.backbones.pi0_fast_tokens import TextIds
from ceed_vla.checkpoint_files import resolve_checkpoint
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.files import read_json, write_text
from ceed_vla.processor_steps import CONVERTED, PROCESSOR_FILES, REMOTE_CODE, read_steps
from ceed_vla.tokens.fast_codec import FastCodec
from ceed_vla.weights import WEIGHTS, copy_weights, opened

logger = logging.getLogger(__name__)

VOCABULARIES = ("full", "actions")
WINDOW = 32  # slots a forward computes; chunks of LIBERO take 25 to 35 tokens of the 256 slots
_RANGES = {
    "chunk_size": (1, 4096),
    "n_action_steps": (1, 4096),
    "tokenizer_max_length": (1, 65536),
    "max_decoding_steps": (2, 65536),
    "fast_skip_tokens": (0, 10**7),
    "image_resolution": (1, 4096),
    "empty_cameras": (0, 16),
}
_HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"
_EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


def convert_pi0_fast(
    source: str | Path,
    output_dir: str | Path,
    *,
    fast_tokenizer: str = "",
    text_tokenizer: str = "",
    vocabulary: str = "full",
    weights: str = "copied",
    device: str = "cpu",
) -> Path:
    """Write a policy folder from a LeRobot checkpoint.

    Args:
        source: LeRobot's checkpoint folder.
        output_dir: New policy folder.
        fast_tokenizer: FAST tokenizer folder; the one that the checkpoint names if empty.
        text_tokenizer: PaliGemma's tokenizer folder; the one that the checkpoint names if empty.
        vocabulary: "full" (LeRobot's tokens for any weights) or "actions" (only ids that an action can hold).
        weights: "copied", or by "reference": they stay in `source`.
        device: Where the policy runs unless told otherwise.

    Returns:
        `output_dir`.

    Raises:
        CheckpointError: Files that are missing, damaged or of another policy.
        ConfigError: Tokenizers that do not fit the model, or a folder that is not empty.
    """
    from ceed_vla.modeling_ceed_vla import CeedVLAPolicy

    folder, output = resolve_checkpoint(source), Path(output_dir)
    for name in PROCESSOR_FILES:
        read_steps(folder, name, CONVERTED)
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; give a new output_dir.")
    if vocabulary not in VOCABULARIES:
        raise ConfigError(f"vocabulary is {vocabulary!r}; choose one of {', '.join(VOCABULARIES)}.")
    config = decode_architecture(read_architecture(folder))
    if config.temperature:
        logger.warning(
            "%s samples its tokens with temperature %g; here it decodes greedily, as with temperature 0.",
            folder,
            config.temperature,
        )
    fast = find_folder(fast_tokenizer or config.action_tokenizer_name, "fast_tokenizer")
    text = find_folder(text_tokenizer or config.text_tokenizer_name, "text_tokenizer")
    settings = CeedVLAConfig(
        input_features=config.input_features,
        output_features=config.output_features,
        normalization_mapping=config.normalization_mapping,
        chunk_size=config.chunk_size,
        n_action_steps=config.n_action_steps,
        backbone=Pi0FastConfig(path=str(folder.resolve()), weights=weights),
        action_tokens=_tokens(config, fast, text, _scored(folder) if vocabulary == "full" else 0),
        augment_state=0.0,
        decoding=DecodingConfig(window=WINDOW),
        device=device,
        push_to_hub=False,
    )
    policy = CeedVLAPolicy(settings)
    output.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(output)
    for name in ("policy_preprocessor", "policy_postprocessor"):
        _copy_pipeline(folder, output, name, text)
    return output


def read_architecture(path: str | Path) -> str:
    """LeRobot's configuration (JSON) in a checkpoint folder, for the CPU and without compilation.

    Raises:
        CheckpointError: Missing, unreadable, or of another policy.
    """
    folder = resolve_checkpoint(path)
    values = read_json(folder / "config.json")
    kind = values.get("type")
    if kind != "pi0_fast":
        raise CheckpointError(f"{folder} holds a policy of type {kind!r}; this reads LeRobot's 'pi0_fast'.")
    return json.dumps({**values, "device": "cpu", "compile_model": False, "gradient_checkpointing": False})


def decode_architecture(architecture: str) -> PI0FastConfig:
    """LeRobot's configuration from its JSON.

    Raises:
        CheckpointError: Values that LeRobot refuses, or no features.
    """
    values = read_values(architecture)
    values.pop("type", None)
    try:
        config = draccus.decode(PI0FastConfig, values)
        config.validate_features()
        for name, (low, high) in _RANGES.items():
            found = getattr(config, name)
            if not all(
                low <= value <= high for value in (found if isinstance(found, tuple | list) else [found])
            ):
                raise ConfigError(f"{name} is {found}; it must lie in [{low}, {high}].")
    except Exception as error:  # draccus raises its own kinds, and passes on those of the configuration
        raise CheckpointError(f"LeRobot's config.json cannot be used ({error}).") from error
    return config


def build_model(architecture: str) -> modeling_pi0_fast.PI0FastPytorch:
    """LeRobot's model with random weights. It gets no tokenizer: the backbone knows the ids."""
    return modeling_pi0_fast.PI0FastPytorch(decode_architecture(architecture))


def load_weights(holder: nn.Module, path: str | Path) -> None:
    """Read the weights of LeRobot's checkpoint into ``holder.model``; LeRobot's loader keeps random ones on failure.

    Raises:
        CheckpointError: Missing, unreadable, incomplete or foreign weights.
    """
    file = resolve_checkpoint(path) / WEIGHTS
    missing, unexpected = copy_weights(
        holder, [file], rename=lambda k: k if k.startswith("model.") else f"model.{k}"
    )
    if _EMBEDDING in missing and _HEAD not in missing:  # published checkpoints hold the shared matrix once
        own = holder.state_dict()
        own[_EMBEDDING].copy_(own[_HEAD])
        missing.remove(_EMBEDDING)
    for kind, names in (("lacks", missing), ("has unknown", unexpected)):
        if names:
            raise CheckpointError(
                f"{file} {kind} {len(names)} weights ({', '.join(names[:3])}, ...); it is no complete pi0-FAST."
            )


def find_folder(name: str, setting: str) -> Path:
    """A folder from its path, or from the name of a repository that was downloaded before."""
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # the library raises many kinds, all for "not here"
        raise CheckpointError(
            f"{setting} {name!r} is no folder, and was not downloaded before; give --{setting}=DIR."
        ) from error


def _tokens(config: PI0FastConfig, fast: Path, text: Path, scored: int) -> Pi0FastTokensConfig:
    codec, ids = FastCodec.from_folder(fast), TextIds.of(load_text_tokenizer(text))
    tokens = Pi0FastTokensConfig(
        max_tokens=config.max_decoding_steps,
        check_marker=config.validate_action_token_prefix,
        skip_tokens=config.fast_skip_tokens,
        scored=scored,
        bpe=codec.bpe.to_str(),
        scale=codec.scale,
        least=codec.least,
        words=ids.words,
        bos=ids.bos,
        stop=ids.stop,
        marker=list(ids.marker),
    )
    tokens.num_tokens = tokens.build(
        config.chunk_size, int(config.output_features["action"].shape[0])
    ).vocabulary_size
    return tokens


def _scored(folder: Path) -> int:
    """Rows of the language model's head."""
    with opened(folder / WEIGHTS) as weights:
        names = {key.removeprefix("model."): key for key in list(weights.keys())}
        key = names.get(_HEAD.removeprefix("model.")) or names.get(_EMBEDDING.removeprefix("model."))
        if key is None:
            raise CheckpointError(f"{folder / WEIGHTS} has no head of a language model; is it pi0-FAST's?")
        return int(weights.get_slice(key).get_shape()[0])


def _copy_pipeline(folder: Path, output: Path, name: str, text: Path) -> None:
    """Copy a pre- or post-processor: with the tokenizer in it, and without the step that runs code of a checkpoint."""
    file = folder / f"{name}.json"
    pipeline = read_json(file)
    steps = [s for s in pipeline["steps"] if s["registry_name"] not in REMOTE_CODE]
    for index, step in enumerate(steps):
        if step["registry_name"] == "tokenizer_processor":
            kept = {key: value for key, value in step["config"].items() if key != "tokenizer_name"}
            state = f"{name}_step_{index}_prompt.safetensors"
            save_file(PromptTokensStep(**kept).read_folder(text).state_dict(), output / state)
            steps[index] = {"registry_name": "ceed_vla_pi0_fast_prompt", "config": kept, "state_file": state}
        elif "state_file" in step:
            state = Path(step["state_file"]).name
            if not (folder / state).is_file():
                raise CheckpointError(f"{folder} lacks {state}, which {file.name} names; copy it too.")
            shutil.copyfile(folder / state, output / state)
    write_text(output / file.name, json.dumps({**pipeline, "steps": steps}, indent=2) + "\n")
