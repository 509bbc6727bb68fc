"""Images and instruction to the inputs of an image-text-to-text model, as a LeRobot step that carries its processor.

The processor's own files (tokenizer, image processor, chat template) are the step's state: they are saved beside the
checkpoint as ``policy_preprocessor_step_*_ceed_vla_vlm_inputs.safetensors``, so that loading needs neither the base
model's folder nor a hub.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import RobotObservation, TransitionKey
from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry
from PIL import Image
from torch import Tensor

from ceed_vla.backbones.files import read_files, write_files
from ceed_vla.errors import CheckpointError, ObservationError

# One row an observation, or several (images, patches) that the model wants in one long list.
ROW_KEY, FLAT_KEY = "observation.vlm.", "observation.vlm_flat."
IDS, MASK = "input_ids", "attention_mask"


@ProcessorStepRegistry.register(name="ceed_vla_vlm_inputs")
@dataclass
class VLMInputsStep(ObservationProcessorStep):
    """Make ``observation.vlm.input_ids``, ``...attention_mask``, ``...pixel_values`` and what else the model reads.

    Every tensor has the rows of the batch first. Where the model wants all images or patches in one list, the key is
    ``observation.vlm_flat.*`` and the tensor (B, images or patches, ...).

    Attributes:
        sizes: Camera feature -> [height, width] of its images [px], in the order of the prompt.
        layout: "separate" images, or all cameras "stacked" from top to bottom into one.
        prompt: Text with ``{instruction}`` in it.
        state_places: Tokens at the end of the prefix that the backbone fills with the state.
    """

    sizes: dict[str, list[int]] = field(default_factory=dict)
    layout: str = "separate"
    prompt: str = "{instruction}"
    state_places: int = 0

    def __post_init__(self) -> None:
        self._processor: Any = None
        self._files: dict[str, Tensor] = {}

    # ---- the processor, kept in the checkpoint ------------------------------------------------------------------

    def set_processor(self, processor: Any) -> VLMInputsStep:
        """Use `processor`; returns self."""
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
            self._files = read_files(Path(folder), sorted(file.name for file in Path(folder).iterdir()))
        self._processor = processor
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The processor's files."""
        return self._files

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        from ceed_vla.backbones.vlm_loading import load_processor

        with tempfile.TemporaryDirectory() as folder:
            write_files(state, Path(folder))
            self._processor, self._files = load_processor(folder), dict(state)

    def get_config(self) -> dict[str, Any]:
        return {
            "sizes": self.sizes,
            "layout": self.layout,
            "prompt": self.prompt,
            "state_places": self.state_places,
        }

    # ---- inputs -------------------------------------------------------------------------------------------------

    def observation(self, observation: RobotObservation) -> RobotObservation:
        if self._processor is None:
            raise CheckpointError(
                "The pre-processor came without its processor's files; copy the checkpoint again."
            )
        images = self._images(observation)  # (B lists of k images)
        tasks = self._tasks(len(images))
        texts = [self._text(task, len(row)) for task, row in zip(tasks, images, strict=True)]
        try:
            inputs = dict(self._processor(images=images, text=texts, padding=True, return_tensors="pt"))
        except Exception as error:  # every family raises its own kinds
            raise ObservationError(
                f"{type(self._processor).__name__} cannot read images of {self.sizes} with the prompt "
                f"{texts[0]!r} ({error})."
            ) from error
        inputs.pop("labels", None)
        self._add_state_places(inputs)
        return {**observation, **keyed(inputs, len(images))}

    def _images(self, observation: RobotObservation) -> list[list[Image.Image]]:
        """For every row its images, in the order of the prompt."""
        cameras = [_pixels(observation, camera, size) for camera, size in self.sizes.items()]
        rows = len(cameras[0])
        if any(len(pixels) != rows for pixels in cameras):
            raise ObservationError(
                f"The cameras {', '.join(self.sizes)} have {[len(p) for p in cameras]} rows; they must be equal."
            )
        if self.layout == "stacked":
            cameras = [np.concatenate(cameras, axis=1)]  # (B, sum of heights, W, 3)
        return [[Image.fromarray(pixels[row]) for pixels in cameras] for row in range(rows)]

    def _tasks(self, rows: int) -> list[str]:
        task = (self.transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}).get("task")
        tasks = [task] if isinstance(task, str) else list(task or [])
        if len(tasks) == 1:
            tasks = tasks * rows  # one instruction for the whole batch
        if len(tasks) != rows or not all(text.strip() for text in tasks):
            raise ObservationError(
                f"The observation has the instructions {tasks} for {rows} rows; pass 'task' as a non-empty string "
                "or a list with one for every row."
            )
        return tasks

    def _text(self, task: str, images: int) -> str:
        """The prompt, in the model's chat format where it has one."""
        prompt, processor = self.prompt.format(instruction=task), self._processor
        if getattr(processor, "chat_template", None):
            content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
            message = [{"role": "user", "content": content}]
            return str(processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        return str(getattr(processor, "image_token", "<image>")) * images + prompt

    def _add_state_places(self, inputs: dict[str, Tensor]) -> None:
        ids = inputs[IDS]
        if not self.state_places:
            return
        shape = (len(ids), self.state_places)
        for name, value in inputs.items():
            if value.shape == ids.shape:  # one entry a token
                added = torch.full(shape, {IDS: self._ordinary_id(), MASK: 1}.get(name, 0), dtype=value.dtype)
                inputs[name] = torch.cat([value, added], dim=1)

    def _ordinary_id(self) -> int:
        """An id that no model reads as an image or as padding; its embedding is replaced anyway."""
        tokenizer = self._processor.tokenizer
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        return next(i for i in range(len(tokenizer)) if i not in special)

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        features[PipelineFeatureType.OBSERVATION][ROW_KEY + IDS] = PolicyFeature(
            type=FeatureType.LANGUAGE, shape=(0,)
        )
        return features


def keyed(inputs: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Name the processor's tensors, with `rows` rows first in each.

    Raises:
        ObservationError: Rows with different numbers of images or patches.
    """
    named: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if len(value) == rows:
            named[ROW_KEY + name] = value
        elif len(value) % rows == 0:
            named[FLAT_KEY + name] = value.unflatten(0, (rows, -1))
        else:
            raise ObservationError(
                f"The processor made {len(value)} {name} of {rows} rows; every row needs equally many."
            )
    return named


def _pixels(observation: RobotObservation, camera: str, size: list[int]) -> np.ndarray:
    """(B, H, W, 3) uint8 of one camera.

    Raises:
        ObservationError: The camera is missing, or its images have another size, mode or range.
    """
    if camera not in observation:
        have = ", ".join(sorted(key for key in observation if key.startswith("observation."))) or "none"
        raise ObservationError(f"The observation lacks {camera!r}; it has {have}.")
    image = observation[camera]
    height, width = size
    if not isinstance(image, Tensor) or tuple(image.shape[1:]) != (3, height, width):
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ObservationError(
            f"{camera} is {shape}, expected (B, 3, {height}, {width}): RGB, channels first, in the size that the "
            "policy was trained with."
        )
    if image.dtype != torch.uint8:
        if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
            raise ObservationError(
                f"{camera} holds {image.dtype} in [{image.min().item()}, {image.max().item()}]; "
                "images are uint8, or floats in [0, 1]."
            )
        image = (image * 255).round().to(torch.uint8)
    return image.permute(0, 2, 3, 1).cpu().numpy()
