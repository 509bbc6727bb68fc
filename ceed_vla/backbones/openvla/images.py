"""OpenVLA's image transform: one resized, cropped and normalised copy of the image per vision
tower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from ceed_vla.backbones.openvla.folder import LARGEST_SIDE
from ceed_vla.errors import CheckpointError, raised_as
from ceed_vla.fields import short

STRATEGIES = ("resize-naive", "letterbox", "resize-crop")
# Index = number in Pillow.
MODES = (
    "nearest",
    "lanczos",
    "bilinear",
    "bicubic",
    "box",
    "hamming",
)


class _Transform:
    """The transform of one tower; a `resize` of one number sets the shorter side [px]."""

    def __init__(self, values: dict[str, Any]) -> None:
        size = values["size"]
        crop = values["output_size"]
        mode = values["interpolation"]
        self.resize = [int(v) for v in ([size] if isinstance(size, int) else size)]
        self.crop = [int(v) for v in ([crop] * 2 if isinstance(crop, int) else crop)]
        self.mean, self.std = ([float(v) for v in values[name]] for name in ("mean", "std"))
        sides = (*self.resize, *self.crop)
        if (
            not all(1 <= side <= LARGEST_SIDE for side in sides)
            or len(self.crop) != 2
            or len(self.resize) > 2
        ):
            raise ValueError(f"the sizes {self.resize} and {self.crop}")
        # For pixels in [0, 1]; also excludes NaN.
        plausible = all(abs(v) <= 100 for v in self.mean) and all(
            1e-3 <= v <= 100 for v in self.std
        )
        if len(self.mean) != 3 or len(self.std) != 3 or not plausible:
            raise ValueError(f"the mean {self.mean} and the deviation {self.std}")
        self.interpolation = InterpolationMode(MODES[mode] if isinstance(mode, int) else mode)

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an image to pixels (3, S, S) float32."""
        resized = transforms.resize(image, self.resize, self.interpolation, antialias=True)
        pixels = transforms.to_tensor(transforms.center_crop(resized, self.crop))
        return transforms.normalize(pixels, self.mean, self.std)


class OpenVLAImages:
    """The image processor of an OpenVLA folder, from its preprocessor_config.json.

    Published files have a short form (``input_sizes``, ``interpolations``, ``means``, ``stds``, a
    strategy) and its expansion (``tvf_...``). As in the reference implementation, the expansion has
    precedence.

    Attributes:
        sizes: ``[S, S]`` of every tower's pixels.

    Args:
        settings: Contents of the file.
        file: The file, for error messages.

    Raises:
        CheckpointError: Settings are missing, unknown, or of other towers.
    """

    def __init__(self, settings: dict[str, Any], file: Path | str) -> None:
        strategy = settings.get("image_resize_strategy", "letterbox")
        if strategy not in STRATEGIES:
            raise CheckpointError(
                f"{file}: image_resize_strategy is {strategy!r}; it must be one of "
                f"{', '.join(STRATEGIES)}."
            )
        needed = (
            f"input_sizes, interpolations ({', '.join(MODES)}), means and stds, one entry per "
            "vision tower"
        )
        with raised_as(CheckpointError, f"{file} needs {needed}", "copy it again."):
            sizes = [[int(v) for v in size[-2:]] for size in settings["input_sizes"]]
            self._transforms = [
                _Transform(_expanded(settings, strategy, tower, size))
                for tower, size in enumerate(sizes)
            ]
            fill = [int(255 * value) for value in settings["means"][-1]]  # the last tower's
        self.sizes = [part.crop for part in self._transforms]
        if len(set(map(tuple, self.sizes))) != 1:
            raise CheckpointError(
                f"{file}: the vision towers read {self.sizes} pixels; all must be equal."
            )
        boxed = settings.get("tvf_do_letterbox")
        self._fill = settings.get("tvf_letterbox_fill") or fill
        if not isinstance(boxed, bool | None):
            raise CheckpointError(
                f"{file}: tvf_do_letterbox is {short(boxed)}; it must be true or false."
            )
        self._letterbox = strategy == "letterbox" if boxed is None else boxed
        listed = self._fill if isinstance(self._fill, list) else []
        if len(listed) != 3 or not all(
            type(value) is int and 0 <= value <= 255 for value in listed
        ):
            raise CheckpointError(
                f"{file}: the letterbox is filled with {self._fill}; it must be three whole "
                "numbers in [0, 255]."
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an image of any size to pixels (3 * towers, S, S) float32."""
        image = image.convert("RGB")
        if self._letterbox:  # centre the image in a square
            across, down = ((max(image.size) - side) // 2 for side in image.size)
            image = transforms.pad(image, [across, down, across, down], fill=self._fill)
        return torch.vstack([transform(image) for transform in self._transforms])


def _expanded(
    settings: dict[str, Any], strategy: str, tower: int, size: list[int]
) -> dict[str, Any]:
    """Resize, crop and normalisation of a tower, from the expansion or else the short form."""
    usual: dict[str, dict[str, Any]] = {
        # "resize-naive" ignores the aspect ratio, the others scale the shorter side.
        "tvf_resize_params": {
            "size": size if strategy == "resize-naive" else size[-1],
            "interpolation": (settings.get("interpolations") or ["bicubic"] * (tower + 1))[tower],
        },
        "tvf_crop_params": {"output_size": size},
        "tvf_normalize_params": {"mean": settings["means"][tower], "std": settings["stds"][tower]},
    }
    found: dict[str, Any] = {}
    for name, values in usual.items():
        found |= values | (settings[name][tower] if settings.get(name) else {})
    return found
