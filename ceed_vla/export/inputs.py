"""How a checkpoint's processors read observations, as settings of its export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lerobot.processor import NormalizerProcessorStep

from ceed_vla.backbones.compact.words import InstructionWordsStep
from ceed_vla.backbones.language.stems import StemWordsStep
from ceed_vla.backbones.transformers.prompt_tokens import PromptTokensStep
from ceed_vla.backbones.vlm.inputs import LONGEST_PROMPT, VLMInputsStep
from ceed_vla.backbones.vlm.kinds import SQUARE_IMAGES
from ceed_vla.edge.feature_settings import ImageSettings, StateSettings, TextSettings
from ceed_vla.errors import ConfigError, raised_as

INPUT_STEPS = (  # that make the model's inputs
    "ceed_vla_instruction_words",
    "ceed_vla_pi0_fast_prompt",
    "ceed_vla_stem_words",
    "ceed_vla_vlm_inputs",
)
_USUAL = {  # of the image processors of Idefics3 and SmolVLM
    "backend": "pil",
    "do_resize": True,
    "do_image_splitting": False,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
}


@dataclass(frozen=True)
class Inputs:
    """Settings of an export that concern its observations."""

    images: ImageSettings
    state: StateSettings
    text: TextSettings
    tokenizer: str | None = None  # of prompts, the content of a tokenizer.json


def read_inputs(name: str, family: str, policy: Any, preprocess: Any) -> Inputs:
    """Read how the processors of a checkpoint make the model's inputs.

    Args:
        name: The checkpoint, for errors.
        family: Family of its export.
        policy: The policy.
        preprocess: Its preprocessor.

    Raises:
        ConfigError: An export cannot make the same inputs.
    """
    config = policy.config
    visual = config.normalization_mapping.get("VISUAL", "IDENTITY")
    if getattr(visual, "value", visual) != "IDENTITY":
        raise ConfigError(
            f"{name} normalizes images as {visual}; exports support IDENTITY. Run it with torch."
        )
    state = _state(name, policy, preprocess)
    kinds = (InstructionWordsStep, PromptTokensStep, VLMInputsStep)
    steps = (step for step in preprocess.steps if isinstance(step, kinds))
    step = next((step for step in steps if not isinstance(step, StemWordsStep)), None)
    cameras = list(policy.backbone.cameras if family == "compact" else config.cameras)
    sizes = [list(config.input_features[camera].shape[1:]) for camera in cameras]
    stems = list(range(len(cameras)))
    side = getattr(policy.backbone, "image_size", None)
    images = (
        ImageSettings(cameras, sizes, stems, "declared")
        if side is None
        else ImageSettings(cameras, sizes, stems, "square", side)
    )
    if isinstance(step, InstructionWordsStep):
        text = TextSettings(
            "words", step.max_words, list(step.vocabulary), padded=family == "compact"
        )
        return Inputs(images, state, text)
    if isinstance(step, PromptTokensStep):
        words = [s for s in preprocess.steps if isinstance(s, StemWordsStep)]
        return _tokens(name, step, state, images, words)
    if isinstance(step, VLMInputsStep):
        return _chat(name, step, state)
    raise ConfigError(f"{name} has no step that reads instructions; export another checkpoint.")


def _state(name: str, policy: Any, preprocess: Any) -> StateSettings:
    """The state and its normalization."""
    config = policy.config
    states = [key for key, f in config.input_features.items() if f.type.value == "STATE"]
    if len(states) != 1:
        raise ConfigError(f"{name} reads {len(states)} states; exports need one.")
    size = config.shape.state_dim
    mode = config.normalization_mapping.get("STATE", "IDENTITY")
    mode = getattr(mode, "value", mode)
    if mode not in ("MEAN_STD", "IDENTITY"):
        raise ConfigError(
            f"The state's normalization is {mode}; exports support MEAN_STD and IDENTITY. Run the "
            "policy with torch."
        )
    normalizer = next((s for s in preprocess.steps if isinstance(s, NormalizerProcessorStep)), None)
    values = {} if normalizer is None else normalizer._tensor_stats.get(states[0], {})
    if mode == "IDENTITY" or normalizer is None or not values:
        return StateSettings(states[0], size)
    mean, std = values["mean"].tolist(), values["std"].tolist()
    return StateSettings(states[0], size, mean, std, float(normalizer.eps))


def _tokens(
    name: str,
    step: PromptTokensStep,
    state: StateSettings,
    images: ImageSettings,
    words: list[StemWordsStep],
) -> Inputs:
    """Tokens of the bare instruction, and the `words` of it that the stems read, if any."""
    tokenizer = step.input_tokenizer
    cut = tokenizer.truncation_side if step.truncation else ""
    text = TextSettings("prompt", step.max_length if cut else LONGEST_PROMPT, cut=cut)
    for stems in words:
        text = replace(text, stem_vocabulary=list(stems.vocabulary), stem_words=stems.max_words)
    return Inputs(images, state, text, _tokenizer(name, tokenizer))


def _chat(name: str, step: VLMInputsStep, state: StateSettings) -> Inputs:
    """A prompt in the model's chat format, with images that its processor makes."""
    processor = step.processor
    images = processor.image_processor
    kind = type(processor).__name__.removesuffix("Processor").lower()
    unusual = {key: value for key, value in _USUAL.items() if getattr(images, key, None) != value}
    if kind not in SQUARE_IMAGES or step.layout != "separate" or unusual:
        why = ", ".join(f"{key} must be {value}" for key, value in unusual.items())
        raise ConfigError(
            f"{name} has {type(processor).__name__} with {step.layout} cameras"
            f"{f' ({why})' if why else ''}; exports support {' and '.join(SQUARE_IMAGES)} with "
            "separate cameras whose images are not split. Run it with torch."
        )
    sizes = [list(size) for size in step.sizes.values()]
    with raised_as(
        ConfigError, f"The image processor of {name} is not supported", "run it with torch."
    ):
        chains = [_resizes(images, size) for size in sizes]
        mean, std = (
            np.broadcast_to(values, 3).tolist() for values in (images.image_mean, images.image_std)
        )
        resample = int(images.resample)
    count = len(sizes)
    prompt = step.prompt_text(count)
    text = TextSettings(
        "prompt",
        LONGEST_PROMPT,
        template=_with_image_tokens(prompt, processor),
        special_tokens=not step.has_start(prompt),
        behind=step.placeholder_ids(),
        refused=[processor.image_token],
    )
    found = ImageSettings(
        list(step.sizes),
        sizes,
        list(range(count)),
        "bytes",
        resizes=chains,
        resample=resample,
        scale=images.rescale_factor,
        mean=mean,
        std=std,
    )
    return Inputs(found, state, text, _tokenizer(name, processor.tokenizer))


def _resizes(images: Any, size: list[int]) -> list[list[int]]:
    """The sizes that an image processor resizes an image of `size` to, one after the other."""
    side = images.max_image_size["longest_edge"]
    image = images.resize(np.zeros((3, *size), np.uint8), images.size, resample=images.resample)
    return [list(image.shape[1:]), [side, side]]


def _with_image_tokens(prompt: str, processor: Any) -> str:
    """The prompt with the tokens of every image, as the processor writes them."""
    whole = getattr(processor, "global_image_tag", None) or processor.global_image_token
    image = (
        processor.fake_image_token
        + whole
        + processor.image_token * processor.image_seq_len
        + processor.fake_image_token
    )
    return prompt.replace(processor.image_token, image)


def _tokenizer(name: str, tokenizer: Any) -> str:
    """The content of the tokenizer's file."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise ConfigError(
            f"{name} has a {type(tokenizer).__name__}, which has no tokenizer.json; exports need "
            "one. Run it with torch."
        )
    return str(fast.to_str())
