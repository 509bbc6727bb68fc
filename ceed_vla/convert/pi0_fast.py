"""Convert LeRobot's pi0-FAST checkpoints: weights, tokens and processors stay the same."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from safetensors.torch import save_file

from ceed_vla.backbones.pi0_fast.config import Pi0FastConfig, Pi0FastTokensConfig
from ceed_vla.backbones.pi0_fast.inputs import PromptTokensStep, load_text_tokenizer
from ceed_vla.backbones.pi0_fast.model import EMBEDDING, HEAD, decode_architecture, describe_model
from ceed_vla.backbones.pi0_fast.tokens import text_ids
from ceed_vla.checkpoints import save
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.convert.config import ConvertConfig
from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.files import read_json, write_text
from ceed_vla.folders import PROCESSOR_FILES, WEIGHTS, resolve_checkpoint
from ceed_vla.modeling_ceed_vla import CeedVLAPolicy
from ceed_vla.processor_steps import CONVERTED, REMOTE_CODE, read_steps
from ceed_vla.tokens.fast_codec import FastCodec
from ceed_vla.weights import opened

logger = logging.getLogger(__name__)

WINDOW = 32  # slots a forward computes; chunks of LIBERO take 25 to 35 tokens of the 256 slots


def write(config: ConvertConfig) -> str:
    """Convert the model, and return a line about the checkpoint."""
    folder = resolve_checkpoint(config.path)
    output = Path(config.output_dir)
    for name in PROCESSOR_FILES:
        read_steps(folder, name, CONVERTED)
    theirs = decode_architecture(describe_model(folder))
    if theirs.temperature:
        logger.warning(
            "%s samples its tokens with temperature %g; here it decodes greedily, as with "
            "temperature 0.",
            folder,
            theirs.temperature,
        )
    fast = find_folder(config.fast_tokenizer or theirs.action_tokenizer_name, "fast_tokenizer")
    text = find_folder(config.text_tokenizer or theirs.text_tokenizer_name, "text_tokenizer")
    scored = _scored(folder) if config.vocabulary == "full" else 0
    same = (
        "input_features",
        "output_features",
        "normalization_mapping",
        "chunk_size",
        "n_action_steps",
    )
    settings = CeedVLAConfig(
        **{name: getattr(theirs, name) for name in same},
        backbone=Pi0FastConfig(path=str(folder.resolve()), weights=config.weights),
        action_tokens=_tokens(theirs, fast, text, scored),
        augment_state=0.0,
        decoding=DecodingConfig(window=WINDOW),
        device=config.device,
        push_to_hub=False,
    )
    policy = CeedVLAPolicy(settings)
    pre, post = (
        partial(_copy_pipeline, folder, name, text)
        for name in ("policy_preprocessor", "policy_postprocessor")
    )
    save(
        output, policy, SimpleNamespace(save_pretrained=pre), SimpleNamespace(save_pretrained=post)
    )
    return f"{output}: LeRobot's pi0-FAST, weights {config.weights}, vocabulary {config.vocabulary}"


def find_folder(name: str, setting: str) -> Path:
    """A folder from its path, or from the name of a repository that was downloaded before."""
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download

    what = f"{setting} {name!r} is neither a folder nor a downloaded repository"
    with raised_as(CheckpointError, what, f"set --{setting}=DIR."):
        return Path(snapshot_download(name, local_files_only=True))


def _tokens(config: PI0FastConfig, fast: Path, text: Path, scored: int) -> Pi0FastTokensConfig:
    codec = FastCodec.from_folder(fast)
    tokens = Pi0FastTokensConfig(
        max_tokens=config.max_decoding_steps,
        check_marker=config.validate_action_token_prefix,
        skip_tokens=config.fast_skip_tokens,
        scored=scored,
        bpe=codec.bpe.to_str(),
        scale=codec.scale,
        least=codec.least,
        **text_ids(load_text_tokenizer(text)),
    )
    tokens.num_tokens = tokens.build(
        config.chunk_size, int(config.output_features["action"].shape[0])
    ).vocabulary_size
    return tokens


def _scored(folder: Path) -> int:
    """Rows of the language model's head."""
    with opened(folder / WEIGHTS) as weights:
        names = {key.removeprefix("model."): key for key in list(weights.keys())}
        key = names.get(HEAD.removeprefix("model.")) or names.get(EMBEDDING.removeprefix("model."))
        if key is None:
            raise CheckpointError(
                f"{folder / WEIGHTS} has no head of a language model; is it pi0-FAST's?"
            )
        return int(weights.get_slice(key).get_shape()[0])


def _copy_pipeline(folder: Path, name: str, text: Path, output: str) -> None:
    """Copy a pre- or postprocessor with its tokenizer, without steps that run remote code."""
    file = folder / f"{name}.json"
    pipeline = read_json(file)
    steps = [s for s in pipeline["steps"] if s["registry_name"] not in REMOTE_CODE]
    for index, step in enumerate(steps):
        if step["registry_name"] == "tokenizer_processor":
            own = {key: value for key, value in step["config"].items() if key != "tokenizer_name"}
            state = f"{name}_step_{index}_prompt.safetensors"
            save_file(PromptTokensStep(**own).read_folder(text).state_dict(), Path(output) / state)
            steps[index] = {
                "registry_name": "ceed_vla_pi0_fast_prompt",
                "config": own,
                "state_file": state,
            }
        elif "state_file" in step:
            shutil.copyfile(folder / step["state_file"], Path(output) / step["state_file"])
    write_text(Path(output) / file.name, json.dumps({**pipeline, "steps": steps}, indent=2) + "\n")
