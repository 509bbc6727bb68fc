"""How an export reads observations: the settings of its state, images and instructions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ceed_vla.errors import ConfigError
from ceed_vla.fields import Checked, chosen, ranged, short
from ceed_vla.instructions import check_template
from ceed_vla.word_ids import WordIds

MOST_SIDE = 8192  # of an image [px]
MOST_CAMERAS = 64
MOST_PIXELS = 2**27  # of all cameras, with those that they are resized to
TOKENIZER = "text.json"  # of prompts, as a file of the library tokenizers


@dataclass
class StateSettings(Checked, prefix="state."):
    """The state vector and its normalization, ``(state - mean) / (std + eps)``.

    Attributes:
        name: Feature of an observation.
        mean: Per dimension; with `std` empty, the state is not normalized.
        std: Per dimension.
        size: Dimensions.
    """

    name: str
    size: int = ranged(1, "[1, 65536]")
    mean: list[float] = ranged([], "[-1e9, 1e9]")
    std: list[float] = ranged([], "[0, 1e9]")
    eps: float = ranged(1e-8, "[0, 1e-3]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, self.size):
            raise ConfigError(
                f"state.mean has {len(self.mean)} values and state.std {len(self.std)}; it must be "
                f"none or {self.size} each."
            )
        if any(np.float32(std) + np.float32(self.eps) == 0 for std in self.std):
            raise ConfigError(
                f"state.std has 0 and state.eps is {self.eps}; their sum divides the state, so it "
                "must be positive."
            )


@dataclass
class TextSettings(Checked, prefix="text."):
    """How an instruction becomes ids.

    Attributes:
        kind: "words" of a vocabulary, or a "prompt" that the file `TOKENIZER` encodes.
        longest: Longest instruction [words], or prompt [tokens].
        vocabulary: Words, sorted.
        padded: Whether the ids of words are padded to `longest`.
        template: Text with ``{instruction}`` in it.
        special_tokens: Whether the tokenizer adds its special tokens to the prompt.
        cut: End at which longer prompts are cut; "" refuses them.
        refused: Texts that an instruction must not contain.
        behind: Ids that follow the prompt, in places that the graph replaces by the state.
        stem_vocabulary: Words of the camera stems that read the instruction beside a prompt.
        stem_words: Longest instruction of these stems [words].
    """

    kind: str = chosen("words", ("words", "prompt"))
    longest: int = ranged(12, "[1, 65536]")
    vocabulary: list[str] | None = None
    padded: bool = True
    template: str = "{instruction}"
    special_tokens: bool = True
    cut: str = chosen("", ("", "left", "right"))
    refused: list[str] | None = None
    behind: list[int] = ranged([], "[0, 1e9]")
    stem_vocabulary: list[str] | None = None
    stem_words: int = ranged(12, "[1, 4096]")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template, "text.template")
        if self.kind == "prompt":
            if self.vocabulary:
                raise ConfigError("text.vocabulary must be empty for a prompt.")
            WordIds(self.stem_vocabulary or [], self.stem_words)
            return
        others = (self.behind, self.cut, self.refused, self.stem_vocabulary)
        if not self.vocabulary or any(others):
            raise ConfigError(
                f"text.vocabulary has {len(self.vocabulary or ())} words; words need at least one, "
                "and no text.behind, text.cut, text.refused or text.stem_vocabulary."
            )
        WordIds(self.vocabulary, self.longest)


@dataclass
class ImageSettings(Checked, prefix="images."):
    """How the images of the cameras become inputs of their stems.

    Attributes:
        cameras: Features of the cameras.
        sizes: Height and width of their images, as the checkpoint declares them.
        stems: Number of the stem graph of every camera.
        kind: "square" (any size, resized to `side`, in [0, 1]), "declared" (of the declared size,
            in [0, 1]), or "bytes" (of the declared size, resized by Pillow to each of `resizes` in
            turn, then ``(image * scale - mean) / std``).
        side: Height and width of a "square" image [px].
        resizes: Heights and widths of "bytes".
        resample: Number of Pillow's filter for "bytes".
        scale: Of "bytes".
        mean: Per colour, of "bytes".
        std: Per colour, of "bytes".
    """

    cameras: list[str]
    sizes: list[list[int]]
    stems: list[int] = ranged([], "[0, 255]")
    kind: str = chosen("square", ("square", "declared", "bytes"))
    side: int = ranged(96, "[1, 8192]")
    resizes: list[list[list[int]]] | None = None
    resample: int = ranged(1, "[0, 5]")
    scale: float = ranged(1 / 255, "(0, 1]")
    mean: list[float] = ranged([0.0, 0.0, 0.0], "[-100, 100]")
    std: list[float] = ranged([1.0, 1.0, 1.0], "[1e-3, 100]")

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.cameras)
        if count > MOST_CAMERAS:
            raise ConfigError(f"images.cameras has {count} entries; at most {MOST_CAMERAS}.")
        numbers = sorted(set(self.stems))
        if not 0 < count == len(set(self.cameras)) or numbers != list(range(len(numbers))):
            raise ConfigError(
                f"images.cameras is {short(self.cameras)} and images.stems {short(self.stems)}; "
                "the names must differ, and the numbers count from 0."
            )
        if (self.kind == "bytes") != (self.resizes is not None):
            raise ConfigError(
                f"images.kind is {self.kind} and images.resizes {short(self.resizes)}; only bytes "
                "have resizes."
            )
        chains = self.resizes if self.kind == "bytes" else [[] for _ in self.cameras]
        sizes = [*self.sizes, *(size for chain in chains or [] for size in chain)]
        if not (
            count == len(self.sizes) == len(self.stems) == len(chains or [])
            and all(len(size) == 2 and all(1 <= s <= MOST_SIDE for s in size) for size in sizes)
        ):
            raise ConfigError(
                f"images.sizes is {short(self.sizes)}, images.stems {short(self.stems)} and "
                f"images.resizes {short(self.resizes)}; each must have an entry for each of "
                f"{count} cameras, and sizes a height and a width in [1, {MOST_SIDE}]."
            )
        pixels = sum(height * width for height, width in sizes)
        if pixels > MOST_PIXELS or any(len(chain) > 2 for chain in chains or []):
            raise ConfigError(
                f"images.sizes and images.resizes have {pixels} pixels; at most {MOST_PIXELS} and "
                "two resizes per camera are supported."
            )
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ConfigError("images.mean and images.std must have three values each.")
        by_stem = [(stem, self.read_size(i)) for i, stem in enumerate(self.stems)]
        if len(set(by_stem)) != len(numbers):
            raise ConfigError("images.stems gives cameras of different sizes the same stem.")

    def read_size(self, camera: int) -> tuple[int, int]:
        """Height and width of a camera's image as its stem reads it."""
        if self.kind == "square":
            return self.side, self.side
        height, width = [self.sizes[camera], *self.chain(camera)][-1]
        return height, width

    def chain(self, camera: int) -> list[list[int]]:
        """The sizes that a camera's bytes are resized to, one after the other."""
        return self.resizes[camera] if self.kind == "bytes" and self.resizes else []
