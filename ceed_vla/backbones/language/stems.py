"""Camera stems of a trained compact policy, frozen: what a language model without vision sees.

The stems have learnt to find the object that the instruction names. They need the instruction as
words of their own vocabulary, besides the tokens that the language model reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lerobot.lerobot_types import RobotObservation
from lerobot.processor import ProcessorStepRegistry
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor, nn

from ceed_vla.backbones.compact.stem import (
    WORD_CODE,
    check_stem,
    make_stems,
    stem_image,
    stem_numbers,
)
from ceed_vla.backbones.compact.words import InstructionWordsStep, build_vocabulary
from ceed_vla.backbones.config import PolicyShape
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.fields import Checked, chosen, ranged, short
from ceed_vla.files import read_json
from ceed_vla.folders import CONFIG, WEIGHTS, resolve_checkpoint
from ceed_vla.weights import copy_weights

WORDS_KEY = "observation.stem_words"
PREPROCESSOR = "policy_preprocessor.json"
_SETTINGS = (
    "image_size",
    "image_grid",
    "keypoints",
    "stem_channels",
    "max_instruction_words",
    "words",
    "width",
)


@dataclass
class StemConfig(Checked, prefix="backbone.stems."):
    """The stems; all fields but `path` and `patches` are read from that policy.

    Attributes:
        path: Compact policy whose stems read the cameras: a checkpoint folder, or "teacher" or
            "student".
        patches: Patches of a camera: the "grid" of that policy, or every place of the last
            "features", eight pixels apart.
        image_size: See `CompactConfig`, as for all that follow.
        image_grid: Side of the grid of patches of a camera.
        keypoints: Keypoints of a camera.
        stem_channels: Channels of the convolutions.
        max_instruction_words: Longest instruction [words].
        words: Rows of the word embedding.
        width: Width of a token of the stems.
    """

    path: str = "teacher"
    patches: str = chosen("grid", ("grid", "features"))
    image_size: int = ranged(96, "[8, 4096]")
    image_grid: int = ranged(4, "[1, 64]")
    keypoints: int = ranged(32, "[0, 4096]")
    stem_channels: list[int] = ranged([32, 64, 96, 128], "[4, 1024]")
    max_instruction_words: int = ranged(12, "[1, 4096]")
    words: int = ranged(256, "[2, 65536]")
    width: int = ranged(192, "[1, 4096]")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stem(self, self._prefix)

    def least_numbers(self, cameras: int) -> int:
        """A lower bound on the number of weights of all cameras' stems."""
        return self.words * WORD_CODE + cameras * stem_numbers(self)

    @property
    def widths(self) -> list[int]:
        """Widths of the groups of tokens that a stem makes."""
        if self.patches == "grid":
            return [self.width]
        features = [self.stem_channels[-1]]
        return [*features, self.width] if self.keypoints else features

    def take(self) -> Path:
        """Read the fields from the policy at `path`; returns its folder.

        Raises:
            CheckpointError: It is no compact policy.
        """
        folder = resolve_checkpoint(self.path)
        backbone = read_json(folder / CONFIG).get("backbone")
        if not isinstance(backbone, Mapping) or backbone.get("type") != "compact":
            kind = backbone.get("type") if isinstance(backbone, Mapping) else backbone
            raise CheckpointError(
                f"backbone.stems.path {self.path} has the backbone {short(kind)}; it must be a "
                "compact policy, whose stems are used."
            )
        if missing := [name for name in _SETTINGS if name not in backbone]:
            raise CheckpointError(f"{folder / CONFIG} lacks backbone.{missing[0]}; copy it again.")
        vars(self).update({name: backbone[name] for name in _SETTINGS})
        self.__post_init__()
        return folder


@ProcessorStepRegistry.register(name="ceed_vla_stem_words")
@dataclass
class StemWordsStep(InstructionWordsStep):
    """Turn ``task`` strings into ``observation.stem_words`` (B, L) int64 for the stems.

    One instruction is repeated for all rows, also as tokens of the language model.
    """

    key: ClassVar[str] = WORDS_KEY

    def check_policy(self, backbone: Any, shape: PolicyShape) -> None:
        super().check_policy(backbone.stems, shape)

    def observation(self, observation: RobotObservation) -> RobotObservation:
        found = super().observation(observation)
        rows = len(found[self.key])
        for name in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK):
            if name in found and len(found[name]) == 1:
                found[name] = found[name].expand(rows, -1)
        return found


def stem_words(stems: StemConfig, instructions: Sequence[str]) -> StemWordsStep:
    """Make the step for a policy with new stems.

    Args:
        stems: The stems' settings.
        instructions: The instructions of the data.

    Raises:
        CheckpointError: The policy at ``stems.path`` has no vocabulary.
        ConfigError: An instruction has a word that the stems do not know.
    """
    file = resolve_checkpoint(stems.path) / PREPROCESSOR
    steps = read_json(file).get("steps")
    found = [
        step["config"]["vocabulary"]
        for step in (steps if isinstance(steps, list) else ())
        if isinstance(step, dict) and "vocabulary" in (step.get("config") or {})
    ]
    if not found:
        raise CheckpointError(f"{file} has no vocabulary; copy the checkpoint again.")
    step = StemWordsStep(vocabulary=found[0], max_words=stems.max_instruction_words)
    if unknown := sorted(set(build_vocabulary(instructions)) - set(step.vocabulary)):
        raise ConfigError(
            f"The stems of {stems.path} do not know the words {', '.join(unknown[:10])} of the "
            "instructions; use the stems of a policy that was trained on these tasks."
        )
    return step


class Stems(nn.Module):
    """The frozen stems of all cameras.

    Args:
        config: Their settings.
        cameras: Features of the cameras, in the order of the stems.
    """

    def __init__(self, config: StemConfig, cameras: Sequence[str]) -> None:
        super().__init__()
        self.cameras = tuple(cameras)
        self.image_size, self.patches = config.image_size, config.patches
        self.word_codes = nn.Embedding(config.words, WORD_CODE)
        self.stems = make_stems(config, len(self.cameras))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, camera: str, image: Tensor, words: Tensor) -> list[Tensor]:
        """Tokens of a camera's images (B, 3, H, W) in [0, 1] for words (B, L): one group (B, T, w)
        for each of `StemConfig.widths`.
        """
        stem: Any = self.stems[self.cameras.index(camera)]
        instruction = self.word_codes(words).flatten(1)
        image = stem_image(image, self.image_size)
        if self.patches == "grid":
            return [stem(image, instruction)]
        fine, coarse = stem.features(image, instruction)
        places = [coarse.flatten(2).transpose(1, 2)]
        return places if stem.keypoints is None else [*places, stem.keypoints(fine, coarse)]

    def fill(self, folder: Path) -> None:
        """Read the weights of a compact policy.

        Raises:
            ConfigError: The policy has other cameras.
            CheckpointError: Its weights are damaged.
        """
        features = read_json(folder / CONFIG).get("input_features") or {}
        seen = [name for name, feature in features.items() if feature.get("type") == "VISUAL"]
        if sorted(seen) != list(self.cameras):
            raise ConfigError(
                f"The stems of {folder} read {', '.join(sorted(seen))}, and the data have "
                f"{', '.join(self.cameras)}; the cameras must be the same."
            )
        prefix = "backbone."
        missing, _ = copy_weights(
            self,
            [folder / WEIGHTS],
            lambda name: name.removeprefix(prefix),
            lambda name: not name.startswith((f"{prefix}stems.", f"{prefix}word_codes.")),
        )
        if missing:
            raise CheckpointError(f"{folder} lacks {missing[0]}; copy the checkpoint again.")
