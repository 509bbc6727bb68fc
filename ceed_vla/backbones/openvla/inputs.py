"""Image and instruction to OpenVLA's inputs, as a LeRobot processor step with the folder's
tokenizer and settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from lerobot.lerobot_types import RobotObservation, TransitionKey
from lerobot.processor import ProcessorStepRegistry
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ceed_vla.backbones.config import InputsStep, PolicyShape
from ceed_vla.backbones.openvla.folder import PROMPT, read_config
from ceed_vla.backbones.openvla.images import OpenVLAImages
from ceed_vla.backbones.openvla.tokenizer import read_tokenizer
from ceed_vla.backbones.transformers.step_files import TOKENIZER_FILES, FilesStep, read_files
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.files import read_json
from ceed_vla.images import camera_pixels
from ceed_vla.instructions import PLACE, batch_instructions, check_template

IDS_KEY, MASK_KEY = "observation.openvla.input_ids", "observation.openvla.attention_mask"
PIXELS_KEY = "observation.openvla.pixel_values"
IMAGES_FILE = "preprocessor_config.json"
# "▁": in training it precedes the action ids, but tokenizers omit it at the end of a text.
EMPTY_TOKEN = 29871


@ProcessorStepRegistry.register(name="ceed_vla_openvla_inputs")
@dataclass
class OpenVLAInputsStep(FilesStep, InputsStep):
    """Make ``observation.openvla.input_ids``, ``...attention_mask`` (B, L) and ``...pixel_values``
    (B, C, S, S).
    """

    camera: str = "observation.images.front"  # feature of the camera
    prompt: str = PROMPT  # text with ``{instruction}`` in it

    def __post_init__(self) -> None:
        check_template(self.prompt, "prompt")

    def check_policy(self, backbone: Any, shape: PolicyShape) -> None:
        wanted = backbone.prompt or self.prompt
        if self.camera not in shape.cameras or self.prompt != wanted:
            raise ConfigError(
                f"camera is {self.camera!r} and prompt {self.prompt!r}; the policy has the cameras "
                f"{', '.join(shape.cameras)} and the prompt {wanted!r}. Copy the checkpoint again."
            )

    def read_folder(self, path: str) -> Self:
        """Read tokenizer and image settings from an OpenVLA folder; returns self."""
        config = read_config(path)
        self.use(read_files(Path(path), (IMAGES_FILE, *TOKENIZER_FILES)), path)
        words = int(config["text_config"]["vocab_size"])
        largest = self._tokenizer.size - 1
        if max(largest, EMPTY_TOKEN) >= words:
            raise CheckpointError(
                f"{path}: the tokenizer has ids up to {max(largest, EMPTY_TOKEN)} (empty token "
                f"{EMPTY_TOKEN}), but text_config.vocab_size in config.json is {words}; they "
                "belong to different models. Copy the folder again."
            )
        seen = [
            [size] * 2 if isinstance(size, int) else list(size[-2:])
            for size in config["image_sizes"]
        ]
        if self._images.sizes != seen:
            raise CheckpointError(
                f"{Path(path) / IMAGES_FILE} makes images of {self._images.sizes} pixels, but the "
                f"vision towers in config.json read {seen}; they belong to different models. Copy "
                "the folder again."
            )
        return self

    def _open(self, folder: Path) -> None:
        if not (file := folder / IMAGES_FILE).is_file():
            raise CheckpointError(f"{folder} lacks {IMAGES_FILE}; copy it too.")
        self._images = OpenVLAImages(read_json(file), str(file))
        self._tokenizer = read_tokenizer(folder)

    def observation(self, observation: RobotObservation) -> RobotObservation:
        self.check_files()
        pictures = map(Image.fromarray, camera_pixels(observation, self.camera))
        pixels = torch.stack(list(map(self._images, pictures)))  # (B, C, S, S)
        tasks = batch_instructions(
            self.transition.get(TransitionKey.COMPLEMENTARY_DATA), len(pixels)
        )
        ids, mask = self.encode(tasks)
        return {**observation, PIXELS_KEY: pixels, IDS_KEY: ids, MASK_KEY: mask}

    def text(self, instruction: str) -> str:
        return self.prompt.replace(PLACE, instruction.lower())

    def encode(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, L) of the prompts, padded on the left, and their mask (B, L)."""
        rows = [
            torch.tensor(self.encode_text(self.text(instruction))) for instruction in instructions
        ]
        marks = [torch.ones_like(row) for row in rows]
        ids, mask = (
            pad_sequence(part, batch_first=True, padding_side="left") for part in (rows, marks)
        )
        return ids, mask

    def encode_text(self, text: str) -> list[int]:
        """Ids of a prompt, with the empty token at its end."""
        ids = self._tokenizer(text)
        return ids if ids[-1:] == [EMPTY_TOKEN] else [*ids, EMPTY_TOKEN]
