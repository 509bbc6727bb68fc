"""A prompt as text ids: LeRobot's processor step, whose tokenizer is in the checkpoint instead of
on a hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.lerobot_types import RobotObservation
from lerobot.processor import ProcessorStepRegistry, TokenizerProcessorStep

from ceed_vla.backbones.config import PolicyShape
from ceed_vla.backbones.transformers.step_files import LOCAL, FilesStep, read_files
from ceed_vla.errors import CheckpointError, ConfigError, raised_as
from ceed_vla.limited.tokenizers import check_tokenizers

LONGEST_PROMPT = 65_536


@ProcessorStepRegistry.register(name="ceed_vla_pi0_fast_prompt")
@dataclass
class PromptTokensStep(FilesStep, TokenizerProcessorStep):
    """A `TokenizerProcessorStep` whose state is the files of its tokenizer."""

    def __post_init__(self) -> None:
        """Validate the settings; `read_folder` or the state sets the tokenizer."""
        longest, sides = self.max_length, ("left", "right")
        if (
            not isinstance(longest, int)
            or not 1 <= longest <= LONGEST_PROMPT
            or self.padding_side not in sides
        ):
            raise ConfigError(
                f"max_length is {longest!r} and padding_side {self.padding_side!r}; they must be a "
                f"whole number in [1, {LONGEST_PROMPT}] and one of {', '.join(sides)}."
            )
        if self.tokenizer_name is not None or self.tokenizer is not None:
            raise ConfigError(
                f"tokenizer_name is {self.tokenizer_name!r}; leave it out, as the checkpoint has "
                "the tokenizer."
            )

    def check_policy(self, backbone: Any, shape: PolicyShape) -> None:
        """Check nothing: no setting repeats one of the policy's configuration."""

    def read_folder(self, path: str | Path) -> PromptTokensStep:
        """Read the tokenizer of a local folder; returns self."""
        self.use(read_files(Path(path)), str(path))
        return self

    def _open(self, folder: Path) -> None:
        self.input_tokenizer = load_text_tokenizer(folder)

    def observation(self, observation: RobotObservation) -> RobotObservation:
        self.check_files()
        return super().observation(observation)


def load_text_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer in a local folder, as LeRobot does for prompts."""
    from transformers import AutoTokenizer

    check_tokenizers(Path(folder))
    what = f"{folder} has no text tokenizer that loads"
    advice = "give the folder of the model's tokenizer."
    with raised_as(CheckpointError, what, advice):
        return AutoTokenizer.from_pretrained(str(folder), **LOCAL)
