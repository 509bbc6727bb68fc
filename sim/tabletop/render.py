"""Off-screen rendering shared by all environments of a process.

A GL context is expensive, so there is one renderer per image size; environments hand it their own `mjData`.
"""

from __future__ import annotations

import atexit
import os

import mujoco
import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import SimulationError
from sim.tabletop.scene import MAX_IMAGE_SIZE, load_scene

_MIN_IMAGE_SIZE = 16
_renderers: dict[int, mujoco.Renderer] = {}


def check_image_size(size: int) -> None:
    """Raise `SimulationError` unless images of `size` x `size` pixels can be rendered."""
    if not isinstance(size, int | np.integer) or not _MIN_IMAGE_SIZE <= size <= MAX_IMAGE_SIZE:
        raise SimulationError(f"Image size {size!r} px; give an integer from {_MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}.")


def render(data: mujoco.MjData, camera: str, size: int) -> NDArray[np.uint8]:
    """Image (size, size, 3) of a state of the scene of `load_scene`.

    Raises:
        SimulationError: When no GL context can be made, or the size cannot be rendered.
    """
    if size not in _renderers:
        _renderers[size] = _make_renderer(size)
    _renderers[size].update_scene(data, camera)
    return _renderers[size].render()


def close_renderers() -> None:
    """Free every GL context of this process; the next image makes a new one."""
    while _renderers:
        _renderers.popitem()[1].close()


def _make_renderer(size: int) -> mujoco.Renderer:
    check_image_size(size)
    try:
        renderer = mujoco.Renderer(load_scene().model, size, size)
    except Exception as error:  # the GL loaders raise many types, AttributeError and ImportError among them
        raise SimulationError(
            f"No OpenGL context for rendering (MUJOCO_GL={os.environ.get('MUJOCO_GL', 'not set')}: "
            f"{type(error).__name__}: {error}). On Debian or Ubuntu install the software renderer, "
            "`apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libgl1`, and set MUJOCO_GL=egl."
        ) from error
    # Registered after the GL library's own handler, so it runs before that one.
    atexit.unregister(close_renderers)
    atexit.register(close_renderers)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    return renderer
