"""Off-screen rendering shared by all environments of a process.

A GL context is expensive, so every scene and image size has one renderer; environments pass their
own `mjData`.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence

import mujoco
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ceed_vla.errors import SimulationError

_MIN_IMAGE_SIZE = 16
_renderers: dict[tuple[str, int], mujoco.Renderer] = {}


def check_image_size(size: int, largest: int) -> None:
    """Raise `SimulationError` unless images of `size` x `size` pixels can be rendered."""
    if not isinstance(size, int | np.integer) or not _MIN_IMAGE_SIZE <= size <= largest:
        raise SimulationError(
            f"Image size {size!r} px; give an integer from {_MIN_IMAGE_SIZE} to {largest}."
        )


def tune(model: mujoco.MjModel) -> None:
    """Turn off shadows, multisampling and reflections: most of the software rendering at 96 px."""
    model.vis.quality.shadowsize = 0
    model.vis.quality.offsamples = 0
    model.vis.quality.numslices = 12
    model.vis.quality.numstacks = 8
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0


def coarsen(model: mujoco.MjModel, cell: float) -> None:
    """Simplify the drawn meshes: merge all vertices within a cube with the side `cell` [m].

    Collision geometry is unchanged.
    """
    for mesh in range(model.nmesh):
        vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
        _, first, cube = np.unique(
            np.round(vertices / cell), axis=0, return_index=True, return_inverse=True
        )
        start = model.mesh_faceadr[mesh]
        count = model.mesh_facenum[mesh]
        faces = first[cube.ravel()][model.mesh_face[start : start + count]]  # (F, 3)
        proper = np.flatnonzero((np.diff(np.sort(faces)) > 0).all(1))  # three distinct corners
        end = start + len(proper)
        model.mesh_face[start:end], model.mesh_facenum[mesh] = faces[proper], len(proper)
        for corners in (model.mesh_facenormal, model.mesh_facetexcoord):
            corners[start:end] = corners[start + proper]


def shrink(model: mujoco.MjModel, side: int) -> None:
    """Reduce textures to at most `side` pixels, which takes most of the memory of large ones."""
    for number in range(model.ntex):
        texture = model.tex(number)
        width, height = int(texture.width[0]), int(texture.height[0])
        factor = -(-width // side)
        if factor == 1 or width % factor or height % factor:
            continue
        start, channels = int(texture.adr[0]), int(texture.nchannel[0])
        pixels = model.tex_data[start : start + height * width * channels]
        blocks = pixels.reshape(height // factor, factor, width // factor, factor, channels)
        small = blocks.mean((1, 3)).round().astype(np.uint8)
        model.tex_data[start : start + small.size] = small.ravel()
        model.tex_height[number], model.tex_width[number] = small.shape[:2]


def render(
    scene: str,
    model: mujoco.MjModel,
    data: mujoco.MjData,
    camera: str,
    size: int,
    smooth: int = 1,
    *,
    groups: Sequence[int] | None = None,
    effects: bool = False,
) -> NDArray[np.uint8]:
    """Render an image (size, size, 3) of a state.

    Args:
        scene: Name of the `model`. Renderers are shared by name, so models of a name may differ in
            the colours of their sites alone.
        model: Model of the scene.
        data: State to render.
        camera: Name of the camera.
        size: Side of the image [px].
        smooth: A pixel is the mean of `smooth` x `smooth` samples.
        groups: Groups of geometry to show; None: MuJoCo's choice.
        effects: With the shadows and reflections of the model.

    Raises:
        SimulationError: No GL context can be created, or the size cannot be rendered.
    """
    drawn = smooth * size
    if (scene, drawn) not in _renderers:
        _renderers[scene, drawn] = _make_renderer(model, drawn)
    renderer = _renderers[scene, drawn]
    option = None
    if groups is not None:
        option = mujoco.MjvOption()
        option.geomgroup[:] = [group in groups for group in range(len(option.geomgroup))]
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = effects
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = effects
    own = renderer.model  # of the environment that rendered first; lights are shown by colours
    colours = own.site_rgba.copy()
    own.site_rgba[:] = model.site_rgba
    try:
        renderer.update_scene(data, camera, option)
    finally:
        own.site_rgba[:] = colours
    image = renderer.render()
    return image if smooth == 1 else np.asarray(Image.fromarray(image).reduce(smooth))


def release(scene: str) -> None:
    """Free the GL contexts of a scene; its next image makes a new one."""
    for key in [key for key in _renderers if key[0] == scene]:
        _renderers.pop(key).close()


def close_renderers() -> None:
    """Free every GL context of this process; the next image makes a new one."""
    while _renderers:
        _renderers.popitem()[1].close()


def _make_renderer(model: mujoco.MjModel, size: int) -> mujoco.Renderer:
    check_image_size(size, model.vis.global_.offwidth)
    try:
        renderer = mujoco.Renderer(model, size, size)
    # the GL loaders raise many types, AttributeError and ImportError among them
    except Exception as error:
        raise SimulationError(
            f"No OpenGL context for rendering (MUJOCO_GL={os.environ.get('MUJOCO_GL', 'not set')}: "
            f"{type(error).__name__}: {error}). On Debian or Ubuntu install the software renderer, "
            "`apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libgl1`, and set "
            "MUJOCO_GL=egl."
        ) from error
    # Handlers run in reverse order: registered last, this one runs before the GL library's own.
    atexit.unregister(close_renderers)
    atexit.register(close_renderers)
    return renderer
