"""Observations as the graphs of an export read them, with numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ceed_vla.edge.feature_settings import ImageSettings
from ceed_vla.edge.resizing import resized, resized_bytes
from ceed_vla.edge.settings import ExportSettings
from ceed_vla.edge.texts import Texts
from ceed_vla.errors import ObservationError, raised_as
from ceed_vla.fields import short

_PROMPT = "put the red cube in the green bin"  # words of random instructions


class ObservationReader:
    """Validates and converts observations of one robot.

    Args:
        settings: Settings of the export.
        texts: What encodes its instructions.
    """

    def __init__(self, settings: ExportSettings, texts: Texts) -> None:
        self.settings = settings
        self.words = texts.encode
        self.stem_words = texts.encode_for_stems
        state = settings.state
        # As LeRobot's normalizer, in float32.
        self._mean: np.ndarray = np.zeros(state.size, dtype=np.float32)
        self._scale: np.ndarray = np.ones(state.size, dtype=np.float32)
        if state.std:
            self._mean = np.array(state.mean, dtype=np.float32)
            self._scale = np.array(state.std, dtype=np.float32) + np.float32(state.eps)
        self._colours = _colours(settings.images)

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
        """The input (1, 3, H, W) float32 of a camera's stem.

        Args:
            image: (H, W, 3) uint8, or float in [0, 1].
            camera: Feature of the camera.

        Raises:
            ObservationError: It is not such an image, or has another size than the export reads.
        """
        images = self.settings.images
        with raised_as(ObservationError, f"{camera} is not an array", "pass an array of numpy."):
            image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ObservationError(
                f"{camera} is {image.shape} {image.dtype}; expected (height, width, 3)."
            )
        index = images.cameras.index(camera)
        size = tuple(images.sizes[index])
        if images.kind != "square" and image.shape[:2] != size:
            raise ObservationError(
                f"{camera} is {image.shape}; expected {(*size, 3)}, the size that the policy was "
                "trained with."
            )
        pixels = _checked(image, camera)
        if images.kind == "bytes":
            pixels = resized_bytes(_as_bytes(pixels), images.chain(index), images.resample)
            pixels = np.stack([table[pixels[:, :, i]] for i, table in enumerate(self._colours)])
        else:
            # Contiguous, as products of other arrays are ten times slower.
            pixels = np.ascontiguousarray(_as_floats(pixels.transpose(2, 0, 1)))
            if images.kind == "square":
                pixels = resized(pixels, images.side)
        return np.ascontiguousarray(pixels[None])


def _checked(image: np.ndarray, camera: str) -> np.ndarray:
    """The image of bytes or of float32; raises `ObservationError`."""
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f":
        raise ObservationError(
            f"{camera} is {image.dtype}; images must be uint8, or floats in [0, 1]."
        )
    pixels = image.astype(np.float32)
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN is neither
        raise ObservationError(
            f"{camera} has values from {pixels.min():g} to {pixels.max():g}; images must be in "
            "[0, 1], or uint8."
        )
    return pixels


def _colours(images: ImageSettings) -> list[np.ndarray]:
    """Per colour the inputs (256,) float32 that the bytes 0..255 become."""
    shares = (np.arange(256) * images.scale).astype(np.float32)
    pairs = zip(images.mean, images.std, strict=True)
    return [(shares - np.float32(mean)) / np.float32(std) for mean, std in pairs]


def _as_floats(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255) if pixels.dtype == np.uint8 else pixels


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    return np.round(pixels * np.float32(255)).astype(np.uint8)


def random_observation(settings: ExportSettings, seed: int) -> tuple[dict[str, np.ndarray], str]:
    """A random observation and an instruction of known words, the same on every machine.

    Args:
        settings: Settings of the export.
        seed: Seed.
    """
    random = np.random.RandomState(seed)  # numpy keeps its stream for ever
    images = settings.images
    observation: dict[str, np.ndarray] = {
        camera: random.randint(0, 256, (*size, 3)).astype(np.uint8)
        for camera, size in zip(images.cameras, images.sizes, strict=True)
    }
    state = settings.state
    values = random.normal(size=state.size)
    if state.std:
        values = np.array(state.mean) + np.array(state.std) * values
    observation[state.name] = values.astype(np.float32)
    text = settings.text
    known = text.vocabulary or text.stem_vocabulary or _PROMPT.split()
    most = text.longest + 2 if text.cut else min(len(known), text.longest)
    if text.stem_vocabulary:
        most = min(most, text.stem_words)
    count = random.randint(1, most + 1)
    return observation, " ".join((known * (count // len(known) + 1))[:count])


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
