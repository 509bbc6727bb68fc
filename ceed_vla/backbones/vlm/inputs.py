"""Images and instruction to the inputs of an image-text-to-text model, as a LeRobot processor step
with the model's own processor.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.lerobot_types import RobotObservation, TransitionKey
from lerobot.processor import ProcessorStepRegistry
from PIL import Image
from torch import Tensor

from ceed_vla.backbones.config import InputsStep, PolicyShape
from ceed_vla.backbones.transformers.step_files import FilesStep, read_files
from ceed_vla.backbones.vlm.chat_template import render
from ceed_vla.backbones.vlm.processor import load_processor
from ceed_vla.errors import (
    CheckpointError,
    ConfigError,
    InstructionError,
    ObservationError,
    raised_as,
)
from ceed_vla.fields import check_fields, chosen, ranged
from ceed_vla.images import camera_pixels
from ceed_vla.instructions import PLACE, batch_instructions, check_template

CAMERAS = ("separate", "stacked")
# Tensors with one row per observation, and tensors with several (images, patches), which the model
# reads as one list.
ROW_KEY, FLAT_KEY = "observation.vlm.", "observation.vlm_flat."
IDS, MASK = "input_ids", "attention_mask"
LONGEST_PROMPT = 65_536  # [tokens]


@ProcessorStepRegistry.register(name="ceed_vla_vlm_inputs")
@dataclass
class VLMInputsStep(FilesStep, InputsStep):
    """Make ``observation.vlm.input_ids``, ``...attention_mask``, ``...pixel_values`` and the other
    inputs of the model.

    The rows of the batch are the first dimension of every tensor. If the model reads all images or
    patches as one list, the key is ``observation.vlm_flat.*`` and the tensor (B, images or patches,
    ...).
    """

    # Camera feature -> [height, width] of its images [px], in the order of the prompt
    sizes: dict[str, list[int]] = field(default_factory=dict)
    # "separate" images, or one image with all cameras "stacked" from top to bottom
    layout: str = chosen("separate", CAMERAS)
    prompt: str = "{instruction}"  # text with ``{instruction}`` in it
    # Tokens at the end of the prefix that the backbone replaces by the state
    state_places: int = ranged(0, "[0, 16384]")

    def __post_init__(self) -> None:
        check_fields(self)
        check_template(self.prompt, "prompt")
        self._rendered: dict[int, str] = {}  # images -> the prompt in the chat format
        self._processor: Any = None

    def check_policy(self, backbone: Any, shape: PolicyShape) -> None:
        wanted = backbone.input_settings(shape)
        if wrong := [name for name, value in wanted.items() if getattr(self, name) != value]:
            raise ConfigError(
                f"{wrong[0]} is {getattr(self, wrong[0])!r}; it must be the policy's "
                f"{wanted[wrong[0]]!r}. Copy the checkpoint again."
            )

    @property
    def processor(self) -> Any:
        """The model's processor; `CheckpointError` if the checkpoint came without it."""
        self.check_files()
        return self._processor

    def set_processor(self, processor: Any) -> VLMInputsStep:
        """Use `processor`; returns self."""
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
            self._files = read_files(
                Path(folder), sorted(file.name for file in Path(folder).iterdir())
            )
        self._processor = processor
        return self

    def _open(self, folder: Path) -> None:
        self._processor = load_processor(folder, self.prompt)

    def observation(self, observation: RobotObservation) -> RobotObservation:
        self.check_files()
        name = type(self._processor).__name__
        images = self._images(observation)  # (B lists of k images)
        tasks = batch_instructions(
            self.transition.get(TransitionKey.COMPLEMENTARY_DATA), len(images)
        )
        prompt = self.prompt_text(len(images[0]))
        texts = [prompt.replace(PLACE, task) for task in tasks]
        once = {"add_special_tokens": False} if self.has_start(prompt) else {}
        shown = f"images of {self.sizes} with the prompt {texts[0]!r}"
        with raised_as(
            InstructionError, f"{name} cannot read {shown}", "use the checkpoint's own settings."
        ):
            inputs = dict(
                self._processor(
                    images=images, text=texts, padding=True, return_tensors="pt", **once
                )
            )
        inputs.pop("labels", None)
        if IDS not in inputs or inputs[IDS].shape[-1] > LONGEST_PROMPT:
            made = tuple(inputs[IDS].shape) if IDS in inputs else "no"
            raise InstructionError(
                f"{name} made {made} ids from the prompt; it must make 1 to {LONGEST_PROMPT}."
            )
        self._add_state_places(inputs)
        return {**observation, **keyed(inputs, len(images))}

    def _images(self, observation: RobotObservation) -> list[list[Image.Image]]:
        """The images of every row, in the order of the prompt."""
        cameras = [camera_pixels(observation, camera, size) for camera, size in self.sizes.items()]
        rows = len(cameras[0])
        if any(len(pixels) != rows for pixels in cameras):
            raise ObservationError(
                f"The cameras {', '.join(self.sizes)} have {[len(p) for p in cameras]} rows; they "
                "must be equal."
            )
        if self.layout == "stacked":
            cameras = [np.concatenate(cameras, axis=1)]  # (B, sum of heights, W, 3)
        return [[Image.fromarray(pixels[row]) for pixels in cameras] for row in range(rows)]

    def prompt_text(self, images: int) -> str:
        """The prompt with ``{instruction}``, in the model's chat format if it has one."""
        processor = self._processor
        template = getattr(processor, "chat_template", None)
        if isinstance(template, str) and not template.strip():
            raise CheckpointError("The checkpoint's chat template is empty; copy it again.")
        if template is None:
            return str(getattr(processor, "image_token", "<image>")) * images + self.prompt
        if images not in self._rendered:
            text = render(template, images, self.prompt, processor.tokenizer.special_tokens_map)
            check_template(text, "The prompt in the checkpoint's chat format")
            self._rendered[images] = text
        return self._rendered[images]

    def has_start(self, prompt: str) -> bool:
        """Whether a prompt contains the start token, as some chat formats do."""
        bos = self._processor.tokenizer.bos_token
        return bool(bos) and prompt.startswith(bos)

    def placeholder_ids(self) -> list[int]:
        """Ids in the places of the state at the end of the prefix."""
        if not self.state_places:
            return []
        tokenizer = self._processor.tokenizer
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        # An id that models do not read as an image or as padding; its embedding is replaced.
        ordinary = next(i for i in range(len(tokenizer)) if i not in special)
        return [ordinary] * self.state_places

    def _add_state_places(self, inputs: dict[str, Tensor]) -> None:
        ids = inputs[IDS]
        if not (behind := self.placeholder_ids()):
            return
        for name, value in inputs.items():
            if value.shape == ids.shape:  # one entry per token
                added = value.new_full(
                    (len(ids), len(behind)), {IDS: behind[0], MASK: 1}.get(name, 0)
                )
                inputs[name] = torch.cat([value, added], dim=1)


def keyed(inputs: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Give the processor's tensors their keys; the first dimension of each becomes `rows`."""
    named: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if len(value) == rows:
            named[ROW_KEY + name] = value
        elif len(value) % rows == 0:
            named[FLAT_KEY + name] = value.unflatten(0, (rows, -1))
        else:
            raise ObservationError(
                f"The processor made {len(value)} {name} from {rows} rows; it must make equally "
                "many per row."
            )
    return named
