"""Off-screen rendering shared by all environments of a process.

A GL context is expensive, so there is one renderer for every scene and image size; environments hand it their own
`mjData`.
"""

from __future__ import annotations

import atexit
import os

import mujoco
import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import SimulationError

_MIN_IMAGE_SIZE = 16
_renderers: dict[tuple[str, int], mujoco.Renderer] = {}


def check_image_size(size: int, largest: int) -> None:
    """Raise `SimulationError` unless images of `size` x `size` pixels can be rendered."""
    if not isinstance(size, int | np.integer) or not _MIN_IMAGE_SIZE <= size <= largest:
        raise SimulationError(f"Image size {size!r} px; give an integer from {_MIN_IMAGE_SIZE} to {largest}.")


def tune(model: mujoco.MjModel) -> None:
    """Leave out shadows, multisampling and reflections, most of the time of software rendering at 96 px."""
    model.vis.quality.shadowsize = 0
    model.vis.quality.offsamples = 0
    model.vis.quality.numslices = 12
    model.vis.quality.numstacks = 8
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0


def render(scene: str, model: mujoco.MjModel, data: mujoco.MjData, camera: str, size: int) -> NDArray[np.uint8]:
    """Image (size, size, 3) of a state, without shadows and reflections.

    `scene` names the `model`: where it was rendered before, the first one's shapes are drawn.

    Raises:
        SimulationError: When no GL context can be made, or the size cannot be rendered.
    """
    if (scene, size) not in _renderers:
        _renderers[scene, size] = _make_renderer(model, size)
    _renderers[scene, size].update_scene(data, camera)
    return _renderers[scene, size].render()


def close_renderers() -> None:
    """Free every GL context of this process; the next image makes a new one."""
    while _renderers:
        _renderers.popitem()[1].close()


def _make_renderer(model: mujoco.MjModel, size: int) -> mujoco.Renderer:
    check_image_size(size, model.vis.global_.offwidth)
    try:
        renderer = mujoco.Renderer(model, size, size)
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
