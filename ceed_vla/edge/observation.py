"""Observations as the graphs of an export read them, with numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ceed_vla.edge.settings import ExportSettings
from ceed_vla.errors import ObservationError, raised_as
from ceed_vla.fields import short
from ceed_vla.word_ids import WordIds


class ObservationReader:
    """Validates and converts observations of one robot.

    Args:
        settings: Settings of the export.

    Raises:
        ConfigError: The vocabulary is not a list of distinct words.
    """

    def __init__(self, settings: ExportSettings) -> None:
        self.settings = settings
        self._words = WordIds(settings.vocabulary, settings.max_words)
        state = settings.state
        # As LeRobot's normalizer, in float32.
        self._mean: np.ndarray = np.zeros(state.size, dtype=np.float32)
        self._scale: np.ndarray = np.ones(state.size, dtype=np.float32)
        if state.std:
            self._mean = np.array(state.mean, dtype=np.float32)
            self._scale = np.array(state.std, dtype=np.float32) + np.float32(state.eps)

    def words(self, instruction: str) -> np.ndarray:
        """Ids (1, L) int64 of an instruction; raises `ObservationError`."""
        if not isinstance(instruction, str):
            raise ObservationError(f"The instruction is {short(instruction)}; it must be one text.")
        return np.array([self._words.encode(instruction)], dtype=np.int64)

    def state(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The normalized state (1, D) float32.

        Raises:
            ObservationError: It is missing, has another size, or is not finite.
        """
        settings = self.settings.state
        value = feature_of(observation, settings.name)
        shapes = ((settings.size,), (1, settings.size))
        if value.shape not in shapes or value.dtype.kind not in "fiu":
            raise ObservationError(
                f"{settings.name} is {value.shape} {value.dtype}; expected numbers of the shape "
                f"({settings.size},)."
            )
        with np.errstate(over="ignore"):  # it is not finite then
            state = value.reshape(1, settings.size).astype(np.float32)
        if not np.isfinite(state).all():
            raise ObservationError(f"{settings.name} has NaN or infinite values: {short(state)}.")
        normal: np.ndarray = (state - self._mean) / self._scale
        return normal

    def image(self, image: np.ndarray, camera: str) -> np.ndarray:
        """The image (1, 3, S, S) float32 in [0, 1] of a camera.

        Args:
            image: (H, W, 3) uint8, or float in [0, 1].
            camera: Name of the feature, for errors.

        Raises:
            ObservationError: It is not such an image.
        """
        with raised_as(ObservationError, f"{camera} is not an array", "pass an array of numpy."):
            image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ObservationError(
                f"{camera} is {image.shape} {image.dtype}; expected (height, width, 3)."
            )
        if image.dtype == np.uint8:
            pixels = image.astype(np.float32) / np.float32(255)
        elif image.dtype.kind == "f":
            pixels = image.astype(np.float32)
            if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN is neither
                raise ObservationError(
                    f"{camera} has values from {pixels.min():g} to {pixels.max():g}; images must "
                    "be in [0, 1], or uint8."
                )
        else:
            raise ObservationError(
                f"{camera} is {image.dtype}; images must be uint8, or floats in [0, 1]."
            )
        side = self.settings.image_size
        pixels = resized(pixels.transpose(2, 0, 1), side)
        return np.ascontiguousarray(pixels[None])


def random_observation(settings: ExportSettings, seed: int) -> tuple[dict[str, np.ndarray], str]:
    """A random observation and an instruction of known words, the same on every machine.

    Args:
        settings: Settings of the export.
        seed: Seed.
    """
    random = np.random.RandomState(seed)  # numpy keeps its stream for ever
    sizes = settings.camera_sizes or [[settings.image_size] * 2] * len(settings.cameras)
    observation: dict[str, np.ndarray] = {
        camera: random.randint(0, 256, (*size, 3)).astype(np.uint8)
        for camera, size in zip(settings.cameras, sizes, strict=True)
    }
    state = settings.state
    values = random.normal(size=state.size)
    if state.std:
        values = np.array(state.mean) + np.array(state.std) * values
    observation[state.name] = values.astype(np.float32)
    return observation, " ".join(settings.vocabulary[: settings.max_words]) or "move"


def feature_of(observation: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A feature of an observation as an array; raises `ObservationError` if it is missing."""
    if not isinstance(observation, Mapping) or name not in observation:
        known = (
            ", ".join(sorted(map(str, observation))) or "nothing"
            if isinstance(observation, Mapping)
            else f"no features ({type(observation).__name__})"
        )
        raise ObservationError(f"The observation lacks {name!r}; it has {known}.")
    with raised_as(ObservationError, f"{name} is not an array", "pass an array of numpy."):
        return np.asarray(observation[name])


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image (3, H, W) to (3, `side`, `side`), bilinear with antialiasing, as
    ``torch.nn.functional.interpolate(antialias=True)`` does.
    """
    _, height, width = image.shape
    if height != side:
        image = _weights(height, side) @ image
    if width != side:
        image = image @ _weights(width, side).T
    return image


def _weights(size: int, side: int) -> np.ndarray:
    """Weights (`side`, `size`) float32 of the input pixels for every output pixel."""
    # In float32, with the same roundings as torch.
    scale = np.float32(size / side)
    support = max(scale, np.float32(1))
    half = np.float32(0.5)
    centre = scale * (np.arange(side, dtype=np.float32)[:, None] + half)  # (side, 1)
    first = np.maximum((centre - support + half).astype(np.int64), 0)
    end = np.minimum((centre + support + half).astype(np.int64), size)
    pixel = np.arange(size)  # (size,)
    away = ((pixel - first).astype(np.float32) + first - centre + half) / support
    weight = np.maximum(1 - np.abs(away), 0)
    weight = np.where((pixel >= first) & (pixel < end), weight, 0).astype(np.float32)
    return weight / weight.sum(1, keepdims=True)
