"""Images as JPEG or PNG, for slow networks. Pillow is imported when an image needs it."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from ceed_vla.serving.arrays import WireError
from ceed_vla.serving.request_reader import LARGEST_SIDE
from ceed_vla.texts import short


def jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """The JPEG of an image (H, W, 3)."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


def image_of(data: bytes, name: str, form: str = "JPEG") -> NDArray[np.uint8]:
    """Decode an image.

    Args:
        data: The file.
        name: What it is called in errors.
        form: Pillow's name of its format.

    Returns:
        Its pixels (H, W, 3).

    Raises:
        WireError: It is of another format, too large, or damaged.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=(form,)) as image:
            if max(image.size) > LARGEST_SIDE:  # before its pixels take memory
                raise WireError(
                    f"{name} is an image of {image.width} x {image.height} px; at most "
                    f"{LARGEST_SIDE} px a side are read."
                )
            return np.asarray(image.convert("RGB"))
    except WireError:
        raise
    except Exception as error:  # Pillow has many types for damaged files
        raise WireError(
            f"{name} has {len(data)} bytes that are no {form} ({short(error, 100)})."
        ) from error
